"""The inbox: everything in order in one wake-up; a blocked client is bounded."""

from __future__ import annotations

import asyncio

from cluster.router.effects import Deliver, Ended
from cluster.router.inbox import Inbox
from cluster.types import Tokens


def deliver(position: int) -> Deliver:
    return Deliver(tokens=Tokens(request_id="r", attempt=1, choice=0, position=position, token_ids=(65,)))


def test_one_take_hands_over_all_that_has_come_in_order() -> None:
    async def run() -> None:
        inbox = Inbox(max_blocked_bytes=1000, on_overflow=lambda: None)
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.put(0, deliver(0))
        inbox.put(1, deliver(1))
        inbox.put(0, Ended(request_id="r"))
        assert await waiting == [(0, deliver(0)), (1, deliver(1)), (0, Ended(request_id="r"))]
        inbox.wake()
        assert await inbox.take() == []

    asyncio.run(run())


def test_only_what_arrives_while_the_client_blocks_counts() -> None:
    overflows: list[str] = []
    inbox = Inbox(max_blocked_bytes=2000, on_overflow=lambda: overflows.append("over"))
    for position in range(1000):
        inbox.put(0, deliver(position))
    assert overflows == []
    inbox.blocked(True)
    for position in range(1000):
        inbox.put(0, deliver(position))
    assert overflows == ["over"]  # once, and what comes later is dropped


def test_a_client_that_reads_slowly_but_reads_is_never_given_up() -> None:
    overflows: list[str] = []
    inbox = Inbox(max_blocked_bytes=2000, on_overflow=lambda: overflows.append("over"))
    for position in range(1000):
        inbox.blocked(True)
        inbox.put(0, deliver(position))
        inbox.blocked(False)
    assert overflows == []
