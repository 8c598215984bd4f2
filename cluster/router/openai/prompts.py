"""A request's text becomes token ids, in text threads: chat template, truncation, what an echo repeats, bad words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import RequestError
from cluster.router.openai.chat import ROLES, ChatRequest
from cluster.router.openai.completions import CompletionRequest
from engine.request import SamplingParams
from engine.text.bad_words import bad_token_sequences
from engine.text.chat_template import SwitchError
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids per prompt; `echo` has their texts where the answer is to begin with them."""

    prompts: list[list[int]]
    echo: tuple[str, ...] = ()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()


def tokens_to_keep(request: ChatRequest | CompletionRequest, params: SamplingParams, max_model_len: int) -> int | None:
    """What truncate_prompt_tokens leaves of a longer prompt, from its end; None: everything. -1: room for an answer."""
    keep = params.truncate_prompt_tokens
    if keep is None:
        return None
    if keep == -1:
        keep = max_model_len - (params.max_tokens or 1)
    if not 1 <= keep < max_model_len:
        raise RequestError(
            "invalid_value",
            f"truncate_prompt_tokens must leave room for an answer in the context of {max_model_len} tokens.",
            param="truncate_prompt_tokens",
        )
    return keep


def encode(text: Tokenizer, request: ChatRequest | CompletionRequest, keep: int | None) -> Encoded:
    """All token ids that a request needs. Raises RequestError."""
    prompts = _encode_prompts(text, request)
    if not all(prompts):
        raise RequestError("invalid_value", "The prompt has no tokens.", param=_param(request))
    echo: tuple[str, ...] = ()
    if isinstance(request, CompletionRequest) and request.echo:
        echo = tuple(_echoed(text, *pair, keep) for pair in zip(request.prompts, prompts, strict=True))
    if keep is not None:
        prompts = [prompt[-keep:] for prompt in prompts]
    return Encoded(prompts=prompts, echo=echo, bad_token_sequences=_bad_sequences(text, request))


def _encode_prompts(text: Tokenizer, request: ChatRequest | CompletionRequest) -> list[list[int]]:
    try:
        if isinstance(request, ChatRequest):
            return [
                encode_turns(
                    text,
                    [{"role": ROLES[turn.role], "content": turn.content} for turn in request.messages],
                    switches=request.chat_template_kwargs or {},
                    add_generation_prompt=request.add_generation_prompt,
                )
            ]
        return [text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
    except ValueError:
        # the words of a template or a tokenizer are not of our catalogue
        message = "The model's chat template does not accept these messages."
        if not isinstance(request, ChatRequest):
            message = "The prompt can't be tokenised."
        raise RequestError("invalid_value", message, param=_param(request)) from None


def encode_turns(
    text: Tokenizer, turns: list[dict[str, str]], *, switches: Mapping[str, object], add_generation_prompt: bool
) -> list[int]:
    """A conversation's token ids. Raises RequestError for switches, ValueError for messages."""
    try:
        checked = text.template.check_switches(switches)
    except SwitchError as error:
        code = "invalid_value" if error.known else "unsupported_parameter"
        param = f"chat_template_kwargs.{error.name[:64]}"
        raise RequestError(code, f"{error}.", param=param) from None
    return text.encode_chat(turns, add_generation_prompt=add_generation_prompt, extra=checked)


def _echoed(text: Tokenizer, given: str | list[int], token_ids: list[int], keep: int | None) -> str:
    """The text as it was given, or what the tokens read as where there is none or only a part of it counts."""
    if isinstance(given, str) and (keep is None or len(token_ids) <= keep):
        return given
    return text.decode(token_ids if keep is None else token_ids[-keep:], skip_special_tokens=False)


def _bad_sequences(text: Tokenizer, request: ChatRequest | CompletionRequest) -> tuple[tuple[int, ...], ...]:
    try:
        return bad_token_sequences(text, request.bad_words or ())
    except ValueError:
        raise RequestError("invalid_value", "A bad word can't be tokenised.", param="bad_words") from None


def _param(request: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"
