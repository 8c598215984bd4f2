"""Streams past ASGI: every event in order whatever arrives at once, and a client that blocks holds up nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.router.respond import ABORT, WRITER
from cluster.router.sse import DONE
from cluster.types import Tokens
from engine.request import FinishReason

Rigs = Callable[..., Any]
PATH = "/v1/completions"


@dataclass(kw_only=True)
class Client:
    """The far end of one connection: a stream.ChunkWriter and ASGI's channels. `open` False: it takes no more."""

    written: list[bytes] = field(default_factory=list)
    open: bool = True
    aborted: bool = False
    on_resume: Callable[[], None] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def write(self, body: bytes) -> bool:
        self.written.append(body)
        return self.open

    def resume(self) -> None:
        self.open = True
        assert self.on_resume is not None
        self.on_resume()

    def abort(self) -> None:
        self.aborted = True
        self.gone.set()

    @property
    def answer(self) -> bytes:
        return b"".join(self.written)

    def start(self, app: Any, **body: Any) -> None:
        sent = json.dumps({"model": "ernie-test", "prompt": "hi", "stream": True, "max_tokens": 400} | body).encode()
        messages = [{"type": "http.request", "body": sent, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                self.written.append(message["body"])

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
        self.task = asyncio.get_running_loop().create_task(
            app(scope | {WRITER: self, ABORT: self.abort}, receive, send), name="answer"
        )


def texts(answer: bytes) -> list[str]:
    """The text of each event."""
    events = [line[6:] for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
    return [json.loads(event)["choices"][0]["text"] for event in events]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


def say(r: Any, number: int, position: int, text: str, *, last: bool = False) -> None:
    """What a link that lags brings: several tokens of a request in one entry."""
    dispatch = r.decode.dispatched[number]
    entry = Tokens(
        request_id=dispatch.request_id,
        attempt=dispatch.attempt,
        choice=0,
        position=position,
        token_ids=tuple(r.decode.tokenizer.encode(text)),
        finish_reason=FinishReason.LENGTH if last else None,
        path="decode-only" if position == 0 else None,
    )
    r.decode.events.on_entries("decode-1", (entry,))


def run(rig: Rigs, test: Callable[[Any], Any], **changes: Any) -> None:
    async def main() -> None:
        async with rig(**changes) as r:
            r.behave(hang=True)  # the tests speak for the worker
            await test(r)
            assert r.links.num_requests == 0

    asyncio.run(main())


async def begun(r: Any, *clients: Client) -> None:
    for number, client in enumerate(clients):
        client.start(r.app)
        await until(lambda number=number: len(r.decode.dispatched) == number + 1)


def test_tokens_that_arrive_together_are_events_of_their_own(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        client = Client()
        await begun(r, client)
        say(r, 0, 0, "a")
        await until(lambda: client.written)
        say(r, 0, 1, "bcd")
        say(r, 0, 4, "ef")
        await until(lambda: len(client.written) == 2)  # both arrivals in one write
        say(r, 0, 6, "gh", last=True)
        assert client.task is not None
        await client.task
        assert texts(client.answer) == list("abcdefgh")
        assert client.answer.endswith(DONE)
        assert b'"finish_reason":"length"' in client.answer.split(b"\n\n")[-3]

    run(rig, test)


def test_a_plain_event_differs_from_the_others_in_its_text_only(rig: Rigs) -> None:
    """Plain events are cut from one template, which must not show: same keys, same escapes."""

    async def test(r: Any) -> None:
        client = Client()
        await begun(r, client)
        for position, text in enumerate(['"', "\\", "\n", "\x01", "\u2028"]):
            say(r, 0, position, text)
        say(r, 0, 7, "z", last=True)  # the last of them has three bytes, a token each
        assert client.task is not None
        await client.task
        events = [json.loads(line[6:]) for line in client.answer.split(b"\n\n") if line.startswith(b"data: {")]
        assert len({tuple(event) for event in events}) == 1
        assert len({tuple(event["choices"][0]) for event in events}) == 1
        assert texts(client.answer) == ['"', "\\", "\n", "\x01", "\u2028", "z"]

    run(rig, test)


def test_a_blocked_client_holds_up_nobody_and_misses_nothing(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        slow, quick = Client(), Client()
        await begun(r, slow, quick)
        for number in (0, 1):
            say(r, number, 0, "a")
        await until(lambda: slow.written and quick.written)
        slow.open = False
        for position in range(1, 60):
            for number in (0, 1):
                say(r, number, position, "b")
            await asyncio.sleep(0)
        say(r, 1, 60, "c", last=True)
        assert quick.task is not None and slow.task is not None
        await quick.task
        assert texts(quick.answer) == ["a", *"b" * 59, "c"]
        held = len(texts(slow.answer))
        assert held < 20 and not slow.task.done()  # what was written before it said no, and no more
        slow.resume()
        await until(lambda: len(texts(slow.answer)) == 60)
        say(r, 0, 60, "c", last=True)
        await slow.task
        assert texts(slow.answer) == texts(quick.answer)

    run(rig, test)


def test_what_is_kept_for_a_blocked_client_is_bounded(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        stuck, other = Client(), Client()
        await begun(r, stuck, other)
        for number in (0, 1):
            say(r, number, 0, "a")
        await until(lambda: stuck.written and other.written)
        stuck.open = False
        for position in range(1, 200):
            for number in (0, 1):
                say(r, number, position, "b")
            await asyncio.sleep(0)
        assert stuck.aborted and not other.aborted
        assert stuck.task is not None and other.task is not None
        await stuck.task
        assert [abort.request_id for abort in r.decode.aborted] == [r.decode.dispatched[0].request_id]
        say(r, 1, 200, "c", last=True)
        await other.task
        assert len(texts(other.answer)) == 201

    run(rig, test, stream_buffer_bytes=32 << 10)


def test_a_client_that_leaves_while_it_blocks_is_cancelled(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        client = Client()
        await begun(r, client)
        say(r, 0, 0, "a")
        await until(lambda: client.written)
        client.open = False
        say(r, 0, 1, "b")
        await asyncio.sleep(0.02)
        client.gone.set()
        assert client.task is not None
        await client.task
        assert len(r.decode.aborted) == 1 and not client.answer.endswith(DONE)

    run(rig, test)


def test_a_failure_after_the_head_is_an_error_event(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        client = Client()
        await begun(r, client)
        say(r, 0, 0, "a")
        await until(lambda: client.written)
        say(r, 0, 5, "b")  # a gap
        assert client.task is not None
        await client.task
        last = client.answer.split(b"\n\n")[-2]
        assert json.loads(last[6:])["error"]["code"] == "internal_error"

    run(rig, test)
