"""Faults that wait for their moment: each order names a kind and a stage, and strikes when a request is there.

Kinds, and what they do (D the decode worker of the request at that stage, P its source, R its router; in the phase of a
switch D is the worker that switches and P another one):

    D crashes, P crashes         SIGKILL; the supervisor starts it again 0.05 to 1.5 s later
    D's rank stands, P's         0.3 to 2.5 s, now and then for longer than the 10 s after which it is given up
    D stopped, P stopped         SIGSTOP of the whole worker, SIGCONT 0.3 to 4 s later
    partition D-R, D-P           nothing arrives either way for 0.3 to 3.5 s; what was sent arrives afterwards
    one-way partition            the same in one direction of one of these pairs
    link broken                  the connection of D and R is reset; both live
    delays                       everything from and to D takes up to 50 ms longer for 0.5 s
    overtaking                   one connection of D is held for up to 0.4 s while the others go on
    duplicates                   for 0.5 s Dispatch, Abort, Release, Taken, Switch and batches of entries come twice
    R lags, D lags               the loop of the router, or of D's network side, does not run for 1.1 to 2.5 s
    registry forgets, rolls back its map is empty, or 0.2 to 1 s old, for 0.5 or 1.5 s
    R crashes                    its clients are gone with it; another router starts
    late write                   D's copies of the next 0.2 s land 0.3 to 2.5 s late; the request's client may leave
    corruption                   one of corruption.KINDS hits the next piece or copy that it fits
    poison                       whichever worker runs this request crashes when it comes to this stage, every time
    controller crashes           in the phases of a switch; another one starts 0.5 s later

TCP carries no message twice, so "duplicates" stand for what a sender does that asks again without knowing whether the
first message came; every receiver must be able to take it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from cluster.sim.cluster import SimCluster
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.corruption import Corruptor
from cluster.sim.process import SimProcess
from cluster.sim.router import SimRouter
from cluster.sim.stages import PHASES, REQUEST_STAGES, STAGES, Moment
from cluster.sim.worker import SimWorker
from cluster.types import AbortRequest, Dispatch, FetchTaken, Release, SwitchRequest

DETECTED_S = 3.5  # keepalive, the slowest of what finds a broken peer
LONG_STAND_S = 13.0
MAX_POISONED = 3  # crashes by one request; two end it, but one may look like mere silence (behind a partition)
_TWICE = (Dispatch, AbortRequest, Release, FetchTaken, SwitchRequest, tuple)

KINDS = (
    "D crashes",
    "P crashes",
    "D's rank stands",
    "P's rank stands",
    "D stopped",
    "P stopped",
    "partition D-R",
    "partition D-P",
    "one-way partition",
    "link broken",
    "delays",
    "overtaking",
    "duplicates",
    "R lags",
    "D lags",
    "registry forgets",
    "registry rolls back",
    "R crashes",
    "late write",
    "corruption",
    "poison",
    "controller crashes",
)


def makes_sense(kind: str, stage: str) -> bool:
    """Whether the table has this cell."""
    if kind == "controller crashes":
        return stage in PHASES
    if kind in ("late write", "corruption", "poison"):
        return stage in REQUEST_STAGES and stage != "done"
    return True


CELLS = tuple((kind, stage) for stage in STAGES for kind in KINDS if makes_sense(kind, stage))


@dataclass(kw_only=True, eq=False)
class Order:
    """One fault to come. After `fallback_at` any stage will do."""

    kind: str
    stage: str
    not_before: float
    fallback_at: float


class Crashing(Protocol):
    """The controller, as far as faults go."""

    def crash(self, restart_after_s: float) -> None:
        """It dies; another one starts."""
        ...


class Chaos:
    """Carries out orders. `struck` counts the cells; `calm_at` is when the last fault is over and found."""

    def __init__(
        self,
        sim: SimCluster,
        rng: Random,
        orders: Sequence[Order],
        *,
        corruptor: Corruptor,
        controller: Crashing,
        disturbed: Callable[[str], None],
        report: Callable[[str], None],
    ) -> None:
        self.struck: Counter[tuple[str, str]] = Counter()
        self.satisfied = False  # no moment is wanted any more
        self.calm_at = 0.0
        self.stands_since: float | None = None  # a rank that is given up before it goes on
        self._sim = sim
        self._rng = rng
        self._orders = list(orders)
        self._sought = {order.stage for order in orders}
        self._fallback_at = min([order.fallback_at for order in orders], default=0.0)
        self._corruptor = corruptor
        self._controller = controller
        self._disturbed = disturbed
        self._report = report
        self._poisoned: dict[tuple[str, str], int] = {}
        self._crashed: set[tuple[str, str]] = set()  # (poison, incarnation)
        self._late_until: dict[str, float] = {}
        self._twice_until = 0.0
        self._num_pending = 0
        sim.faults.copy_s = self._copy_s

    def is_poison(self, request_id: str) -> bool:
        """Whether this request crashes whoever runs it."""
        return any(request_id == poisoned for poisoned, _ in self._poisoned)

    # ---- moments

    def seeks(self, stage: str, at: float) -> bool:
        """Whether `on_moment` may have something to do at a moment of this stage at that time."""
        return stage in self._sought or at >= self._fallback_at or not self._orders

    def on_moment(self, moment: Moment) -> None:
        """Strike with the first order that waited for this."""
        if self._poisoned and (left := self._poisoned.get((moment.request_id, moment.stage), 0)):
            self._crash_again(moment, left)
        if not self._orders:
            self.satisfied = not self._poisoned and not self._num_pending
            return
        now = self._sim.clock.now
        for order in self._orders:
            if now < order.not_before or (order.stage != moment.stage and now < order.fallback_at):
                continue
            if not makes_sense(order.kind, moment.stage) or not self._applies(order, moment):
                continue
            self._orders.remove(order)
            self._soon(lambda order=order: self._strike(order.kind, moment))  # type: ignore[misc]
            return

    def _crash_again(self, moment: Moment, left: int) -> None:
        worker = self._sim.live_worker(moment.worker_id)
        if worker is None or (moment.request_id, worker.incarnation) in self._crashed:
            return  # another choice of it came to the same stage
        self._crashed.add((moment.request_id, worker.incarnation))
        self._poisoned[moment.request_id, moment.stage] = left - 1
        if left == 1:
            self._report(f"{moment.request_id} crashes worker after worker")
        self._soon(lambda: self._kill(moment.worker_id))

    def _applies(self, order: Order, moment: Moment) -> bool:
        return moment.worker_id in self._sim.workers and self._sim.live_worker(moment.worker_id) is not None

    def _soon(self, run: Callable[[], None]) -> None:
        """After the effects that are being performed."""
        self._num_pending += 1

        def strike() -> None:
            self._num_pending -= 1
            run()

        self._sim.clock.at(self._sim.clock.now, strike)

    @property
    def num_left(self) -> int:
        """Orders that found no moment, and strikes under way."""
        return len(self._orders) + self._num_pending

    def _strike(self, kind: str, moment: Moment) -> None:
        self.struck[kind, moment.stage] += 1
        self._sim.journal.note(self._sim.clock.now, "chaos", f"{kind} at {moment.stage} of {moment.request_id}")
        _STRIKES[kind](self, moment)

    # ---- who

    def _d(self, moment: Moment) -> SimWorker:
        return self._sim.workers[moment.worker_id]

    def _p(self, moment: Moment) -> SimWorker:
        if moment.source_id in self._sim.workers and moment.source_id != moment.worker_id:
            return self._sim.workers[moment.source_id]
        others = sorted(name for name in self._sim.workers if name != moment.worker_id)
        return self._sim.workers[self._rng.choice(others)]

    def _r(self, moment: Moment) -> SimRouter:
        named = [
            router for router in self._sim.routers if router.router_id == moment.router_id and router.process.alive
        ]
        return (named or [router for router in self._sim.routers if router.process.alive])[0]

    def _over_at(self, for_s: float, detected_s: float = 0.5) -> None:
        self.calm_at = max(self.calm_at, self._sim.clock.now + for_s + detected_s)

    # ---- what

    def _kill(self, worker_id: str) -> None:
        worker = self._sim.live_worker(worker_id)
        if worker is None:
            return
        restart_s = self._rng.choice((0.05, 0.3, 1.5))
        self._disturbed(worker.incarnation)
        self._sim.kill_worker(worker_id, restart_after_s=restart_s)
        self._over_at(restart_s)

    def _stand(self, worker: SimWorker) -> None:
        for_s = self._rng.choice((0.3, 1.2, 1.2, 2.5, 2.5, LONG_STAND_S))
        if for_s == LONG_STAND_S:
            self.stands_since = self._sim.clock.now
        self._disturbed(worker.incarnation)
        self._sim.freeze_rank(worker.config.worker_id, for_s)
        self._over_at(for_s)

    def _stop(self, worker: SimWorker) -> None:
        for_s = self._rng.choice((0.3, 1.2, 2.2, 4.0))
        self._disturbed(worker.incarnation)
        self._sim.freeze_worker(worker.config.worker_id, for_s)
        self._over_at(for_s)

    def _part(self, one: SimProcess, two: SimProcess, workers: Sequence[SimWorker], *, both_ways: bool = True) -> None:
        for_s = self._rng.choice((0.3, 1.0, 2.2, 3.5))
        for worker in workers:
            self._disturbed(worker.incarnation)
        self._sim.journal.note(self._sim.clock.now, one.name, f"is cut off from {two.name} for {for_s} s")
        self._sim.network.partition(one.name, two.name, for_s, both_ways=both_ways)
        self._over_at(for_s, DETECTED_S)

    def _one_way(self, moment: Moment) -> None:
        d = self._d(moment)
        with_r = self._rng.random() < 0.5
        pair = [d.process, self._r(moment).process if with_r else self._p(moment).process]
        self._rng.shuffle(pair)
        one, two = pair
        self._part(one, two, [d] if with_r else [], both_ways=False)

    def _break(self, moment: Moment) -> None:
        self._disturbed(self._d(moment).incarnation)
        self._r(moment).break_link(moment.worker_id)
        self._over_at(0.0)

    def _slow(self, moment: Moment) -> None:
        self._sim.network.slow_down(moment.worker_id, self._rng.choice((0.005, 0.02, 0.05)), 0.5)
        self._over_at(0.5)

    def _overtake(self, moment: Moment) -> None:
        connections = self._sim.network.connections_of(self._d(moment).process)
        if connections:
            self._sim.network.hold(self._rng.choice(connections), self._rng.choice((0.01, 0.1, 0.4)))
        self._over_at(0.4)

    def _twice(self, moment: Moment) -> None:
        self._twice_until = self._sim.clock.now + 0.5
        self._sim.network.doubled = self._doubled

    def _doubled(self, sender: SimProcess, message: Any) -> bool:
        return self._sim.clock.now < self._twice_until and isinstance(message, _TWICE)

    def _lag(self, process: SimProcess) -> None:
        for_s = self._rng.choice((1.1, 1.8, 2.5))
        self._sim.lag(process, for_s)
        self._over_at(for_s)

    def _lag_d(self, moment: Moment) -> None:
        self._disturbed(self._d(moment).incarnation)
        self._lag(self._d(moment).process)

    def _registry(self, *, forget: bool) -> None:
        for_s = self._rng.choice((0.5, 1.5))
        registry = self._sim.registry
        if forget:
            registry.forget(for_s)
        else:
            registry.roll_back(self._rng.choice((0.2, 1.0)), for_s)
        self._over_at(for_s)

    def _kill_router(self, moment: Moment) -> None:
        router = self._r(moment)
        self._sim.kill_router(router)
        self._sim.start_router()
        self._over_at(0.0)

    def _late(self, moment: Moment) -> None:
        now = self._sim.clock.now
        self._late_until[moment.worker_id] = now + 0.2
        self._over_at(2.7)
        if self._rng.random() < 0.6:
            router = self._r(moment)
            if moment.request_id in router.results:
                self._sim.clock.after(self._rng.random() * 0.05, lambda: router.cancel(moment.request_id))

    def _copy_s(self, worker_id: str, piece: Any) -> float | None:
        if self._late_until and self._sim.clock.now < self._late_until.get(worker_id, 0.0):
            return self._rng.choice((0.3, 1.0, 2.5))
        return None

    def _poison(self, moment: Moment) -> None:
        self._poisoned[moment.request_id, moment.stage] = MAX_POISONED
        self._kill(moment.worker_id)

    def _corrupt(self, moment: Moment) -> None:
        self._corruptor.arm(self._rng.choice(CORRUPTIONS))

    def _crash_controller(self, moment: Moment) -> None:
        self._controller.crash(0.5)
        self._over_at(0.5)


_STRIKES: dict[str, Callable[[Chaos, Moment], None]] = {
    "D crashes": lambda chaos, moment: chaos._kill(moment.worker_id),
    "P crashes": lambda chaos, moment: chaos._kill(chaos._p(moment).config.worker_id),
    "D's rank stands": lambda chaos, moment: chaos._stand(chaos._d(moment)),
    "P's rank stands": lambda chaos, moment: chaos._stand(chaos._p(moment)),
    "D stopped": lambda chaos, moment: chaos._stop(chaos._d(moment)),
    "P stopped": lambda chaos, moment: chaos._stop(chaos._p(moment)),
    "partition D-R": lambda chaos, moment: chaos._part(
        chaos._d(moment).process, chaos._r(moment).process, [chaos._d(moment)]
    ),
    "partition D-P": lambda chaos, moment: chaos._part(chaos._d(moment).process, chaos._p(moment).process, []),
    "one-way partition": Chaos._one_way,
    "link broken": Chaos._break,
    "delays": Chaos._slow,
    "overtaking": Chaos._overtake,
    "duplicates": Chaos._twice,
    "R lags": lambda chaos, moment: chaos._lag(chaos._r(moment).process),
    "D lags": Chaos._lag_d,
    "registry forgets": lambda chaos, moment: chaos._registry(forget=True),
    "registry rolls back": lambda chaos, moment: chaos._registry(forget=False),
    "R crashes": Chaos._kill_router,
    "late write": Chaos._late,
    "corruption": Chaos._corrupt,
    "poison": Chaos._poison,
    "controller crashes": Chaos._crash_controller,
}
assert set(_STRIKES) == set(KINDS), "every kind has its strike"
