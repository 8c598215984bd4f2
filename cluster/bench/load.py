"""Drives a server: closed loop (so many at once) or open loop (at given times, whatever the server does)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.stream import Reply, StreamConnection, connect

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that speaks OpenAI's HTTP."""

    host: str
    port: int
    api_key: str = ""

    @property
    def url(self) -> str:
        """http://host:port."""
        return f"http://{self.host}:{self.port}"

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """A whole HTTP request, as bytes."""
        payload = json.dumps(body, separators=(",", ":")).encode()
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        return f"{head}{key}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request. `keep`: its answer's bytes are wanted; `at_s`: when to send it (open loop)."""

    request: bytes
    keep: bool = False
    at_s: float = 0.0


async def run_closed(
    target: Target,
    questions: Sequence[Question],
    concurrency: int,
    *,
    ramp_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
) -> list[Reply]:
    """Ask all of them, `concurrency` at once, each on a connection that is kept. Replies in the order of questions.

    The connections begin spread over `ramp_s`. Equal requests that begin together stay together in waves, and a wave
    uses the stages of a server one after another, which no real load does.
    """
    replies: list[Reply] = [Reply(error="not asked") for _ in questions]
    waiting = iter(range(len(questions)))

    async def work(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        connection: StreamConnection | None = None
        for index in waiting:
            question = questions[index]
            try:
                if connection is None or not connection.usable:
                    connection = await connect(target.host, target.port)
            except OSError as error:
                replies[index] = Reply(error=f"connect: {error.strerror or error}")
                continue
            replies[index] = await connection.ask(question.request, keep=question.keep, timeout_s=timeout_s)
        if connection is not None:
            connection.close()

    num_workers = min(concurrency, len(questions))
    await asyncio.gather(*(work(ramp_s * index / num_workers) for index in range(num_workers)))
    return replies


async def run_open(
    target: Target,
    questions: Sequence[Question],
    timeout_s: float = TIMEOUT_S,
    on_end: Callable[[], None] | None = None,
) -> tuple[list[Reply], float]:
    """Ask each at its time, on an idle connection or a new one. Replies in order, and by how much we were late (s).

    Times of a reply count from the moment it was due, so neither connecting nor a slow generator is hidden.
    """
    loop = asyncio.get_running_loop()
    idle: list[StreamConnection] = []
    replies: list[Reply] = [Reply(error="not asked") for _ in questions]
    latest = 0.0

    async def one(index: int) -> None:
        connection = idle.pop() if idle else None
        try:
            if connection is None or not connection.usable:
                connection = await connect(target.host, target.port)
        except OSError as error:
            replies[index] = Reply(error=f"connect: {error.strerror or error}")
            return
        question = questions[index]
        waited = loop.time() - started - question.at_s
        reply = await connection.ask(question.request, keep=question.keep, timeout_s=timeout_s)
        replies[index] = reply.later(waited)
        if connection.usable:
            idle.append(connection)
        if on_end is not None:
            on_end()

    started = loop.time()
    async with asyncio.TaskGroup() as group:
        for index, question in enumerate(questions):
            late = loop.time() - started - question.at_s
            if late < 0:
                await asyncio.sleep(-late)
                late = loop.time() - started - question.at_s
            latest = max(latest, late)
            group.create_task(one(index))
    for connection in idle:
        connection.close()
    return replies, latest
