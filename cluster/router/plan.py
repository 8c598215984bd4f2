"""What one HTTP request asks of the cluster, decided before anything is sent: prompts, limits, seeds, deadline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import RequestError
from cluster.router.openai.chat import ChatRequest
from cluster.router.openai.completions import CompletionRequest
from cluster.router.openai.sampling import draw_seeds
from engine.request import SamplingParams

MAX_TIMEOUT_MS = 3_600_000
# tokens x n x prompts of one HTTP request may not exceed this many whole contexts
MAX_CONTEXTS_PER_REQUEST = 32
# no token of a usual vocabulary is longer, so a text of more bytes than this x context can't fit
MAX_BYTES_PER_TOKEN = 256
# prompt tokens x (1 + alternatives) x n of one HTTP request: 20 MB of JSON; 1 MB where it is written on the event loop
MAX_SCORES = 1 << 18
MAX_STREAMED_SCORES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One Submit per prompt. `prompts` are int32 little-endian; `deadline` is monotonic seconds.

    `echo` has the prompts' texts where answers begin with them. Lower `priority` is sooner. `label` is the client's.
    """

    request_id: str
    prompts: tuple[bytes, ...]
    params: SamplingParams
    seeds: tuple[tuple[int, ...], ...]
    deadline: float
    echo: tuple[str, ...] = ()
    cache_salt: bytes = b""
    priority: int = 0
    label: str = ""

    @property
    def shows_prompt(self) -> bool:
        """Whether answers say something of their prompts."""
        return bool(self.echo) or self.params.prompt_logprobs is not None

    @property
    def num_choices(self) -> int:
        """Choices of the whole answer."""
        return len(self.prompts) * self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt in self.prompts) // 4

    def sub_id(self, index: int) -> str:
        """The cluster's request id of a prompt; unique, of fixed form, never the client's."""
        return self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"


def parse_timeout(value: str | None, default_s: float) -> float:
    """Seconds from the header x-neap-timeout-ms. Raises RequestError invalid_value."""
    if value is None:
        return default_s
    if not value.isascii() or not value.isdigit() or len(value) > 9 or not 1 <= int(value) <= MAX_TIMEOUT_MS:
        raise RequestError(
            "invalid_value", f"x-neap-timeout-ms must be in [1, {MAX_TIMEOUT_MS}].", param="x-neap-timeout-ms"
        )
    return int(value) / 1000


def check_cost(
    request: ChatRequest | CompletionRequest, sizes: Sequence[tuple[int, bool]], max_model_len: int, param: str
) -> None:
    """Refuse, before any work, what can't fit. `sizes`: (length, whether in tokens; else in characters) per prompt.

    Raises RequestError context_length_exceeded, or invalid_value for too much in one request.
    """
    asked = request.asked_tokens[1] if request.asked_tokens else 1
    total = 0
    for size, in_tokens in sizes:
        at_least = size if in_tokens else -(-size // MAX_BYTES_PER_TOKEN)
        if at_least >= max_model_len:
            raise too_long(size, max_model_len, param, "tokens" if in_tokens else "characters")
        total += (at_least + max(asked, 1)) * max(request.n, 1)
    if total > MAX_CONTEXTS_PER_REQUEST * max_model_len:
        raise RequestError(
            "invalid_value",
            f"Prompts x n x tokens is more than {MAX_CONTEXTS_PER_REQUEST} contexts in one request.",
            param="n" if request.n > 1 else param,
        )


def too_long(size: int, max_model_len: int, param: str, unit: str = "tokens") -> RequestError:
    """The prompt alone fills the context."""
    return RequestError(
        "context_length_exceeded",
        f"The prompt has {size} {unit}; the model's context is {max_model_len} tokens, answer included.",
        param=param,
    )


def fit_tokens(
    request: ChatRequest | CompletionRequest, params: SamplingParams, num_prompt_tokens: int, max_model_len: int
) -> SamplingParams:
    """Settle max_tokens: what was asked, if it fits; a default shrinks to what fits.

    Raises RequestError context_length_exceeded.
    """
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise too_long(num_prompt_tokens, max_model_len, param)
    explicit = request.max_tokens is not None or (isinstance(request, ChatRequest) and request.asked_tokens is not None)
    if explicit and params.max_tokens is not None and params.max_tokens > room:
        raise RequestError(
            "context_length_exceeded",
            f"The prompt has {num_prompt_tokens} tokens and {params.max_tokens} are asked for; "
            f"the model's context is {max_model_len} tokens.",
            param=request.asked_tokens[0] if request.asked_tokens else param,
        )
    if params.min_tokens > room:
        raise RequestError("context_length_exceeded", "min_tokens does not fit the context.", param="min_tokens")
    if params.max_tokens is not None and params.max_tokens <= room:
        return params  # as it mostly is, and a copy would be checked all over again
    return replace(params, max_tokens=room)


def make_plan(
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    request_id: str,
    max_model_len: int,
    deadline: float,
    echo: Sequence[str] = (),
) -> Plan:
    """The plan of a checked, tokenised request. Raises RequestError context_length_exceeded."""
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    check_cost(request, [(len(prompt), True) for prompt in prompts], max_model_len, param)
    _check_scores(request, prompts, params)
    longest = max(len(prompt) for prompt in prompts)
    return Plan(
        request_id=request_id,
        prompts=tuple(np.asarray(prompt, dtype="<i4").tobytes() for prompt in prompts),
        params=fit_tokens(request, params, longest, max_model_len),
        seeds=tuple(draw_seeds(params) for _ in prompts),
        deadline=deadline,
        echo=tuple(echo),
        cache_salt=(request.cache_salt or "").encode(),
        priority=request.priority,
        label=request.request_id or "",
    )


def _check_scores(
    request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> None:
    """Bound what prompt logprobs take in memory and on the event loop."""
    if params.prompt_logprobs is None:
        return
    count = sum(len(prompt) for prompt in prompts) * (1 + params.prompt_logprobs) * params.n
    limit = MAX_STREAMED_SCORES if request.stream else MAX_SCORES
    if count > limit:
        how = " in a stream" if request.stream else ""
        raise RequestError(
            "invalid_value",
            f"Prompt tokens x (1 + alternatives) x n may be at most {limit}{how}, and are {count}.",
            param=request.scores_param,
        )
