"""A whole cluster on a virtual clock in one thread: one router, N workers, faults at will, and checks of what remains.

The same seed gives the same event log, word for word. Texts are checked against the fake model's oracle, which knows
nothing of the cluster: any KV that was lost, stale, swapped or corrupted on its way changes the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from cluster.router.effects import Submit
from cluster.sim.clock import VirtualClock
from cluster.sim.faults import Faults
from cluster.sim.journal import Journal
from cluster.sim.network import Network
from cluster.sim.router import SimResult, SimRouter
from cluster.sim.worker import SimWorker, SimWorkerConfig
from engine.fake_engine import ArrayMemory


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """A cluster. Delays in seconds."""

    workers: tuple[SimWorkerConfig, ...]
    seed: int = 0
    policy: str = "least-loaded"
    delay_s: float = 0.0002
    jitter_s: float = 0.0001
    bytes_per_s: float = 1e9


class SimCluster:
    """Implements what workers and routers need of the world, and what tests do to it."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.clock = VirtualClock()
        self.journal = Journal()
        self.faults = Faults()
        self.memories: dict[str, tuple[str, ArrayMemory]] = {}
        self._rng = Random(config.seed)
        self.network = Network(
            self.clock,
            Random(self._rng.random()),
            delay_s=config.delay_s,
            jitter_s=config.jitter_s,
            bytes_per_s=config.bytes_per_s,
        )
        self.workers: dict[str, SimWorker] = {}
        self._num_coming = 0
        self._incarnations: dict[str, SimWorker] = {}
        self.router = SimRouter(self, "router-1", policy=config.policy, rng=Random(self._rng.random()))
        for worker in config.workers:
            self.start_worker(worker)
            self.router.connect(worker.worker_id)

    # ---- World and RouterWorld

    def worker_at(self, incarnation: str) -> SimWorker | None:
        """The live or dead worker of an incarnation."""
        return self._incarnations.get(incarnation)

    def live_worker(self, worker_id: str) -> SimWorker | None:
        """The worker of this id if it lives."""
        worker = self.workers.get(worker_id)
        return worker if worker is not None and worker.process.alive else None

    # ---- what happens to it

    def start_worker(self, config: SimWorkerConfig) -> SimWorker:
        """Start a worker, or start it again: a new incarnation with an empty pool."""
        worker = SimWorker(self, config, f"{self._rng.getrandbits(128):032x}")
        self.workers[config.worker_id] = worker
        self._incarnations[worker.info.incarnation] = worker
        return worker

    def kill_worker(self, worker_id: str, *, restart_after_s: float | None = None) -> None:
        """SIGKILL, and perhaps a restart by the supervisor."""
        worker = self.workers[worker_id]
        self.journal.note(self.clock.now, worker_id, "killed")
        worker.process.kill()
        self.network.process_died(worker.process)
        if restart_after_s is not None:
            self.clock.after(restart_after_s, lambda: self._restart(worker))

    def _restart(self, worker: SimWorker) -> None:
        if self.workers[worker.config.worker_id] is worker:
            self.start_worker(worker.config)

    def freeze_worker(self, worker_id: str, for_s: float) -> None:
        """SIGSTOP the whole worker, then SIGCONT."""
        worker = self.workers[worker_id]
        self.journal.note(self.clock.now, worker_id, "stopped")
        worker.process.freeze()
        self.clock.after(for_s, worker.process.thaw)

    def hang_worker(self, worker_id: str) -> None:
        """Its rank never finishes a step again; its network side goes on."""
        self.workers[worker_id].hung = True

    def kill_router(self) -> None:
        """SIGKILL the router."""
        self.router.process.kill()
        self.network.process_died(self.router.process)

    # ---- clients and time

    def submit(self, submit: Submit, *, at: float | None = None) -> None:
        """A request, now or later."""
        self._num_coming += 1
        self.clock.at(self.clock.now if at is None else at, lambda: self._arrive(submit))

    def _arrive(self, submit: Submit) -> None:
        self._num_coming -= 1
        self.router.submit(submit)

    def run_until(self, when: float) -> None:
        """Let time pass."""
        self.clock.run_until(when)

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.run_until(self.clock.now + seconds)

    def run_while(self, condition: Callable[[], bool], *, limit_s: float) -> bool:
        """Let time pass event by event while `condition` holds. Returns whether it ended within `limit_s`."""
        end = self.clock.now + limit_s
        while condition():
            if not self.clock.step(end):
                return False
        return True

    def drain(self, *, limit_s: float) -> bool:
        """Run until every request has come and gone. Returns whether that came within `limit_s`."""
        return self.run_while(
            lambda: self._num_coming > 0 or any(result.live for result in self.results.values()), limit_s=limit_s
        )

    # ---- checks

    @property
    def results(self) -> dict[str, SimResult]:
        """What the clients got, by request id."""
        return self.router.results

    def oracle(self, submit: Submit) -> dict[int, list[int]]:
        """The text of every choice, from the tokens alone."""
        engine = self.config.workers[0].engine
        prompt = np.frombuffer(submit.prompt, dtype="<i4").tolist()
        limit = engine.max_model_len - len(prompt)
        return {
            choice: engine.model.oracle(
                prompt,
                submit.params,
                seed=seed,
                choice=choice,
                num_tokens=min(limit, submit.params.max_tokens or limit),
                token_words=engine.layout.token_bytes // 8,
            )
            for choice, seed in enumerate(submit.seeds)
        }

    def num_held_blocks(self, worker_id: str) -> tuple[int, int]:
        """(referenced, quarantined) blocks of a worker now."""
        load = self.workers[worker_id].core.load()
        return load.num_referenced_blocks, load.num_quarantined_blocks

    def leaks(self) -> list[str]:
        """What live workers and the router still hold, in words; empty after a drain."""
        found = []
        for worker_id, worker in self.workers.items():
            if not worker.process.alive:
                continue
            referenced, quarantined = self.num_held_blocks(worker_id)
            if referenced or quarantined:
                found.append(f"{worker_id}: {referenced} referenced, {quarantined} quarantined blocks")
            if worker.decode.num_live or worker.prefill.num_calls:
                found.append(f"{worker_id}: {worker.decode.num_live} choices, {worker.prefill.num_calls} served calls")
            load = worker.core.load()
            if load.num_running or load.num_waiting or load.num_served:
                found.append(f"{worker_id}: the rank has {load}")
        status = self.router.dispatcher.status()
        if self.router.process.alive and (status.num_waiting or status.num_running):
            found.append(f"router: {status.num_waiting} waiting, {status.num_running} running")
        return found
