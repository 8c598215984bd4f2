"""The shell around the pure dispatcher: links, timers, and who gets what arrives.

The registry's map says where workers are; a link says whether one lives, and reconnects by itself. So a worker that
leaves the map keeps its link while that stands. When the registry is silent, the last map holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from cluster.metrics import RouterMetrics
from cluster.router.effects import Deliver, DeliverScores, DropLink, Ended, Progress, RouterEffect, Submit, ToWorker
from cluster.types import Entry, Heartbeat, RouterMessage, WorkerInfo

MAX_WORKERS = 4096

log = logging.getLogger("neap.router")

Receive = Callable[[Deliver | DeliverScores | Progress | Ended], None]


class Link(Protocol):
    """A connection to one worker that reconnects by itself (rpc/link.py). on_welcome and on_down alternate."""

    def start(self) -> None:
        """Begin to connect; the events follow."""
        ...

    def send(self, message: RouterMessage) -> None:
        """Put a message into the outbox."""
        ...

    def drop(self, reason: str) -> None:
        """Break the connection now; it connects anew."""
        ...

    async def close(self) -> None:
        """Break the connection for good."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinkEvents:
    """What a link tells, on the event loop's thread. The str is the worker's id."""

    on_welcome: Callable[[WorkerInfo], None]
    on_heartbeat: Callable[[Heartbeat], None]
    on_entries: Callable[[str, tuple[Entry, ...]], None]
    on_down: Callable[[str], None]


Connect = Callable[[WorkerInfo, LinkEvents], Link]


class DispatcherLike(Protocol):
    """The calls of router/dispatch.py (see effects.py)."""

    def on_submit(self, now: float, submit: Submit) -> Iterable[RouterEffect]: ...
    def on_cancel(self, now: float, request_id: str) -> Iterable[RouterEffect]: ...
    def on_worker_up(self, now: float, info: WorkerInfo) -> Iterable[RouterEffect]: ...
    def on_worker_down(self, now: float, worker_id: str) -> Iterable[RouterEffect]: ...
    def on_heartbeat(self, now: float, heartbeat: Heartbeat) -> Iterable[RouterEffect]: ...
    def on_entries(self, now: float, worker_id: str, entries: tuple[Entry, ...]) -> Iterable[RouterEffect]: ...
    def on_timer(self, now: float) -> Iterable[RouterEffect]: ...
    def next_timer(self) -> float | None: ...


@dataclass(kw_only=True)
class Peer:
    """A worker as this router knows it. `beat` is None until its first heartbeat over the present link."""

    info: WorkerInfo
    link: Link
    up: bool = False
    beat: Heartbeat | None = None
    beat_at: float = 0.0
    in_map: bool = True


class WorkerLinks:
    """Implements call.Cluster. Everything runs on one event loop."""

    def __init__(
        self, dispatcher: DispatcherLike, connect: Connect, *, metrics: RouterMetrics, clock: Callable[[], float]
    ):
        self._dispatcher = dispatcher
        self._connect = connect
        self._metrics = metrics
        self._clock = clock
        self._peers: dict[str, Peer] = {}
        self._receivers: dict[str, Receive] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._one_ended = asyncio.Event()
        self.map_seen = False

    # ---- requests (call.Cluster)

    def submit(self, submit: Submit, receive: Receive) -> None:
        """Run a request; its effects come to `receive`, none after `cancel`."""
        self._receivers[submit.request_id] = receive
        self._perform(self._dispatcher.on_submit(self._clock(), submit))

    def cancel(self, request_id: str) -> None:
        """Drop a request now. Unknown ids are ignored."""
        if self._receivers.pop(request_id, None) is not None:
            self._one_ended.set()
            self._perform(self._dispatcher.on_cancel(self._clock(), request_id))

    @property
    def num_requests(self) -> int:
        """Requests handed to the dispatcher that have not ended."""
        return len(self._receivers)

    async def wait_for_end(self, timeout_s: float) -> None:
        """Until some request ends, or the time is up."""
        self._one_ended.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._one_ended.wait(), timeout_s)

    def fail_all(self, code: str) -> None:
        """End every request with a code of the catalogue (shut-down)."""
        for request_id, receive in list(self._receivers.items()):
            self.cancel(request_id)
            receive(Ended(request_id=request_id, code=code))

    # ---- workers

    def peers(self) -> list[Peer]:
        """Every known worker, by id."""
        return [self._peers[worker_id] for worker_id in sorted(self._peers)]

    async def follow(self, maps: AsyncIterator[tuple[WorkerInfo, ...]]) -> None:
        """Follow the registry for ever."""
        async for workers in maps:
            self.on_map(workers)

    def on_map(self, workers: tuple[WorkerInfo, ...]) -> None:
        """Connect to new workers and new incarnations; forget dead ones that left the map."""
        self.map_seen = True
        named = {info.worker_id: info for info in workers[:MAX_WORKERS]}
        for worker_id, peer in list(self._peers.items()):
            peer.in_map = worker_id in named
            if not peer.in_map and not peer.up:
                self._forget(worker_id)
        for worker_id, info in named.items():
            known = self._peers.get(worker_id)
            if known is not None and known.info.address != info.address:
                self._forget(worker_id)
                known = None
            if known is None:
                self._open(info)
            elif not known.up:
                known.info = info

    def _open(self, info: WorkerInfo) -> None:
        worker_id = info.worker_id
        events = LinkEvents(
            on_welcome=lambda welcome: self._welcome(worker_id, link, welcome),
            on_heartbeat=lambda beat: self._heartbeat(worker_id, link, beat),
            on_entries=lambda _, entries: self._entries(worker_id, link, entries),
            on_down=lambda _: self._down(worker_id, link),
        )
        link = self._connect(info, events)
        self._peers[worker_id] = Peer(info=info, link=link)
        link.start()

    def _forget(self, worker_id: str) -> None:
        """Close a worker's link for good, and tell the dispatcher if it stood."""
        peer = self._peers.pop(worker_id)
        task = asyncio.get_running_loop().create_task(peer.link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._tell_down(worker_id, peer)

    def _peer(self, worker_id: str, link: Link) -> Peer | None:
        """The peer if `link` is still its link: what an old link says does not count."""
        peer = self._peers.get(worker_id)
        return peer if peer is not None and peer.link is link else None

    def _welcome(self, worker_id: str, link: Link, info: WorkerInfo) -> None:
        peer = self._peer(worker_id, link)
        if peer is None:
            return
        if info.worker_id != worker_id:  # an address that was given to another worker since
            link.drop(f"{info.worker_id} answers at the address of {worker_id}")
            return
        log.info("link to %s is up (%s, epoch %d)", worker_id, info.role, info.epoch)
        peer.info, peer.up = info, True
        self._perform(self._dispatcher.on_worker_up(self._clock(), info))

    def _heartbeat(self, worker_id: str, link: Link, beat: Heartbeat) -> None:
        peer = self._peer(worker_id, link)
        if peer is None or not peer.up:
            return
        now = self._clock()
        peer.info, peer.beat, peer.beat_at = beat.info, beat, now
        self._metrics.on_heartbeat(beat)
        self._perform(self._dispatcher.on_heartbeat(now, beat))

    def _entries(self, worker_id: str, link: Link, entries: tuple[Entry, ...]) -> None:
        peer = self._peer(worker_id, link)
        if peer is not None and peer.up:
            self._perform(self._dispatcher.on_entries(self._clock(), worker_id, entries))

    def _down(self, worker_id: str, link: Link) -> None:
        peer = self._peer(worker_id, link)
        if peer is None:
            return
        self._tell_down(worker_id, peer)
        if not peer.in_map and not self._closed:
            self._forget(worker_id)

    def _tell_down(self, worker_id: str, peer: Peer) -> None:
        was_up, peer.up, peer.beat = peer.up, False, None
        if was_up:
            log.warning("link to %s is down", worker_id)
            self._metrics.on_worker_down(worker_id)
            self._perform(self._dispatcher.on_worker_down(self._clock(), worker_id))

    # ---- effects and time

    def _perform(self, effects: Iterable[RouterEffect]) -> None:
        for effect in effects:
            if isinstance(effect, ToWorker):
                peer = self._peers.get(effect.worker_id)
                if peer is not None:  # else its on_worker_down is on the way
                    peer.link.send(effect.message)
            elif isinstance(effect, Deliver):
                self._hand_over(effect.tokens.request_id, effect)
            elif isinstance(effect, Progress):
                self._hand_over(effect.request_id, effect)
            elif isinstance(effect, DeliverScores):
                self._hand_over(effect.scores.request_id, effect)
            elif isinstance(effect, Ended):
                if effect.code is not None:
                    level = logging.INFO if effect.code == "deadline_exceeded" else logging.WARNING
                    log.log(level, "request %s failed: %s %s", effect.request_id, effect.code, effect.message)
                self._hand_over(effect.request_id, effect)
                self._receivers.pop(effect.request_id, None)
                self._one_ended.set()
            else:
                self._drop(effect)  # its on_down comes from the link's own task, after these effects
        self._arm()

    def _hand_over(self, request_id: str, effect: Deliver | DeliverScores | Progress | Ended) -> None:
        receive = self._receivers.get(request_id)
        if receive is None:
            return
        try:
            receive(effect)
        except Exception:
            # a fault in one request's answer must not break the link, and with it everybody's
            log.exception("request %s: its answer failed", request_id)
            asyncio.get_running_loop().call_soon(self.cancel, request_id)
            if not isinstance(effect, Ended):
                receive(Ended(request_id=request_id, code="internal_error"))

    def _drop(self, effect: DropLink) -> None:
        peer = self._peers.get(effect.worker_id)
        if peer is not None:
            log.warning("link to %s is dropped: %s", effect.worker_id, effect.reason)
            peer.link.drop(effect.reason)

    def _arm(self) -> None:
        """Keep one timer that is never later than the dispatcher wants; one that fires early just arms again."""
        at = self._dispatcher.next_timer()
        if at is None or self._closed or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        delay = max(at - self._clock(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock()
        at = self._dispatcher.next_timer()
        if at is not None and at <= now:
            self._perform(self._dispatcher.on_timer(now))
        else:
            self._arm()

    async def close(self) -> None:
        """Break every link."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for worker_id in list(self._peers):
            self._forget(worker_id)
        await asyncio.gather(*self._closing, return_exceptions=True)
