"""The load generator's connection against scripted servers: nothing is lost, nothing is taken for what it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.bench.answer_text import read_answer
from cluster.bench.load import Question, Target, run_closed, run_open
from cluster.bench.stream import Reply, StreamConnection
from tests.cluster.bench.conftest import DONE, HEAD, chunked, scripted, token

LAST = b"0\r\n\r\n"


def reply_to(*parts: bytes, keep: bool = True) -> Reply:
    async def main() -> Reply:
        async with scripted(lambda _: parts, pause_s=0.005) as target:
            question = Question(request=target.post("/v1/completions", {"prompt": "x"}), keep=keep)
            return (await run_closed(target, [question], 1, timeout_s=20))[0]

    return asyncio.run(main())


def test_events_are_counted_however_the_bytes_are_cut() -> None:
    whole = HEAD + chunked(token("a") + token("b"), token("c"), DONE) + LAST
    for at in range(1, len(whole)):
        reply = asyncio.run(_fed(whole[:at], whole[at:]))
        assert (reply.num_events, reply.error, reply.status) == (3, "", 200), at


async def _fed(*parts: bytes) -> Reply:
    """What a connection makes of these bytes, arriving in these pieces."""

    class Wire(asyncio.Transport):
        def write(self, data: object) -> None:
            loop = asyncio.get_running_loop()
            for part in parts:
                loop.call_soon(connection.data_received, part)

        def is_closing(self) -> bool:
            return False

        def abort(self) -> None:
            return

    connection = StreamConnection()
    connection.connection_made(Wire())
    return await connection.ask(b"GET", keep=True, timeout_s=20)


def test_the_texts_of_a_kept_answer_are_read_event_by_event() -> None:
    reply = reply_to(HEAD, chunked(token("a") + token("b")), chunked(token("c") + DONE) + LAST)
    assert read_answer(reply.raw).pieces == ("a", "b", "c")
    assert 0 < reply.first_s <= reply.last_s


def test_text_that_looks_like_an_event_is_none() -> None:
    reply = reply_to(HEAD, chunked(token('data: {\\"a') + DONE) + LAST)
    assert reply.num_events == 1


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ((HEAD + chunked(token("a")), b""), "cut off"),
        ((HEAD + chunked(token("a")) + LAST,), "no [DONE]"),
        ((b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}",), "HTTP 429"),
        ((b"HTTP/1.1 503 Busy\r\nConnection: close\r\n\r\n{}", b""), "HTTP 503"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",), "no stream"),
        ((b"nonsense\r\n\r\n", b""), "HTTP -1"),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_failure_is_named(parts: Sequence[bytes], error: str, keep: bool) -> None:
    assert reply_to(*parts, keep=keep).error == error


def test_a_server_that_says_nothing_is_a_timeout() -> None:
    async def main() -> Reply:
        async with scripted(lambda _: (HEAD,)) as target:
            question = Question(request=target.post("/", {}))
            return (await run_closed(target, [question], 1, timeout_s=0.1))[0]

    assert asyncio.run(main()).error == "timeout"


def test_after_a_failure_the_rest_is_asked_on_a_new_connection() -> None:
    good = (HEAD + chunked(token("a"), DONE) + LAST,)

    async def main() -> list[str]:
        async with scripted(lambda n: (HEAD, b"") if n == 1 else good) as target:
            questions = [Question(request=target.post("/", {})) for _ in range(4)]
            return [reply.error for reply in await run_closed(target, questions, 1, timeout_s=20)]

    assert asyncio.run(main()) == ["", "cut off", "", ""]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Eight requests are due before the first answer can be complete, and each counts from when it was due."""
    slow = [HEAD, *[chunked(token("a"))] * 4, chunked(DONE) + LAST]

    async def main() -> None:
        async with scripted(lambda _: slow, pause_s=0.05) as target:
            questions = [Question(request=target.post("/", {}), keep=True, at_s=0.01 * n) for n in range(8)]
            replies, lateness_s = await run_open(target, questions, timeout_s=20)
            assert [reply.error for reply in replies] == [""] * 8
            assert all(reply.last_s >= 0.15 for reply in replies)
            assert lateness_s >= 0

    asyncio.run(main())


def test_nobody_at_the_port_is_a_failure_of_each_request() -> None:
    target = Target(host="127.0.0.1", port=1)
    questions = [Question(request=b"", at_s=0.0)] * 2
    assert all(r.error.startswith("connect") for r in asyncio.run(run_closed(target, questions, 2)))
    assert all(r.error.startswith("connect") for r in asyncio.run(run_open(target, questions))[0])
