"""A controller on the virtual clock: it reads the registry, asks workers to switch, dies, and is started again.

It keeps no state that a new one could not read from the registry: a switch is the worker's own business. One switch of
a role at a time, and never the last ready worker of it.
"""

from __future__ import annotations

from random import Random

from cluster.sim.cluster import SimCluster
from cluster.sim.network import End
from cluster.sim.process import SimProcess
from cluster.types import SwitchReply, SwitchRequest, WorkerInfo
from engine.config import Role

RETRY_S = 0.08
MAX_TRIES = 20
TIMEOUT_MS = 2000
ASKED_AGAIN = 0.3  # of the requests come a second time, when they are over


class SimController:
    """Asks for `num_switches` switches, one after the other from `first_at` on."""

    def __init__(self, sim: SimCluster, rng: Random, *, num_switches: int, first_at: float) -> None:
        self.outcomes: list[str] = []
        self._sim = sim
        self._rng = rng
        self._num_left = num_switches
        self._num_calls = 0
        self._num_tries = 0
        self._highest: dict[str, WorkerInfo] = {}
        self._process = SimProcess(sim.clock, "controller")
        self._process.at(first_at, self._next)

    @property
    def busy(self) -> bool:
        """Whether a switch is still to come or to be answered."""
        return self._num_left > 0

    def crash(self, restart_after_s: float) -> None:
        """It dies with its calls; a new one starts and knows only the registry."""
        self._process.kill()
        self._sim.network.process_died(self._process)
        self._process = SimProcess(self._sim.clock, "controller")
        self._highest = {}
        self._process.at(self._sim.clock.now + restart_after_s, self._next)

    def _next(self) -> None:
        if not self._num_left:
            return
        if self._num_tries >= MAX_TRIES:
            self._num_left -= 1
            self._num_tries = 0
            self._later()
            return
        self._num_tries += 1
        chosen = self._choose()
        if chosen is None:
            self._later()
            return
        role: Role = "decode" if chosen.role == "prefill" else "prefill"
        self._call(chosen, role)

    def _later(self) -> None:
        self._process.at(self._sim.clock.now + RETRY_S, self._next)

    def _choose(self) -> WorkerInfo | None:
        """A ready worker whose role has another ready one, while nobody of that role switches."""
        for worker_id, info in self._sim.registry.read().items():
            known = self._highest.get(worker_id)
            if known is None or known.incarnation != info.incarnation or known.epoch <= info.epoch:
                self._highest[worker_id] = info
        infos = [info for _, info in sorted(self._highest.items())]
        if any(info.state != "ready" for info in infos):
            return None
        roles = [info.role for info in infos]
        fits = [info for info in infos if info.state == "ready" and roles.count(info.role) >= 2]
        return self._rng.choice(fits) if fits else None

    def _call(self, info: WorkerInfo, role: Role) -> None:
        request = SwitchRequest(
            incarnation=info.incarnation, expected_epoch=info.epoch, role=role, timeout_ms=TIMEOUT_MS
        )
        self._send(info, request, again=self._rng.random() < ASKED_AGAIN)

    def _send(self, info: WorkerInfo, request: SwitchRequest, *, again: bool) -> None:
        """With `again`, the same once more after the answer: somebody on the way did not hear it."""
        worker = self._sim.workers[info.worker_id]
        self._num_calls += 1
        call_id = f"switch-{self._num_calls}"
        process = self._process

        def answered(reply: SwitchReply) -> None:
            connection.close(0)
            self._answered(reply)
            if again:
                self._send(info, request, again=False)
            else:
                self._later()

        here = End(process=process, on_message=answered, on_closed=self._later)
        there = End(
            process=worker.process,
            on_message=lambda message: worker.accept_switch(call_id, message, connection),
            on_closed=lambda: None,
        )
        connection = self._sim.network.connect(here, there)
        self._sim.journal.note(self._sim.clock.now, "controller", f"{call_id} {info.worker_id} to {request.role}")
        connection.send(0, request)

    def _answered(self, reply: SwitchReply) -> None:
        self._sim.journal.note(self._sim.clock.now, "controller", f"{reply.outcome} {reply.reason}".rstrip())
        self.outcomes.append(reply.outcome)
        self._highest[reply.info.worker_id] = reply.info
        if reply.outcome == "switched":
            self._num_left -= 1
            self._num_tries = 0
