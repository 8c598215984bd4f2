"""Carries out plans and what people ask for: who may change its role now, the call, what came of it, in words.

    every interval_s   ask the routers for workers and traffic -> ObservationWindow -> Planner -> switches, if any
    by hand            the same checks, the same call (admin.py)

Nothing that matters is kept here. The worker runs a switch by itself and tells in its heartbeats what it is; a
controller that comes back asks the routers and goes on. One change per pool at a time; the last ready decode worker
is not let go, by nobody. After a change by hand the planner keeps still for a while, unless a worker is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.control.observation import Observation, ObservationWindow
from cluster.control.plan_words import switch_words
from cluster.control.planner import Plan, PlannedSwitch, Planner
from cluster.control.router_client import RouterClient
from cluster.control.router_view import look
from cluster.errors import RequestError, UnavailableError
from cluster.rpc.switch_client import SwitchCallError, call_switch
from cluster.spec import RolesSpec
from cluster.traffic import Traffic
from cluster.types import SwitchReply, SwitchRequest, WorkerInfo
from engine.config import Role

MAX_RECORDS = 32
MIN_PAUSE_S = 0.05
UNHEARD_S = 10.0
HAND_S = 60.0  # so long what people have changed is left as it is
log = logging.getLogger("neap.control")

Call = Callable[[str, SwitchRequest], Awaitable[SwitchReply]]


@dataclass(kw_only=True, eq=False)
class Record:
    """A switch, planned or asked for, and what came of it: `outcome` is SwitchReply's, "failed", or "" so far."""

    at: float
    worker_id: str
    role: Role | None
    why: str
    outcome: str = ""
    words: str = ""


class Roles:
    """The roles of one cluster. Everything runs on one event loop. `tell` gets one line for people per change."""

    def __init__(
        self,
        options: RolesSpec,
        *,
        routers: Callable[[], tuple[RouterClient, ...]],
        infos: Callable[[], tuple[WorkerInfo, ...]],
        wants_prefill: bool = False,
        needs_prefill: bool = False,
        tell: Callable[[str], None] = log.info,
        clock: Callable[[], float] = time.monotonic,
        call: Call = call_switch,
    ) -> None:
        self._options = options
        self._routers = routers
        self._infos = infos
        self._tell = tell
        self._clock = clock
        self._call = call
        self._planner = Planner(options)
        self._window = ObservationWindow(wants_prefill=wants_prefill, needs_prefill=needs_prefill)
        self._traffic = Traffic()
        self._changing: dict[str, str] = {}  # worker id -> pool
        self._tasks: set[asyncio.Task[None]] = set()
        self._came: dict[str, float] = {}  # by incarnation: when it was first seen in the registry,
        self._heard: set[str] = set()  # and who was ever heard
        self._hand_at = -math.inf
        self._hand_saw: frozenset[str] = frozenset()  # incarnations that were there then
        self._wake = asyncio.Event()
        self._plan = Plan()
        self._planned_at = clock()
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)

    # ---- by itself

    async def run(self) -> None:
        """Look, plan and change for ever."""
        while True:
            began = self._clock()
            self._wake.clear()
            try:
                await self.step()
            except Exception:  # a fault of the planner must not end what supervises the processes
                log.exception("no plan was made")
            took_s = self._clock() - began  # with very many workers; half of the time at most goes into looking
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(MIN_PAUSE_S, self._options.interval_s - took_s, took_s))

    def on_worker_lost(self, worker_id: str) -> None:
        """Its process is gone: what that means for the others is looked at now, not when its links have been missed."""
        self._window.on_worker_down(worker_id)
        self._wake.set()

    async def step(self) -> None:
        """One round; the changes that it begins go on by themselves."""
        await self.look()
        if not self._options.auto or self._changing:
            return
        self._planned_at = self._clock()
        observation = self._window.observe(self._planned_at, self._traffic)
        if unheard := self._unheard():
            self._plan = Plan(words=(f"Not heard from yet: {', '.join(unheard)}. Nothing is planned without them.",))
            return
        if self._is_in_hand(observation):
            ago_s = self._planned_at - self._hand_at
            self._plan = Plan(
                words=(f"A role was changed by hand {ago_s:.0f} s ago: left as it is for {HAND_S:.0f} s.",)
            )
            return
        self._plan = self._planner.plan(observation)
        for switch in self._plan.switches:
            task = asyncio.get_running_loop().create_task(self._carry_out(switch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _unheard(self) -> list[str]:
        """Ready workers that no router has spoken of since they came; they are waited for, but not for ever."""
        now, ready = self._clock(), [info for info in self._infos() if info.state == "ready"]
        here = {info.incarnation for info in ready}
        self._came = {name: self._came.get(name, now) for name in here}
        self._heard &= here
        late = {name for name, at in self._came.items() if name not in self._heard and now - at < UNHEARD_S}
        return sorted(info.worker_id for info in ready if info.incarnation in late)

    def _is_in_hand(self, observation: Observation) -> bool:
        here = {worker.info.incarnation for worker in observation.workers}
        return self._planned_at - self._hand_at < HAND_S and self._hand_saw <= here

    async def look(self) -> None:
        """Ask the routers how the workers are and what comes in."""
        view = await look(self._routers(), self._infos())
        now = self._clock()
        registered = {info.incarnation for info in self._infos()}  # one may have gone meanwhile
        for heard in view.heard:
            if heard.info.incarnation not in registered:
                continue
            self._heard.add(heard.info.incarnation)
            self._window.on_worker(now - heard.age_ms / 1000, heard.info, heard.load, heard.peers)
        if view.num_routers:
            self._traffic = view.traffic

    async def close(self) -> None:
        """Wait for no answer any more; the workers end what they have begun."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, planned: PlannedSwitch) -> None:
        info = self._info(planned.worker_id)
        if info is None or (info.incarnation, info.epoch) != (planned.incarnation, planned.epoch):
            return
        try:
            reply = await self._change(info, planned.role, planned.why)
        except (RequestError, UnavailableError) as error:
            log.info("%s to %s: %s", planned.worker_id, planned.role, error)
            return
        if reply.outcome == "switched":
            self._wake.set()  # there may be more to change

    # ---- by hand

    def workers(self) -> tuple[WorkerInfo, ...]:
        """All that are registered, as they were heard last, by id."""
        heard = {seen.info.incarnation: seen.info for seen in self._window.observe(self._clock()).workers}
        infos = (self._newer(info, heard.get(info.incarnation)) for info in self._infos())
        return tuple(sorted(infos, key=lambda info: info.worker_id))

    @property
    def auto(self) -> bool:
        """Whether plans are made and carried out."""
        return self._options.auto

    def now(self) -> float:
        """The clock of the records."""
        return self._clock()

    def plan(self) -> tuple[Plan, float]:
        """The last plan and how long ago it was made, in seconds."""
        return self._plan, self._clock() - self._planned_at

    async def switch(self, worker_id: str, role: Role) -> SwitchReply:
        """Change a worker's role. Raises RequestError or UnavailableError (errors.py: the admin API)."""
        return await self._by_hand(worker_id, role)

    async def drain(self, worker_id: str) -> SwitchReply:
        """Let a worker give everything away and take nothing more, until it is switched again. Raises like switch."""
        return await self._by_hand(worker_id, None)

    async def _by_hand(self, worker_id: str, role: Role | None) -> SwitchReply:
        await self.look()
        info = self._info(worker_id)
        if info is None:
            raise RequestError("worker_not_found", f"There is no worker {worker_id}.")
        reply = await self._change(info, role, "asked for")
        now = self._clock()
        self._hand_at = now
        self._hand_saw = frozenset(seen.info.incarnation for seen in self._window.observe(now).workers)
        fresh = reply.info
        if reply.outcome == "refused" and fresh.incarnation == info.incarnation and fresh.epoch != info.epoch:
            reply = await self._change(fresh, role, "asked for")  # it had changed since it was heard
        if reply.outcome == "refused":
            raise RequestError("switch_refused", f"{worker_id} refused: {reply.reason}.")
        if reply.outcome == "rolled_back":
            raise UnavailableError("switch_rolled_back", f"{worker_id} went back to {reply.info.role}: {reply.reason}.")
        return reply

    # ---- both

    def _info(self, worker_id: str) -> WorkerInfo | None:
        return next((info for info in self.workers() if info.worker_id == worker_id), None)

    @staticmethod
    def _newer(info: WorkerInfo, heard: WorkerInfo | None) -> WorkerInfo:
        return heard if heard is not None and heard.epoch >= info.epoch else info

    def _check(self, info: WorkerInfo, role: Role | None) -> None:
        """Raises RequestError if the change may not begin."""
        if info.pool in self._changing.values():
            busy = next(worker_id for worker_id, pool in self._changing.items() if pool == info.pool)
            raise RequestError("switch_under_way", f"{busy} of the same pool is changing; one at a time.")
        if role == "decode" or info.role != "decode" or info.state != "ready":
            return
        others = [
            other.worker_id
            for other in self.workers()
            if other.role == "decode" and other.state == "ready" and other.worker_id != info.worker_id
        ]
        if not any(worker_id not in self._changing for worker_id in others):
            raise RequestError(
                "last_decode_worker", f"{info.worker_id} is the last ready decode worker: nothing could answer then."
            )

    async def _change(self, info: WorkerInfo, role: Role | None, why: str) -> SwitchReply:
        """One change, to its end. Raises RequestError, and UnavailableError switch_unknown."""
        self._check(info, role)
        record = Record(at=self._clock(), worker_id=info.worker_id, role=role, why=why)
        self.records.append(record)
        self._changing[info.worker_id] = info.pool
        request = SwitchRequest(
            incarnation=info.incarnation,
            expected_epoch=info.epoch,
            role=role,
            timeout_ms=round(self._options.switch_timeout_s * 1000),
        )
        try:
            reply = await self._call(info.address, request)
        except SwitchCallError as error:
            record.outcome, record.words = "failed", f"{info.worker_id}: {error}"
            self._window.on_failed_switch(self._clock(), info.worker_id)
            self._tell(record.words)
            raise UnavailableError("switch_unknown", f"{error}.") from error
        finally:
            del self._changing[info.worker_id]
        record.outcome, record.words = reply.outcome, switch_words(reply)
        self._window.on_info(self._clock(), reply.info)
        if reply.outcome in ("refused", "rolled_back"):
            self._window.on_failed_switch(self._clock(), info.worker_id)
        self._tell(f"{record.words}; {why}" if why else record.words)
        return reply
