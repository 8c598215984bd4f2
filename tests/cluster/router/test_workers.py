"""The shell around the dispatcher: which links are kept, whose words count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cluster.metrics import RouterMetrics
from cluster.router.effects import Deliver, DropLink, Ended, RouterEffect, Submit, ToWorker
from cluster.router.workers import LinkEvents, WorkerLinks
from cluster.types import AbortRequest, Heartbeat, RouterMessage, Tokens, WorkerInfo
from engine.request import SamplingParams


def info(worker_id: str = "d1", **changes: Any) -> WorkerInfo:
    base = WorkerInfo(worker_id=worker_id, incarnation="i1", epoch=1, role="decode", state="ready", address="a:1")
    return replace(base, **changes)


def submit(request_id: str) -> Submit:
    return Submit(request_id=request_id, prompt=b"", params=SamplingParams(), seeds=(1,), deadline=100.0)


def tokens(request_id: str) -> Deliver:
    return Deliver(tokens=Tokens(request_id=request_id, attempt=1, choice=0, position=0, token_ids=(5,)))


@dataclass
class FakeDispatcher:
    """Notes what it is told and returns what the test laid out for that call."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    answers: dict[str, list[RouterEffect]] = field(default_factory=dict)
    timer: float | None = None

    def _note(self, name: str, argument: Any) -> list[RouterEffect]:
        self.calls.append((name, argument))
        return self.answers.pop(name, [])

    def on_submit(self, now: float, submit: Submit) -> list[RouterEffect]:
        return self._note("submit", submit.request_id)

    def on_cancel(self, now: float, request_id: str) -> list[RouterEffect]:
        return self._note("cancel", request_id)

    def on_worker_up(self, now: float, info: WorkerInfo) -> list[RouterEffect]:
        return self._note("up", info.worker_id)

    def on_worker_down(self, now: float, worker_id: str) -> list[RouterEffect]:
        return self._note("down", worker_id)

    def on_heartbeat(self, now: float, heartbeat: Heartbeat) -> list[RouterEffect]:
        return self._note("beat", heartbeat.info.worker_id)

    def on_entries(self, now: float, worker_id: str, entries: Any) -> list[RouterEffect]:
        return self._note("entries", worker_id)

    def on_timer(self, now: float) -> list[RouterEffect]:
        self.timer = None
        return self._note("timer", None)

    def next_timer(self) -> float | None:
        return self.timer


@dataclass
class FakeLink:
    info: WorkerInfo
    events: LinkEvents
    sent: list[RouterMessage] = field(default_factory=list)
    dropped: str = ""
    closed: bool = False

    def start(self) -> None:
        return

    def send(self, message: RouterMessage) -> None:
        self.sent.append(message)

    def drop(self, reason: str) -> None:
        self.dropped = reason

    async def close(self) -> None:
        self.closed = True


@dataclass
class Setup:
    dispatcher: FakeDispatcher
    links: WorkerLinks
    made: list[FakeLink]


def on_loop(test: Callable[[Setup], Any]) -> Callable[[], None]:
    """Run a test inside an event loop."""

    def wrapped() -> None:
        async def run() -> None:
            dispatcher, made = FakeDispatcher(), list[FakeLink]()

            def connect(info: WorkerInfo, events: LinkEvents) -> FakeLink:
                made.append(FakeLink(info, events))
                return made[-1]

            clock = asyncio.get_running_loop().time
            links = WorkerLinks(dispatcher, connect, metrics=RouterMetrics(), clock=clock)
            await test(Setup(dispatcher, links, made))
            await links.close()

        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@on_loop
async def test_a_worker_counts_from_its_welcome_to_its_break(s: Setup) -> None:
    s.links.on_map((info(),))
    assert s.dispatcher.calls == []
    s.made[0].events.on_entries("d1", ())  # not welcome yet
    s.made[0].events.on_welcome(info())
    s.made[0].events.on_down("d1")
    assert s.dispatcher.calls == [("up", "d1"), ("down", "d1")]


@on_loop
async def test_a_link_outlives_the_registrys_entry_until_it_breaks(s: Setup) -> None:
    s.links.on_map((info(),))
    s.made[0].events.on_welcome(info())
    s.links.on_map(())
    assert [peer.up for peer in s.links.peers()] == [True]
    s.made[0].events.on_down("d1")
    assert s.links.peers() == []
    await asyncio.sleep(0)
    assert s.made[0].closed


@on_loop
async def test_a_worker_at_a_new_address_replaces_its_old_self(s: Setup) -> None:
    s.links.on_map((info(),))
    s.made[0].events.on_welcome(info())
    s.links.on_map((info(address="a:2", incarnation="i2"),))
    assert s.dispatcher.calls == [("up", "d1"), ("down", "d1")]
    s.made[1].events.on_welcome(info(address="a:2", incarnation="i2"))
    s.made[0].events.on_entries("d1", ())  # the old link has nothing to say any more
    s.made[0].events.on_down("d1")
    assert s.dispatcher.calls[2:] == [("up", "d1")]


@on_loop
async def test_the_same_map_again_changes_nothing(s: Setup) -> None:
    for _ in range(3):
        s.links.on_map((info(), info("p1", role="prefill", address="a:2")))
    assert len(s.made) == 2


@on_loop
async def test_effects_go_to_their_request_until_it_is_cancelled(s: Setup) -> None:
    got: list[Any] = []
    s.links.on_map((info(),))
    s.made[0].events.on_welcome(info())
    s.links.submit(submit("r1"), got.append)
    s.dispatcher.answers["entries"] = [tokens("r1"), tokens("unknown")]
    s.made[0].events.on_entries("d1", ())
    s.dispatcher.answers["cancel"] = [ToWorker(worker_id="d1", message=AbortRequest(request_id="r1", attempt=1))]
    s.links.cancel("r1")
    s.links.cancel("r1")
    s.dispatcher.answers["entries"] = [tokens("r1")]
    s.made[0].events.on_entries("d1", ())
    assert got == [tokens("r1")]
    assert s.made[0].sent == [AbortRequest(request_id="r1", attempt=1)]
    assert [call for call in s.dispatcher.calls if call[0] == "cancel"] == [("cancel", "r1")]


@on_loop
async def test_a_fault_in_one_answer_does_not_reach_the_link(s: Setup) -> None:
    seen: list[Any] = []

    def receive(effect: Any) -> None:
        seen.append(effect)
        if isinstance(effect, Deliver):
            raise RuntimeError("a bug in this answer")

    s.links.on_map((info(),))
    s.made[0].events.on_welcome(info())
    s.links.submit(submit("r1"), receive)
    s.dispatcher.answers["entries"] = [tokens("r1")]
    s.made[0].events.on_entries("d1", ())
    await asyncio.sleep(0.01)
    assert seen[-1] == Ended(request_id="r1", code="internal_error")
    assert ("cancel", "r1") in s.dispatcher.calls


@on_loop
async def test_a_distrusted_worker_loses_its_link(s: Setup) -> None:
    s.links.on_map((info(),))
    s.made[0].events.on_welcome(info())
    s.dispatcher.answers["beat"] = [DropLink(worker_id="d1", reason="hung")]
    s.made[0].events.on_heartbeat(Heartbeat(info=info()))
    assert s.made[0].dropped == "hung"


@on_loop
async def test_the_timer_is_called_when_it_is_due(s: Setup) -> None:
    s.dispatcher.timer = asyncio.get_running_loop().time() + 0.02
    s.links.submit(submit("r1"), lambda _: None)
    for _ in range(500):
        if ("timer", None) in s.dispatcher.calls:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("on_timer was not called")
