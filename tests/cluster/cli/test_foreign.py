"""Commands of FastDeploy and vLLM after `neap serve`: all their options parse, and each does what its row says."""

from __future__ import annotations

import re
import shlex
from collections import Counter

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from cluster.cli.flags import flag_parameters
from cluster.config import ClusterConfig
from cluster.config.foreign_options import FOREIGN_OPTIONS
from engine.foreign_options import OFF, ForeignOption, settle

# FastDeploy's parameters and defaults (shared/reference/ernie45.md, 5.2), as its users write them
FASTDEPLOY = """
--port 8000 --metrics-port 8001 --engine-worker-queue-port 8002 --cache-queue-port 8003 --max-model-len 2048
--tensor-parallel-size 1 --data-parallel-size 1 --block-size 64 --max-num-seqs 8 --max-num-batched-tokens 4096
--gpu-memory-utilization 0.9 --kv-cache-ratio 0.75 --num-gpu-blocks-override 1000 --enable-prefix-caching
--swap-space 4 --enable-chunked-prefill --max-num-partial-prefills 1 --max-long-partial-prefills 1
--long-prefill-token-threshold 81 --static-decode-blocks 2 --quantization None --splitwise-role mixed
--innode-prefill-ports 8010 --cache-transfer-protocol ipc,rdma --rdma-comm-ports 7000 --pd-comm-port 7001
--limit-mm-per-prompt '{"image": 1, "video": 1}'
--graph-optimization-config '{"use_cudagraph": true, "graph_opt_level": 0}' --guided-decoding-backend off
--max-concurrency 512 --max-waiting-time -1 --workers 1 --load-choices default_v1
--scheduler-name local --scheduler-ttl 900 --scheduler-host 127.0.0.1 --scheduler-port 6379 --scheduler-topic fd
--scheduler-password x --scheduler-db 0 --scheduler-min-load-score 3 --scheduler-load-shards-num 1
--scheduler-sync-period 5 --scheduler-expire-period 3000 --scheduler-release-load-expire-period 600
--scheduler-reader-parallel 4 --scheduler-writer-parallel 4 --scheduler-writer-batch-size 200
--router 127.0.0.1:8109 --served-model-name ernie --revision main --lm_head-fp32 --enable-logprob
--disable-custom-all-reduce
"""
# those of 5.2 that are not built yet, with a value that asks for something
FASTDEPLOY_REFUSED = """
--tensor-parallel-size 8 | --data-parallel-size 2 | --enable-expert-parallel | --quantization wint4
--quantization block_wise_fp8 | --splitwise-role prefill | --splitwise-role decode | --reasoning-parser ernie-x1
--tool-call-parser ernie-x1 | --tool-parser-plugin x.py | --enable-mm | --speculative-config '{"method": "mtp"}'
--guided-decoding-backend xgrammar | --chat-template t.jinja | --dynamic-load-weight
"""
COMMANDS = [
    "--model baidu/ERNIE-4.5-0.3B-Paddle --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182 "
    "--max-model-len 32768 --max-num-seqs 32",
    "baidu/ERNIE-4.5-21B-A3B-PT --trust-remote-code",
    "baidu/ERNIE-4.5-21B-A3B-PT --trust-remote-code --gpu-memory-utilization=0.95 --no-enable-prefix-caching "
    "--dtype half --max-model-len 32K --disable-log-requests -tp 1",
    "--model /models/x --max_model_len 8192 --served_model_name ernie --enable_prefix_caching --max_num_seqs=4",
    f"--model /models/x {FASTDEPLOY}",
]


def run(command: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        cli.app, ["serve", *shlex.split(command)], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    )
    return result.exit_code, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_users_have_starts_with_one_notice_at_most(served: list[ClusterConfig], command: str) -> None:
    code, output = run(command)
    assert code == 0 and len(served) == 1, output
    assert output.count("\n") <= 1 and output.startswith("neap: no meaning here, ignored: ") == bool(output)


def test_every_option_of_fastdeploy_reaches_what_it_becomes(served: list[ClusterConfig]) -> None:
    _, output = run(COMMANDS[-1])
    (config,) = served
    options = config.engine_options(config.pools[1])
    assert (options["max_model_len"], options["max_num_seqs"], options["block_size"]) == (2048, 8, 64)
    assert (options["max_batched_tokens"], options["enable_prefix_caching"]) == (4096, True)
    assert (config.model, config.served_model_name, config.revision) == ("/models/x", "ernie", "main")
    spec = config.router_specs(model_path="", registry="")[0]
    assert (spec.port, spec.metrics_port, spec.max_running) == (8000, 8001, 512)
    for name in ("--engine-worker-queue-port", "--lm-head-fp32", "--gpu-memory-utilization", "--scheduler-db"):
        assert name in output
    assert "--tensor-parallel-size" not in output, "1 is what is the case"


def test_values_are_read_as_others_write_them(served: list[ClusterConfig]) -> None:
    run(COMMANDS[2] + " --distributed-executor-backend mp")
    run("x --max-num-batched-tokens 16k --max-batched-tokens 4096 --distributed-executor-backend ray")
    first, second = (config.engine_options(config.pools[0]) for config in served)
    assert (first["dtype"], first["max_model_len"], first["enable_prefix_caching"]) == ("float16", 32768, False)
    assert second["max_batched_tokens"] == 4096, "our own name wins"
    assert [config.backend for config in served] == ["process", "ray"]


@pytest.mark.parametrize("option", [part.strip() for part in re.split(r"[|\n]", FASTDEPLOY_REFUSED) if part.strip()])
def test_what_is_not_built_is_refused_by_name_with_what_can_be_done(served: list[ClusterConfig], option: str) -> None:
    code, output = run(f"--model x {option}")
    assert (code, served) == (2, [])
    name = option.split()[0]
    assert re.search(rf"{name}( .*)? is not supported: \w.{{10}}", output), output


def test_all_refusals_are_told_at_once(served: list[ClusterConfig]) -> None:
    code, output = run("--model x --tensor-parallel-size 8 --reasoning-parser ernie-x1 --trust-remote-code")
    assert code == 2 and output.count("is not supported") == 2 and "--trust-remote-code" not in output


def test_two_models_are_one_too_many(served: list[ClusterConfig]) -> None:
    assert run("/models/x --model /models/x")[0] == 0
    code, output = run("/models/x --model /models/y")
    assert code == 2 and "--model /models/y" in output


def test_each_option_is_listed_once_and_says_one_thing() -> None:
    names = Counter([option.name for option in FOREIGN_OPTIONS]) + Counter(list(flag_parameters()))
    assert [name for name, count in names.items() if count > 1] == []
    for option in FOREIGN_OPTIONS:
        assert sum(map(bool, (option.becomes, option.notice, option.instead))) == 1, option.name
        assert not option.neutral or option.instead, option.name
    every = " ".join((FASTDEPLOY, FASTDEPLOY_REFUSED))
    flags = {flag.replace("-", "_").lstrip("_") for flag in re.findall(r"--[a-z0-9_-]+", every)}
    assert flags <= names.keys()


@pytest.mark.parametrize("value", [*OFF, "None", "False", None, False])
def test_a_value_that_asks_for_nothing_is_never_refused(value: object) -> None:
    settled = settle([(ForeignOption(name="x_y", instead="do that"), value)], prefix="--")
    assert not settled.refusals and not settled.notices and not settled.ours


def test_the_help_shows_our_options_only() -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    shown = set(re.findall(r"--([a-z][a-z-]+)", result.output))
    assert {"model", "metrics-port", "max-model-len", "kv-cache-bytes"} <= shown
    foreign = {option.name.replace("_", "-") for option in FOREIGN_OPTIONS} - {"router"}
    assert not shown & foreign
    assert result.output.count("\n") < 160
