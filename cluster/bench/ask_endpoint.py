"""Asks an OpenAI-style endpoint the held-out questions, some at a time; a request that fails is an outcome like others.

Questions go to /v1/chat/completions. Those with tools go as text to /v1/completions, rendered with the embedded model's
chat template: the chat endpoint takes no tools yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from engine.evaluation.report import Outcome
from engine.text.chat_template import ChatTemplate
from engine.tiny.skills.example import Example
from engine.tiny.skills.rendering import own_template, prompt_text

_SHOWN_ERROR = 200  # characters of an answer that is an error
_MODELS_TIMEOUT_S = 10.0


class EndpointError(ValueError):
    """The endpoint can't be asked at all; the message is for people."""


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """`url` ends with /v1; an empty `model` is the first that the endpoint serves. `timeout_s`: of one request."""

    url: str
    model: str = ""
    api_key: str = ""
    max_tokens: int = 128
    concurrency: int = 16
    timeout_s: float = 120.0


def base_url(url: str) -> str:
    """http://host:port/v1, whether /v1 was given or not. Raises ValueError."""
    whole = (url if "//" in url else f"http://{url}").rstrip("/")
    if not whole.startswith(("http://", "https://")):
        raise ValueError("expected http://HOST:PORT/v1")
    return whole if whole.endswith("/v1") else f"{whole}/v1"


async def ask_endpoint(
    examples: Sequence[Example],
    options: AskOptions,
    tell: Callable[[str], None],
    transport: httpx2.AsyncBaseTransport | None = None,
) -> list[Outcome]:
    """An outcome per example, in their order. Raises EndpointError if it does not even tell its model."""
    template = own_template()
    turn = asyncio.Semaphore(options.concurrency)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with httpx2.AsyncClient(
        headers=headers,
        timeout=options.timeout_s,
        limits=httpx2.Limits(max_connections=options.concurrency),
        transport=transport,
        trust_env=False,
    ) as client:
        model = options.model or await _first_model(client, options.url)

        async def ask(index: int, example: Example) -> Outcome:
            async with turn:
                if index == 0 or examples[index - 1].skill != example.skill:
                    tell(example.skill)
                path, body = _request(example, template)
                body |= {"model": model, "temperature": 0.0, "max_tokens": options.max_tokens}
                try:
                    async with asyncio.timeout(options.timeout_s):
                        return _outcome(example, await client.post(f"{options.url}{path}", json=body))
                except TimeoutError:
                    return Outcome(example, error=f"no answer within {options.timeout_s:g} s")
                except httpx2.HTTPError as error:
                    return Outcome(example, error=f"{type(error).__name__}: {error}")

        return list(await asyncio.gather(*(ask(index, example) for index, example in enumerate(examples))))


async def _first_model(client: httpx2.AsyncClient, url: str) -> str:
    try:
        reply = await client.get(f"{url}/models", timeout=_MODELS_TIMEOUT_S)
        return str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{url}/models names no model: {type(error).__name__}: {error}") from error


def _request(example: Example, template: ChatTemplate) -> tuple[str, dict[str, Any]]:
    """Path and body, without what all requests have."""
    if example.tools:
        return "/completions", {"prompt": prompt_text(example, template)}
    body: dict[str, Any] = {"messages": list(example.messages[:-1])}
    if example.enable_thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": example.enable_thinking}
    return "/chat/completions", body


def _outcome(example: Example, reply: httpx2.Response) -> Outcome:
    if reply.status_code != 200:
        return Outcome(example, error=f"HTTP {reply.status_code}: {reply.text[:_SHOWN_ERROR]}")
    try:
        choice = reply.json()["choices"][0]
        if "text" in choice:
            return Outcome(example, text=str(choice["text"]))
        message = choice["message"]
        thought = message.get("reasoning_content") or ""
        text = str(message.get("content") or "")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Outcome(example, error=f"not a completion ({type(error).__name__}): {reply.text[:_SHOWN_ERROR]}")
    return Outcome(example, text=f"{thought}</think>{text}" if thought else text)
