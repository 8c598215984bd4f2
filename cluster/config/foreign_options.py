"""Options of FastDeploy's and vLLM's servers, beside those of their engines (engine/foreign_options.py), and what
becomes of each on neap's command line. Options with our own names (port, metrics_port, host, api_key, model, revision,
served_model_name, config, ...) are generated from the cluster file's model.
"""

from __future__ import annotations

from engine.foreign_options import ENGINE_OPTIONS, ForeignOption

_PORTS = "ports between workers are found by themselves"
_POOLS = "neap starts both roles itself; sizes: --set pools.0.workers=N --set pools.1.workers=M"
_REGISTRY = "workers find each other through neap's own registry"
_TOOLS = "tools are not built yet; leave it out"
_ONE_ROUTER = "requests are spread by neap's own router"


def _row(
    name: str, notice: str = "", *, instead: str = "", neutral: tuple[str, ...] = (), switch: bool = False
) -> ForeignOption:
    return ForeignOption(name=name, notice=notice, instead=instead, neutral=neutral, is_switch=switch)


_SCHEDULER = tuple(
    _row(f"scheduler_{name}", _REGISTRY)
    for name in (
        *("name", "ttl", "host", "port", "topic", "password", "db", "min_load_score", "load_shards_num"),
        *("sync_period", "expire_period", "release_load_expire_period", "reader_parallel", "writer_parallel"),
        *("writer_batch_size",),
    )
)

SERVER_OPTIONS: tuple[ForeignOption, ...] = (
    ForeignOption(name="max_concurrency", becomes="router.max_running"),
    ForeignOption(name="distributed_executor_backend", becomes="backend"),
    # ports and roles
    _row("engine_worker_queue_port", _PORTS),
    _row("cache_queue_port", _PORTS),
    _row("pd_comm_port", _PORTS),
    _row("rdma_comm_ports", _PORTS),
    _row("innode_prefill_ports", _PORTS),
    _row("cache_transfer_protocol", "shared memory or gRPC, whichever reaches"),
    _row("splitwise_role", instead=_POOLS, neutral=("mixed",)),
    _row("kv_transfer_config", "prefill and decode workers are connected by themselves"),
    _row("router", _ONE_ROUTER),
    *_SCHEDULER,
    _row("max_waiting_time", "a request's deadline: --default-timeout-s, or its header x-neap-timeout-ms"),
    _row("workers", "one router process serves; --set pools.N.workers=M is the number of engines"),
    _row("api_server_count", "one router process serves"),
    _row(
        "num_servers",
        instead="one command starts one endpoint; give the pools more workers: --set pools.1.workers=N",
        neutral=("1",),
    ),
    _row("ports", instead="one endpoint has one port: --port"),
    _row("args", "options follow as they are", switch=True),
    _row("ips", instead="several machines: join a Ray cluster with --ray-address"),
    # answers
    _row("tool_call_parser", instead=_TOOLS),
    _row("tool_parser_plugin", instead=_TOOLS),
    _row("enable_auto_tool_choice", instead=_TOOLS, switch=True),
    _row("reasoning_parser_plugin", instead="thinking stays in the answer's text yet; leave it out"),
    _row("chat_template", instead="put chat_template.jinja into the checkpoint folder"),
    _row(
        "chat_template_content_format",
        "text parts are joined by newlines",
    ),
    _row("response_role", instead="answers are the assistant's", neutral=("assistant",)),
    _row(
        "generation_config",
        "the checkpoint's generation_config.json holds",
    ),
    _row("override_generation_config", instead="edit the checkpoint's generation_config.json"),
    _row("return_tokens_as_token_ids", instead="logprobs name tokens by their text", switch=True),
    _row("enable_prompt_tokens_details", "usage always has them", switch=True),
    _row("enable_server_load_tracking", "see /load", switch=True),
    _row("seed", "each request has a seed of its own"),
    # the process
    _row("download_dir", "see HF_HOME"),
    _row("disable_log_requests", "requests are not logged", switch=True),
    _row("enable_log_requests", "requests are not logged; see /metrics and /status", switch=True),
    _row("uvicorn_log_level", "logs are in the folder that the start names"),
    _row("disable_frontend_multiprocessing", "the router is a process of its own", switch=True),
    _row("root_path", instead="serve it at /, behind a proxy that strips the prefix"),
    _row("ssl_keyfile", instead="put a proxy that speaks TLS before it"),
    _row("ssl_certfile", instead="put a proxy that speaks TLS before it"),
    _row("allowed_origins", instead="put a proxy that answers CORS before it"),
)

FOREIGN_OPTIONS = ENGINE_OPTIONS + SERVER_OPTIONS
# values of our own options as others write them
BACKENDS = {"mp": "process", "uni": "process"}
