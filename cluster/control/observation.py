"""What the planner looks at: the workers as they are, the traffic of a window, and nothing that needs a clock.

`ObservationWindow` gathers it from heartbeats and arrivals; time is an argument, so the simulator drives it too. The
controller feeds it with what the routers' /status says (roles.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from cluster.traffic import WINDOW_S, Traffic, TrafficWindow
from cluster.types import SILENCE_S, Heartbeat, PeerRate, WorkerInfo
from engine.messages import Load

MEAN_S = 5.0  # a burst that is shorter than this is no reason to change anything
NOMINAL_GB_PER_S = 1.0  # of KV, between workers that have not measured it


@dataclass(frozen=True, kw_only=True)
class WorkerSeen:
    """A worker whose links stand. since_role_s: since its last role change, or since a try that failed.

    since_state_s: how long it has been in this state. gb_per_s: how fast its KV reaches its peers. Both durations are
    infinite for what was not seen to begin. mean_rows: requests that ran or waited there in the last seconds.
    """

    info: WorkerInfo
    load: Load = field(default_factory=Load)
    since_role_s: float = math.inf
    since_state_s: float = math.inf
    gb_per_s: float = NOMINAL_GB_PER_S
    mean_rows: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that a plan depends on. Silent workers are not in it.

    `wants_prefill`: the cluster file has a pool of prefill workers, so without traffic to go by there should be one.
    `needs_prefill`: without one nothing is served (router.require_prefill).
    """

    workers: tuple[WorkerSeen, ...]
    traffic: Traffic = field(default_factory=Traffic)
    wants_prefill: bool = False
    needs_prefill: bool = False


@dataclass(kw_only=True)
class _Known:
    seen: WorkerSeen
    heard_at: float
    role_at: float = -math.inf
    state_at: float = -math.inf


class ObservationWindow:
    """Remembers the last word of each worker and the traffic of the last seconds."""

    def __init__(self, *, window_s: float = WINDOW_S, wants_prefill: bool = False, needs_prefill: bool = False) -> None:
        self.traffic = TrafficWindow(window_s)
        self._wants_prefill = wants_prefill
        self._needs_prefill = needs_prefill
        self._known: dict[str, _Known] = {}

    def on_heartbeat(self, now: float, beat: Heartbeat) -> None:
        """A worker spoke."""
        self.on_worker(now, beat.info, beat.load, beat.peers)

    def on_worker(self, now: float, info: WorkerInfo, load: Load, peers: tuple[PeerRate, ...] = ()) -> None:
        """The same, by whatever way it came. A word from before the present epoch is ignored."""
        known = self._known.get(info.worker_id)
        if known is not None and known.seen.info.incarnation != info.incarnation:
            known = None
        if known is not None and info.epoch < known.seen.info.epoch:
            return
        before = NOMINAL_GB_PER_S if known is None else known.seen.gb_per_s
        rate = peers[-1].gb_per_s if peers else before
        rows = float(load.num_running + load.num_waiting)
        if known is not None:
            share = math.exp(-max(0.0, now - known.heard_at) / MEAN_S)
            rows = share * known.seen.mean_rows + (1.0 - share) * rows
        seen = WorkerSeen(info=info, load=load, gb_per_s=rate, mean_rows=rows)
        if known is None:
            self._known[info.worker_id] = _Known(seen=seen, heard_at=now)
            return
        if info.role != known.seen.info.role:
            known.role_at = now
        if info.state != known.seen.info.state:
            known.state_at = now
        known.seen, known.heard_at = seen, now

    def on_info(self, now: float, info: WorkerInfo) -> None:
        """What a worker is now, from the reply to a switch; its load as it was heard last."""
        known = self._known.get(info.worker_id)
        if known is not None and known.seen.info.incarnation == info.incarnation:
            self.on_worker(now, info, known.seen.load)

    def on_worker_down(self, worker_id: str) -> None:
        """Its links broke, or its process is gone."""
        self._known.pop(worker_id, None)

    def on_failed_switch(self, now: float, worker_id: str) -> None:
        """A switch of it came to nothing: leave it alone as long as after one that succeeded."""
        if worker_id in self._known:
            self._known[worker_id].role_at = now

    def observe(self, now: float, traffic: Traffic | None = None) -> Observation:
        """The observation as of `now`; `traffic` instead of what was gathered here."""
        heard = (self._known[worker_id] for worker_id in sorted(self._known))
        workers = tuple(
            replace(known.seen, since_role_s=now - known.role_at, since_state_s=now - known.state_at)
            for known in heard
            if now - known.heard_at <= SILENCE_S
        )
        return Observation(
            workers=workers,
            traffic=self.traffic.traffic(now) if traffic is None else traffic,
            wants_prefill=self._wants_prefill,
            needs_prefill=self._needs_prefill,
        )
