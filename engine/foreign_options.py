"""Options of FastDeploy's and vLLM's engines that users bring along, and what becomes of each here.

Every option stands in exactly one row: it becomes one of ours, it has no meaning here (one notice), or it is not built
yet (refused by name, with what can be done instead; its neutral values ask for nothing). `LLM(...)` and the command
line (cluster/config/foreign_options.py adds the servers' options) read the same rows. Options with our own names
(max_model_len, max_num_seqs, block_size, dtype, enable_prefix_caching, ...) are EngineConfig's and stand there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OFF = ("none", "null", "false", "")  # values that ask for nothing, whatever the option


@dataclass(frozen=True, kw_only=True)
class ForeignOption:
    """One row. Exactly one of `becomes` (our option), `notice` (why it means nothing) and `instead` (refused) is set.

    `neutral`: lower-case values of a refused option that ask for what is the case anyway. `is_switch`: no value follows
    on the command line. `aliases`: its short forms there.
    """

    name: str
    becomes: str = ""
    notice: str = ""
    instead: str = ""
    neutral: tuple[str, ...] = ()
    is_switch: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Settled:
    """What became of some options: ours, "name (why)" of those without meaning, and lines for those refused."""

    ours: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def settle(given: Iterable[tuple[ForeignOption, object]], prefix: str = "") -> Settled:
    """Decide about options that were given. `prefix` goes before names in messages ("--" on a command line)."""
    settled = Settled()
    for option, value in given:
        shown = prefix + (option.name.replace("_", "-") if prefix else option.name)
        text = str(value).strip().lower()
        if text in OFF and not option.becomes:
            continue
        if option.becomes:
            settled.ours[option.becomes] = value
        elif option.notice:
            settled.notices.append(f"{shown} ({option.notice})")
        elif text not in option.neutral:
            given_value = "" if option.is_switch else f" {value}"
            settled.refusals.append(f"{shown}{given_value} is not supported: {option.instead}")
    return settled


def our_value(name: str, value: Any) -> Any:
    """A value of one of our options as others write it: dtype half and float."""
    return DTYPES.get(value, value) if name == "dtype" and isinstance(value, str) else value


DTYPES = {"half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32", "bf16": "bfloat16"}
_ONE_RANK = "there is one rank per worker yet; more workers share the load: --set pools.1.workers=N"
_KV_MEMORY = "KV memory is set in bytes: kv_cache_bytes"
_FULL_WEIGHTS = "weights run as the checkpoint has them (bf16, fp16, fp32); leave it out"
_CHUNKED = "prompts always go in chunks of bounded time: max_step_ms"


def _maps(name: str, becomes: str, **more: Any) -> ForeignOption:
    return ForeignOption(name=name, becomes=becomes, **more)


def _ignored(name: str, why: str, **more: Any) -> ForeignOption:
    return ForeignOption(name=name, notice=why, **more)


def _refused(name: str, instead: str, *neutral: str, **more: Any) -> ForeignOption:
    return ForeignOption(name=name, instead=instead, neutral=neutral, **more)


ENGINE_OPTIONS: tuple[ForeignOption, ...] = (
    # our options under another name
    _maps("max_num_batched_tokens", "max_batched_tokens"),
    _maps("kv_cache_memory_bytes", "kv_cache_bytes"),
    # parallelism
    _refused("tensor_parallel_size", _ONE_RANK, "1", aliases=("-tp",)),
    _refused("pipeline_parallel_size", _ONE_RANK, "1", aliases=("-pp",)),
    _refused("data_parallel_size", "give the decode pool more workers: --set pools.1.workers=N", "1", aliases=("-dp",)),
    _refused("enable_expert_parallel", _ONE_RANK, is_switch=True),
    _refused("num_redundant_experts", "experts are not spread over ranks yet; leave it out", "0"),
    _ignored("disable_custom_all_reduce", "one rank per worker reduces nothing", is_switch=True),
    # weights
    _refused("quantization", _FULL_WEIGHTS, aliases=("-q",)),
    _refused("load_format", "safetensors are read by themselves; leave it out", "auto", "safetensors"),
    _ignored("load_choices", "both safetensors layouts are recognised by themselves"),
    _ignored("trust_remote_code", "no code is ever taken from a checkpoint", is_switch=True),
    _refused("tokenizer", "put the tokenizer's files into the checkpoint folder"),
    _ignored("tokenizer_mode", "the checkpoint's tokenizer.json or tokenizer.model decides"),
    _refused("skip_tokenizer_init", "the router needs the tokenizer", is_switch=True),
    _refused("hf_overrides", "edit the checkpoint's config.json"),
    _refused("dynamic_load_weight", "weights are loaded once at start; restart the workers", is_switch=True),
    _ignored("lm_head_fp32", "logits are float32 always", is_switch=True),
    _refused("enable_lora", "merge the adapter into the checkpoint", is_switch=True),
    _refused("cpu_offload_gb", "weights stay where they compute; leave it out", "0", "0.0"),
    # KV memory
    _ignored("gpu_memory_utilization", _KV_MEMORY),
    _ignored("kv_cache_ratio", "prompts and answers share one pool of blocks"),
    _ignored("static_decode_blocks", "prompts and answers share one pool of blocks"),
    _ignored("num_gpu_blocks_override", _KV_MEMORY),
    _ignored("swap_space", "there is no tier in host memory; preempted requests are computed again"),
    _refused("kv_cache_dtype", "KV is kept in the dtype of the weights; leave it out", "auto"),
    _ignored("prefix_caching_hash_algo", "blocks are named by sha256"),
    # scheduling
    _ignored("enable_chunked_prefill", _CHUNKED, is_switch=True),
    _ignored("max_num_partial_prefills", _CHUNKED),
    _ignored("max_long_partial_prefills", _CHUNKED),
    _ignored("long_prefill_token_threshold", _CHUNKED),
    _ignored("scheduling_policy", "requests always go by priority, then arrival"),
    _ignored("num_scheduler_steps", "see steps_in_flight"),
    _ignored("async_scheduling", "see steps_in_flight", is_switch=True),
    _refused("speculative_config", "there are no drafts yet; the texts would be the same, leave it out"),
    # kernels
    _ignored("enforce_eager", "there are no captured graphs on CPU", is_switch=True),
    _ignored("graph_optimization_config", "there are no captured graphs on CPU"),
    _ignored("compilation_config", "there are no captured graphs on CPU"),
    _ignored("max_seq_len_to_capture", "there are no captured graphs on CPU"),
    _ignored("use_cudagraph", "there are no captured graphs on CPU", is_switch=True),
    _refused("plas_attention_config", "attention is exact over the whole context; leave it out"),
    _refused("moba_attention_config", "attention is exact over the whole context; leave it out"),
    # what answers may hold
    _ignored("enable_logprob", "every request may ask for logprobs", is_switch=True),
    _ignored("max_logprobs", "20 alternatives at most"),
    _refused("logprobs_mode", "logprobs are of the raw logits; leave it out", "raw_logprobs"),
    _refused("guided_decoding_backend", "structured output is not built yet; leave it out", "off", "auto"),
    _refused("structured_outputs_config", "structured output is not built yet; leave it out"),
    _refused("reasoning_parser", "thinking stays in the answer's text yet; leave it out"),
    _refused("enable_mm", "only text is served yet", is_switch=True),
    _ignored("limit_mm_per_prompt", "only text is served"),
    _ignored("mm_processor_kwargs", "only text is served"),
    _refused("logits_processors", "requests have bad_words, allowed_token_ids and logit_bias; leave it out"),
    _refused("early_stop_config", "answers end at stop strings, stop tokens and max_tokens; leave it out"),
    _refused("enable_early_stop", "answers end at stop strings, stop tokens and max_tokens", is_switch=True),
    _refused("task", "the model generates; leave it out", "generate", "auto"),
    _refused("runner", "the model generates; leave it out", "generate", "auto"),
    _ignored("disable_log_stats", "see /metrics", is_switch=True),
)


def translate(options: Mapping[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of `LLM`: ours (`known`), translated where they are others'; and notices.

    Raises ValueError for one that is refused or that nobody knows.
    """
    rows = {option.name: option for option in ENGINE_OPTIONS}
    names = (name for name in sorted(options) if name not in known and name not in rows)
    if (unknown := next(names, None)) is not None:
        raise ValueError(f"unknown option {unknown!r}; the options are: {', '.join(sorted(known))}")
    settled = settle((rows[name], value) for name, value in options.items() if name not in known)
    if settled.refusals:
        raise ValueError("; ".join(settled.refusals))
    ours = {name: our_value(name, value) for name, value in options.items() if name in known}
    return {**settled.ours, **ours}, settled.notices
