"""POST /tokenize and /detokenize, in vLLM's form: what a prompt or a conversation is in tokens, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from cluster.errors import RequestError, UnavailableError
from cluster.router.body import parse_object, read_body
from cluster.router.openai.chat import ROLES, parse_chat
from cluster.router.openai.fields import validate
from cluster.router.openai.prompts import encode_turns
from cluster.router.openai.sampling import check_token_ids
from cluster.router.service import RouterService
from engine.text.tokenizer import Tokenizer

_Model = TypeVar("_Model", bound=BaseModel)
_OF_CHAT = ("messages", "add_generation_prompt", "chat_template_kwargs", "model")


class TokenizeRequest(BaseModel):
    """Either `prompt` or `messages`. Without `model`: the one that is served."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids. Without `model`: the one that is served."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


async def tokenize(http: Request, service: RouterService) -> bytes:
    """JSON: count, max_model_len, tokens, token_strs (null unless asked for). Raises NeapError."""
    text, max_model_len = _ready(service)
    request = await _read(http, service, TokenizeRequest, "tokenize")
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("invalid_value", "Give either prompt or messages.", param="prompt")
    return await service.off_loop(partial(_tokenized, text, request, max_model_len))


def _tokenized(text: Tokenizer, request: TokenizeRequest, max_model_len: int) -> bytes:
    """Runs in a text thread: a body may hold millions of tokens."""
    token_ids = _encode(text, request)
    pieces = [text.token_bytes.piece(one) for one in token_ids] if request.return_token_strs else None
    return orjson.dumps(
        {
            "count": len(token_ids),
            "max_model_len": max_model_len,
            "tokens": token_ids,
            "token_strs": None if pieces is None else [piece.decode("utf-8", "replace") for piece in pieces],
        }
    )


async def detokenize(http: Request, service: RouterService) -> bytes:
    """JSON: the text of some ids, special tokens included. Raises NeapError."""
    text, _ = _ready(service)
    request = await _read(http, service, DetokenizeRequest, "detokenize")
    return await service.off_loop(partial(_detokenized, text, request, service.limits().vocab_size))


def _detokenized(text: Tokenizer, request: DetokenizeRequest, vocab_size: int) -> bytes:
    check_token_ids(request.tokens, vocab_size, "tokens")
    return orjson.dumps({"prompt": text.decode(request.tokens, skip_special_tokens=False)})


def _ready(service: RouterService) -> tuple[Tokenizer, int]:
    service.check_open()
    if service.text is None:
        raise UnavailableError("model_not_ready", retry_after_s=2.0)
    return service.text, service.limits().max_model_len


async def _read(http: Request, service: RouterService, model: type[_Model], endpoint: str) -> _Model:
    with service.bodies.share() as take:
        body = await read_body(http.scope, http.receive, service.spec.max_body_bytes, take)
        parse: Callable[[], _Model] = partial(_parse, body, model, endpoint)
        request = await service.off_loop(parse)
    name: str | None = getattr(request, "model", None)
    if name is not None:
        service.check_model(name)
    return request


def _parse(body: bytes, model: type[_Model], endpoint: str) -> _Model:
    return validate(model, parse_object(body), endpoint)


def _encode(text: Tokenizer, request: TokenizeRequest) -> list[int]:
    """Raises RequestError."""
    try:
        if request.prompt is not None:
            added = True if request.add_special_tokens is None else request.add_special_tokens
            return text.encode(request.prompt, add_special_tokens=added)
        if request.add_special_tokens:
            message = "A chat template writes its own special tokens."
            raise RequestError("unsupported_parameter", message, param="add_special_tokens")
        chat = parse_chat(_chat_fields(request))
        turns = [{"role": ROLES[turn.role], "content": turn.content} for turn in chat.messages]
        return encode_turns(
            text,
            turns,
            switches=chat.chat_template_kwargs or {},
            add_generation_prompt=chat.add_generation_prompt,
        )
    except ValueError:
        what = "messages" if request.prompt is None else "prompt"
        raise RequestError("invalid_value", f"The {what} can't be tokenised.", param=what) from None


def _chat_fields(request: TokenizeRequest) -> Mapping[str, Any]:
    fields = {name: value for name in _OF_CHAT if (value := getattr(request, name)) is not None}
    return {"model": "", **fields}
