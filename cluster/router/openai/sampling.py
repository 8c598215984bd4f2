"""From a request's fields to the engine's SamplingParams, with the model's own defaults in between."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cluster.errors import RequestError
from cluster.router.openai.chat import ChatRequest
from cluster.router.openai.completions import CompletionRequest
from engine.request import MAX_ALLOWED_TOKEN_IDS, SEED_BITS, SamplingParams

_MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What holds where the client says nothing; from the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def load_defaults(model_path: Path) -> SamplingDefaults:
    """Read generation_config.json; without the file OpenAI's defaults hold. Raises ValueError naming file and field."""
    path = model_path / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        config = json.loads(path.read_bytes())
        names = [field.name for field in fields(SamplingDefaults)]
        given = {name: config[name] for name in names if config.get(name) is not None}
        SamplingParams(**given)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return SamplingDefaults(**given)


def sampling_params(
    request: ChatRequest | CompletionRequest,
    defaults: SamplingDefaults,
    vocab_size: int,
    eos_token_ids: tuple[int, ...] = (),
) -> SamplingParams:
    """Validated parameters; max_tokens as asked (None: what fits). Raises RequestError invalid_value.

    `eos_token_ids` are the tokenizer's: an engine knows only config.json's, and ERNIE's turns end in another one.
    """

    def given(name: str) -> float:
        value = getattr(request, name)
        return value if value is not None else getattr(defaults, name)  # type: ignore[no-any-return]

    asked = request.asked_tokens
    bias = _logit_bias(request.logit_bias or {}, vocab_size)
    for name in ("stop_token_ids", "allowed_token_ids", "bad_words_token_ids"):
        _check_ids(getattr(request, name) or [], vocab_size, name)
    try:
        return SamplingParams(
            n=request.n,
            temperature=given("temperature"),
            top_p=given("top_p"),
            top_k=int(given("top_k")),
            min_p=request.min_p or 0.0,
            repetition_penalty=given("repetition_penalty"),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=bias,
            stop=() if request.stop is None else request.stop if isinstance(request.stop, str) else tuple(request.stop),
            stop_token_ids=(*(request.stop_token_ids or ()), *(() if request.ignore_eos else eos_token_ids)),
            min_tokens=request.min_tokens,
            max_tokens=1 if _is_echo_only(request) else asked[1] if asked else None,
            ignore_eos=request.ignore_eos,
            seed=None if request.seed is None else request.seed & ((1 << SEED_BITS) - 1),
            logprobs=request.num_logprobs,
            skip_special_tokens=request.skip_special_tokens,
            bad_words=tuple(request.bad_words or ()),
            bad_token_sequences=tuple((token,) for token in request.bad_words_token_ids or ()),
            allowed_token_ids=tuple(request.allowed_token_ids or ()),
            prompt_logprobs=_prompt_logprobs(request),
            truncate_prompt_tokens=request.truncate_prompt_tokens,
        )
    except ValueError as error:
        raise _named(request, str(error)) from None


def _is_echo_only(request: ChatRequest | CompletionRequest) -> bool:
    return isinstance(request, CompletionRequest) and request.is_echo_only


def _prompt_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    """Alternatives per prompt token: as asked, or as an echo with logprobs shows them."""
    asked = [] if request.prompt_logprobs is None else [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        asked.append(request.logprobs)
    return max(asked, default=None)


def _named(request: ChatRequest | CompletionRequest, message: str) -> RequestError:
    """SamplingParams begins its messages with the field; here it gets the name that the client used."""
    name, _, rest = message.partition(" ")
    asked = request.asked_tokens
    if name == "max_tokens" and asked:
        name = asked[0]
    elif name == "logprobs" and isinstance(request, ChatRequest):
        name = "top_logprobs"
    elif name == "prompt_logprobs" and request.prompt_logprobs is None:
        name = "logprobs"
    elif name == "bad_words" and not request.bad_words:
        name = "bad_words_token_ids"
    return RequestError("invalid_value", f"{name} {rest}", param=name)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise RequestError("invalid_value", "logit_bias must be keyed by token ids.", param="logit_bias")
        result[int(key)] = value
    _check_ids(list(result), vocab_size, "logit_bias")
    return result


def _check_ids(ids: list[int], vocab_size: int, name: str) -> None:
    """Raises RequestError unless every id is a token of the vocabulary (0: not known yet, then int32 is the bound)."""
    limit = vocab_size or _MAX_TOKEN_ID
    if len(ids) > MAX_ALLOWED_TOKEN_IDS:  # before they are looked at, on the event loop
        raise RequestError("invalid_value", f"{name}: at most {MAX_ALLOWED_TOKEN_IDS} ids.", param=name)
    if any(not 0 <= token < limit for token in ids):
        raise RequestError("invalid_value", f"{name}: token ids must be in [0, {limit}).", param=name)


def with_bad_words(params: SamplingParams, sequences: tuple[tuple[int, ...], ...]) -> SamplingParams:
    """Add the tokens of bad words. Raises RequestError when a word has too many."""
    if not sequences:
        return params
    try:
        return replace(params, bad_token_sequences=(*params.bad_token_sequences, *sequences))
    except ValueError as error:
        raise RequestError("invalid_value", str(error), param="bad_words") from None


def check_token_ids(ids: list[int], vocab_size: int, param: str = "prompt") -> None:
    """Raises RequestError unless a prompt's ids are all in the vocabulary."""
    if ids:
        limit = vocab_size or _MAX_TOKEN_ID
        if min(ids) < 0 or max(ids) >= limit:
            raise RequestError("invalid_value", f"{param}: token ids must be in [0, {limit}).", param=param)


def draw_seeds(params: SamplingParams) -> tuple[int, ...]:
    """One seed per choice: the client's (the sampler's counter tells choices apart), or fresh ones."""
    if params.seed is not None:
        return (params.seed,) * params.n
    return tuple(secrets.randbits(SEED_BITS) for _ in range(params.n))
