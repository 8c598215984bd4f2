"""Which worker should change its role, and why: a pure function of an observation. No clock, no I/O, no memory.

1. `capacity.py` turns profiles and traffic into requests per second that each worker can do, in either role, within
   the TTFT and TPOT targets.
2. The *pressure* of a split is what comes over what it can do: 1 is all of it. Decode workers take over prompts that
   the prefill workers can't; so with D = decode capacity, R = usable prefill capacity and M = what the decode workers
   could prefill, of needs d and p per second (arrivals, and what is queued spread over the horizon):

       pressure = d / D                                 while the prefill workers keep up (p / R <= d / D)
                = (d / D + p / M) / (1 + R / M)         while they don't

3. Only while the pressure is above `act_at`, or a measured target is missed, is a change considered: from the side that
   has more to the one that has less, the workers in the order of what they bring there, less what they are worth where
   they are and what the change costs. The number of changes with the least pressure is the aim.
4. It is worth it if the aim lowers the pressure by more than `hysteresis` (and what chance alone would bring: half over
   the root of the number of requests seen), and the work that this saves within `horizon_s` is more than the changes
   cost. Then the first changes of it are planned: one per pool, `max_switches` in
   all, nobody who changed less than `min_role_s` ago; and none while others are under way.

Under constant traffic each plan lowers the pressure, of which there are finitely many, so the changes end; the dead
bands of 3 and 4 keep noise from undoing them. Two rules stand above this: one decode worker is always left ready, and
where there is no prefill worker, although there should be one, or no decode worker, one is made at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.control import plan_words as say
from cluster.control.capacity import Array, Capacity, Work, as_array, capacity_of
from cluster.control.observation import Observation, WorkerSeen
from cluster.control.split import Splits, held_rows, needs_of
from cluster.spec import RolesSpec
from engine.config import Role

MIN_REQUESTS = 8  # in the window, before anything is concluded from them
CHANCE = 0.5  # of the mean work per request, over the root of their number
TRANSITION_S = 12.0  # a worker that is longer on its way (drained by hand, or stuck) is waited for no more
RETRY_S = 4.0
TO_PREFILL_MS, TO_DECODE_MS = 250.0, 30.0  # what a switch takes itself, without what it moves

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class PlannedSwitch:
    """One change, fenced as it was observed. `why` is for people."""

    worker_id: str
    incarnation: str
    epoch: int
    role: Role
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to change now, the reasons in words, and what they rest on (requests per second; None: nothing known)."""

    switches: tuple[PlannedSwitch, ...] = ()
    words: tuple[str, ...] = ()
    pressure: float | None = None
    prefill_per_s: float | None = None
    decode_per_s: float | None = None


class Planner:
    """Plans by fixed options. One may be shared; nothing is kept between calls."""

    def __init__(self, options: RolesSpec) -> None:
        self._options = options

    def plan(self, observation: Observation) -> Plan:
        """What to change now, if anything."""
        ready = tuple([w for w in observation.workers if w.info.state == "ready"])
        others = [w for w in observation.workers if w.info.state != "ready"]
        moving = [w.info.worker_id for w in others if _is_moving(w)]
        if moving:
            return Plan(words=(f"{', '.join(moving)}: a change is under way; nothing else is planned meanwhile.",))
        if not ready:
            return Plan(words=("No worker is ready.",))
        options, work = self._options, Work.of(observation.traffic)
        capacity = None
        if work is not None:
            capacity = capacity_of(ready, work, ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
        scene = _Scene(observation, ready, capacity, options)
        if (missing := scene.missing_role()) is not None:
            return scene.make_one(missing)
        if len(ready) < 2:
            return Plan(words=("Fewer than two workers are ready: there is nothing to change.",))
        if work is None or observation.traffic.num_requests < MIN_REQUESTS:
            return Plan(words=(say.FEW_REQUESTS,))
        if capacity is None:
            return Plan(words=("No worker has measured its speed: nothing can be predicted.",))
        return _Relief(scene, capacity, observation, options).plan()


def _is_moving(worker: WorkerSeen) -> bool:
    return worker.info.state in ("draining", "switching", "verifying") and worker.since_state_s < TRANSITION_S


class _Scene:
    """The ready workers of an observation in a fixed order, and who of them may change. Arrays are in that order."""

    def __init__(
        self, observation: Observation, ready: tuple[WorkerSeen, ...], capacity: Capacity | None, options: RolesSpec
    ) -> None:
        self.ready = ready
        self.is_prefill = np.array([w.info.role == "prefill" for w in ready])
        self.num_prefill = int(self.is_prefill.sum())
        self.num_decode = len(ready) - self.num_prefill
        self.needs_prefill = observation.needs_prefill
        self._wants_prefill_ever = observation.wants_prefill or observation.needs_prefill
        self._capacity = capacity
        self._horizon_ms = options.horizon_s * 1000.0
        ones = np.ones(len(ready))
        self.speeds = (ones, ones)  # in prefill and in decode, over the mean of all
        if capacity is not None:
            self.speeds = (_over_mean(capacity.prefill), _over_mean(capacity.decode))
        self.cost_ms: dict[Role, Array] = _costs_ms(ready, capacity)

    def missing_role(self) -> Role | None:
        """A role that nobody has and somebody should."""
        if self.num_decode == 0:
            return "decode" if self.num_prefill > 1 or not self.needs_prefill else None
        if self.num_prefill == 0 and self.num_decode > 1 and self._wants_prefill(1.0):
            return "prefill"
        return None

    def make_one(self, role: Role) -> Plan:
        """Change the worker that suits best, if it didn't change, or refuse to, only just now."""
        order = self.order(role, min_role_s=RETRY_S)
        if not len(order):
            return Plan(words=(f"No {role} worker is ready; whoever could become one has tried a moment ago.",))
        index = int(order[0])
        why = f"no {role} worker is ready, and of the {len(self.ready)} others this one suits best"
        return Plan(switches=(self.switch(index, role, why),), words=(self.told(index, role, why),))

    def _wants_prefill(self, factor: float) -> bool:
        """Whether one worker at least should prefill: by the file, or as a prompt would hold up `factor` tokens."""
        capacity = self._capacity
        long = capacity is not None and capacity.typical_prefill_ms > factor * capacity.tpot_ms
        return self._wants_prefill_ever or long

    def spare(self, role: Role) -> int:
        """How many workers may change to `role` at most, so that the other side keeps what it must keep."""
        if role == "prefill":
            return max(0, self.num_decode - 1)
        return max(0, self.num_prefill - (1 if self._wants_prefill(0.5) else 0))

    def order(self, role: Role, *, min_role_s: float) -> Indices:
        """Who could change to `role`, best first: by what they bring there, are worth where they are, and cost."""
        side = self.is_prefill if role == "decode" else ~self.is_prefill
        index = np.flatnonzero(side & np.array([w.since_role_s >= min_role_s for w in self.ready]))
        return index[np.argsort(-self.worth(role)[index], kind="stable")]

    def worth(self, role: Role) -> Array:
        """By what workers are ordered that could change to `role`."""
        prefill, decode = self.speeds
        gain = prefill - decode if role == "prefill" else decode - prefill
        return gain - self.cost_ms[role] / self._horizon_ms

    def switch(self, index: int, role: Role, why: str) -> PlannedSwitch:
        """The change, fenced as the worker was observed."""
        info = self.ready[index].info
        return PlannedSwitch(
            worker_id=info.worker_id, incarnation=info.incarnation, epoch=info.epoch, role=role, why=why
        )

    def told(self, index: int, role: Role, why: str) -> str:
        """The change in words."""
        return f"{self.ready[index].info.worker_id} to {role}: {why}."


class _Relief:
    """Looks for changes that relieve the side that has too little."""

    def __init__(self, scene: _Scene, capacity: Capacity, observation: Observation, options: RolesSpec) -> None:
        self._scene = scene
        self._capacity = capacity
        self._observation = observation
        self._options = options
        self._splits = Splits(capacity, scene.is_prefill, may_spill=not scene.needs_prefill)
        self._now = self._splits.now()
        self._needs = held_rows(needs_of(observation, options.horizon_s), self._now, scene.ready, capacity)
        self._pressure = float(self._needs.pressure(self._now))
        self._least_gain = options.hysteresis + CHANCE / max(1, observation.traffic.num_requests) ** 0.5

    def plan(self) -> Plan:
        """The changes worth making, or why there are none."""
        decode, remote = (float(side) for side in self._needs.sides(self._now))
        role: Role = "prefill" if remote > decode else "decode"
        missed = say.missed(self._observation.traffic, self._capacity)
        if (quiet := self._is_quiet(role)) is not None:
            return self._told([*missed.values(), quiet])
        order = self._scene.order(role, min_role_s=self._options.min_role_s)[: self._scene.spare(role)]
        pressures = self._needs.pressure(self._splits.along(order))
        aim = int(np.argmin(pressures))
        chosen = self._first_of_each_pool(order[:aim])
        why_not = self._why_not(role, len(order), aim, float(pressures[aim]), order[:aim])
        if why_not is None and not float(self._needs.pressure(self._splits.after(chosen))) < self._pressure:
            why_not = "No change: the first one alone would make it worse."
        if why_not is not None:
            return self._swap() or self._told([*missed.values(), why_not])
        after = float(self._needs.pressure(self._splits.after(chosen)))
        pressed = (self._pressure, after, float(pressures[aim]))
        return self._told(
            [*missed.values()], [(int(index), role, self._why(int(index), role, pressed, aim)) for index in chosen]
        )

    def _is_quiet(self, role: Role) -> str | None:
        """In words, why there is no need to look for changes to `role`; None if there is.

        A target that is missed makes the planner look earlier, but only for more of that role, and not at half the
        pressure: what was missed in a burst that is over must not undo what the burst was met with.
        """
        at = self._options.act_at
        if role in say.missed(self._observation.traffic, self._capacity):
            at /= 2
        return None if self._pressure >= at else f"No change: the pressure is below {at:g}."

    def _why_not(self, role: Role, num_order: int, aim: int, best: float, changed: Indices) -> str | None:
        """In words, why the aim is not worth it; None if it is."""
        if not num_order:
            return f"No change: nobody can be spared to {role} now."
        if aim == 0 or best > self._pressure / (1.0 + self._least_gain):
            return say.little_gain(role, self._pressure, best, aim, self._least_gain)
        cost_ms = float(self._scene.cost_ms[role][changed].sum())
        saved_ms = self._saved_ms(best)
        return say.too_dear(saved_ms, cost_ms) if saved_ms <= cost_ms else None

    def _saved_ms(self, after: float) -> float:
        """Work saved within the horizon when the pressure falls to `after`, in milliseconds of workers' time."""
        share = 1.0 - after / self._pressure if np.isfinite(self._pressure) else 1.0
        return share * min(1.0, self._pressure) * len(self._scene.ready) * self._options.horizon_s * 1000.0

    def _why(self, index: int, role: Role, pressures: tuple[float, float, float], aim: int) -> str:
        prefill, decode = self._scene.speeds
        return say.change(
            self._scene.ready[index],
            role,
            speeds=(float(prefill[index]), float(decode[index])),
            cost_ms=float(self._scene.cost_ms[role][index]),
            pressures=pressures,
            aim=aim,
        )

    def _first_of_each_pool(self, order: Indices) -> Indices:
        chosen: dict[str, int] = {}
        for index in order:
            chosen.setdefault(self._scene.ready[int(index)].info.pool, int(index))
            if len(chosen) == self._options.max_switches:
                break
        return np.array(list(chosen.values()), dtype=np.intp)

    def _swap(self) -> Plan | None:
        """Two workers in each other's place: what no change of one worker reaches where machines are unequal."""
        scene, options = self._scene, self._options
        to_decode = scene.order("decode", min_role_s=options.min_role_s)[:1]
        to_prefill = scene.order("prefill", min_role_s=options.min_role_s)[:1]
        if not len(to_decode) or not len(to_prefill) or not np.isfinite(self._pressure):
            return None
        first, second = int(to_decode[0]), int(to_prefill[0])
        after = float(self._needs.pressure(self._splits.after(np.array([first, second]))))
        cost_ms = float(scene.cost_ms["decode"][first] + scene.cost_ms["prefill"][second])
        if after > self._pressure / (1.0 + self._least_gain) or self._saved_ms(after) <= cost_ms:
            return None
        if scene.worth("prefill")[first] >= scene.worth("prefill")[second]:
            return None  # once it decoded, the first would be called back before the second
        names = f"{scene.ready[first].info.worker_id} and {scene.ready[second].info.worker_id}"
        why = f"{names} suit each other's role better: the pressure of {self._pressure:.2f} would be {after:.2f}"
        both: list[tuple[int, Role, str]] = [(second, "prefill", why), (first, "decode", why)]
        if scene.num_decode == 1:  # the decode worker can go only when it has a successor
            return None if scene.needs_prefill and scene.num_prefill == 1 else self._told([], both[1:])
        apart = scene.ready[first].info.pool != scene.ready[second].info.pool and options.max_switches > 1
        return self._told([], both if apart else both[:1])

    def _told(self, words: list[str], changes: list[tuple[int, Role, str]] | None = None) -> Plan:
        scene, changes = self._scene, changes or []
        facts = say.facts(self._observation.traffic, self._needs, self._capacity, self._now)
        counts = say.counts(scene.num_prefill, scene.num_decode, self._pressure)
        return Plan(
            switches=tuple(scene.switch(*change) for change in changes),
            words=(*facts, counts, *words, *(scene.told(*change) for change in changes)),
            pressure=self._pressure,
            prefill_per_s=float(self._now.prefill),
            decode_per_s=float(self._now.decode),
        )


def _costs_ms(ready: tuple[WorkerSeen, ...], capacity: Capacity | None) -> dict[Role, Array]:
    """What each worker's change costs: the switch, and moving its running requests, or queued prompts begun anew."""
    held_bytes, gb_per_s, queued_tokens = as_array([_held(w) for w in ready]).T
    moved_ms = held_bytes / (gb_per_s * 1e6)
    again_ms = queued_tokens * (0.0 if capacity is None else capacity.ms_per_token)
    return {"prefill": TO_PREFILL_MS + moved_ms, "decode": TO_DECODE_MS + again_ms}


def _held(worker: WorkerSeen) -> tuple[float, ...]:
    """Bytes of KV, GB/s that they would move at, tokens of queued prompts."""
    kv_bytes = worker.load.context_tokens * worker.info.profile.kv_token_bytes
    return kv_bytes, worker.gb_per_s, worker.load.queued_tokens


def _over_mean(values: Array) -> Array:
    return values / max(float(values.mean()), 1e-12)
