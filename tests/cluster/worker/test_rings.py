"""Rings: order, wrapping, fullness, size limits, wake-ups, and another process at the other end."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.worker.rings import (
    COMMAND_RING_BYTES,
    MessageTooLargeError,
    RingFds,
    RingReader,
    RingWriter,
    StatusPage,
    create_ring,
)

# many processes may share this machine's two cores
LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class RingPair:
    """Both ends of a ring in one process; closed together."""

    def __init__(self, capacity: int) -> None:
        fds = create_ring(capacity)
        self.writer = RingWriter(fds)
        self.reader = RingReader(RingFds(memory=os.dup(fds.memory), event=os.dup(fds.event)))

    def __enter__(self) -> RingPair:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
def small() -> Iterator[RingPair]:
    with RingPair(64) as pair:
        yield pair


def test_messages_arrive_in_order_over_many_wraps(small: RingPair) -> None:
    for i in range(200):
        message = bytes([i % 251]) * (i % 37)
        assert small.writer.try_send(message)
        assert small.reader.receive() == [message]


def test_a_full_ring_says_no_and_takes_more_once_read(small: RingPair) -> None:
    sent = 0
    while small.writer.try_send(b"0123456789"):
        sent += 1
    assert sent == 64 // 14
    assert small.reader.receive() == [b"0123456789"] * sent
    assert small.writer.try_send(b"again")
    assert small.reader.receive() == [b"again"]


def test_a_message_that_never_fits_is_an_error(small: RingPair) -> None:
    assert small.writer.try_send(b"x" * 60)
    with pytest.raises(MessageTooLargeError, match="61 bytes"):
        small.writer.try_send(b"x" * 61)


def test_a_prompt_of_131072_tokens_fits_the_command_ring() -> None:
    with RingPair(COMMAND_RING_BYTES) as pair:
        assert pair.writer.try_send(bytes(131_072 * 4 + 4096))
        assert len(pair.reader.receive()[0]) == 131_072 * 4 + 4096


def test_an_empty_ring_gives_nothing_and_times_out(small: RingPair) -> None:
    poll = select.poll()
    poll.register(small.reader, select.POLLIN)
    assert small.reader.receive() == []
    assert poll.poll(1) == []
    small.writer.try_send(b"a")
    assert poll.poll(1000)
    small.reader.receive()
    assert poll.poll(1) == []


def test_an_event_loop_is_woken(small: RingPair) -> None:
    async def run() -> list[bytes]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[list[bytes]] = loop.create_future()
        loop.add_reader(small.reader.fileno(), lambda: arrived.set_result(small.reader.receive()))
        loop.call_soon(small.writer.try_send, b"wake")
        try:
            return await asyncio.wait_for(arrived, 10)
        finally:
            loop.remove_reader(small.reader.fileno())

    assert asyncio.run(run()) == [b"wake"]


@LOADED
@given(st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=60))
def test_whatever_the_interleaving_nothing_is_lost_or_reordered(steps: list[bytes | None]) -> None:
    with RingPair(100) as pair:
        sent: list[bytes] = []
        got: list[bytes] = []
        for step in steps:
            if step is None:
                got += pair.reader.receive()
            elif pair.writer.try_send(step):
                sent.append(step)
        assert got + pair.reader.receive() == sent


_ECHO = """
import select, sys
from cluster.worker.rings import RingFds, RingReader, RingWriter
a, b, c, d = map(int, sys.argv[1:])
reader, writer = RingReader(RingFds(memory=a, event=b)), RingWriter(RingFds(memory=c, event=d))
poll = select.poll()
poll.register(reader, select.POLLIN)
left = 500
while left:
    poll.poll(10_000)
    for message in reader.receive():
        left -= 1
        while not writer.try_send(message):
            pass
assert "torch" not in sys.modules
"""


def test_another_process_echoes_everything() -> None:
    down, up = create_ring(4096), create_ring(4096)
    fds = (down.memory, down.event, up.memory, up.event)
    child = subprocess.Popen([sys.executable, "-c", _ECHO, *map(str, fds)], pass_fds=fds)
    writer, reader = RingWriter(down), RingReader(up)
    try:
        messages = [bytes([i % 256]) * (i % 97) for i in range(500)]
        waiting = list(messages)
        got: list[bytes] = []
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while len(got) < len(messages):
            while waiting and writer.try_send(waiting[0]):
                waiting.pop(0)
            poll.poll(10)
            got += reader.receive()
            assert child.poll() in (None, 0)
        assert got == messages
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        writer.close()
        reader.close()


def test_a_descriptor_that_is_no_ring_is_refused() -> None:
    ring = create_ring(4096)
    page = StatusPage.create()
    with pytest.raises(ValueError, match="not a ring"):
        RingReader(RingFds(memory=page.fd, event=ring.event))
    page.close()
    RingWriter(ring).close()


def test_the_status_page_counts_steps_and_knows_the_running_one() -> None:
    page = StatusPage.create()
    assert (page.step_count, page.step_age_ms()) == (0, 0)
    page.begin_step()
    assert page.step_age_ms() >= 1
    page.end_step()
    assert (page.step_count, page.step_age_ms()) == (1, 0)
    page.close()
