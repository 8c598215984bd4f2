"""`neap chat`: a conversation in a terminal, streamed. With piped input it answers once, plainly."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cluster.cli.status import error_words
from cluster.control.router_client import RouterClient, RouterError

_PROMPT = "> "


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What every request carries; empty or None: left to the server."""

    model: str
    system: str
    max_tokens: int
    temperature: float | None


@dataclass(kw_only=True)
class _Answer:
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0


def chat(client: RouterClient, options: ChatOptions) -> int:
    """Talk until the input ends. Returns the exit code. Raises RouterError when the server can't be talked to."""
    model = options.model or served_model(client)
    messages: list[dict[str, str]] = [{"role": "system", "content": options.system}] if options.system else []
    if not sys.stdin.isatty():
        messages.append({"role": "user", "content": sys.stdin.read()})
        _stream(client, request_body(model, messages, options))
        print()
        return 0
    console = Console(stderr=True)
    console.print(f"{model} at {client.url}. Ctrl-C stops an answer, ctrl-D ends.", style="dim", highlight=False)
    while True:
        try:
            line = input(_PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line.strip():
            messages.append({"role": "user", "content": line})
            _turn(client, request_body(model, messages, options), messages, console)


def _turn(client: RouterClient, body: dict[str, Any], messages: list[dict[str, str]], console: Console) -> None:
    """One question and its answer; an answer that failed or was stopped takes its question back."""
    started = time.monotonic()
    try:
        answer = _stream(client, body)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
        messages.pop()
        return
    except RouterError as error:
        console.print(f"\n{error}", style="red", markup=False, highlight=False)
        messages.pop()
        return
    messages.append({"role": "assistant", "content": answer.text})
    seconds = time.monotonic() - started
    note = f"{answer.num_tokens} tokens, {answer.num_tokens / seconds:.1f}/s"
    print()
    console.print(
        note + (", cut at max_tokens" if answer.finish_reason == "length" else ""), style="dim", highlight=False
    )


def served_model(client: RouterClient) -> str:
    """The model that the router serves now. Raises RouterError."""
    code, body = client.get("/v1/models")
    if code != 200:
        raise RouterError(error_words(code, body))
    if not body.get("data"):
        raise RouterError("the router serves no model now; `neap status` says why")
    return str(body["data"][0]["id"])


def request_body(model: str, messages: list[dict[str, str]], options: ChatOptions) -> dict[str, Any]:
    """The body of a streamed chat completion."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": options.max_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return body


def _stream(client: RouterClient, body: dict[str, Any]) -> _Answer:
    """Print the answer as it comes. Raises RouterError if it ends with an error or without [DONE]."""
    answer = _Answer()
    for event in client.stream("/v1/chat/completions", body):
        if "error" in event:
            raise RouterError(error_words(200, event))
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            answer.text += piece
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
        if event.get("usage"):
            answer.num_tokens = event["usage"]["completion_tokens"]
    return answer


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab: a model must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
