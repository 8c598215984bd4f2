"""A whole cluster on a virtual clock in one thread: routers, N workers, faults at will, and checks of what remains.

The same seed gives the same event log, word for word. Texts are checked against the fake model's oracle, which knows
nothing of the cluster: any KV that was lost, stale, swapped or corrupted on its way changes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np

from cluster.router.effects import RouterEffect, Submit
from cluster.sim.clock import VirtualClock
from cluster.sim.faults import Faults
from cluster.sim.journal import Journal, describe
from cluster.sim.network import Network
from cluster.sim.process import SimProcess
from cluster.sim.registry import SimRegistry
from cluster.sim.router import SimResult, SimRouter
from cluster.sim.worker import SimWorker
from cluster.sim.worker_config import SimWorkerConfig
from cluster.types import WorkerInfo
from cluster.worker.effects import Effect
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
    num_routers: int = 1
    journal: bool = True


class Watcher(Protocol):
    """Sees what workers and routers do, just before they do it: the effects of the types that it has a check for."""

    checks: dict[type, Callable[[SimWorker, Any], None]]
    router_checks: dict[type, Callable[[SimRouter, Any], None]]

    def on_worker(self, worker: SimWorker) -> None:
        """A worker starts."""
        ...

    def on_info(self, info: WorkerInfo) -> None:
        """What a worker says of itself."""
        ...


class SimCluster:
    """Implements what workers and routers need of the world, and what tests do to it."""

    def __init__(self, config: SimConfig, watchers: Sequence[Watcher] = ()) -> None:
        self.config = config
        self.clock = VirtualClock()
        self.journal = Journal()
        self._journals = config.journal
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
        self.registry = SimRegistry(self.clock)
        self.workers: dict[str, SimWorker] = {}
        self._num_coming = 0
        self._incarnations: dict[str, SimWorker] = {}
        self.routers: list[SimRouter] = []  # dead ones too: their clients' results
        self.watch(*watchers)
        for worker in config.workers:
            self.start_worker(worker)
        for _ in range(config.num_routers):
            self.start_router()

    def watch(self, *watchers: Watcher) -> None:
        """From now on these see what happens, and no others."""
        self._watchers = watchers
        self._checks: dict[type, list[Callable[[SimWorker, Any], None]]] = {}
        self._router_checks: dict[type, list[Callable[[SimRouter, Any], None]]] = {}
        for watcher in watchers:
            for kind, check in watcher.checks.items():
                self._checks.setdefault(kind, []).append(check)
            for kind, router_check in watcher.router_checks.items():
                self._router_checks.setdefault(kind, []).append(router_check)

    # ---- World and RouterWorld

    def worker_at(self, incarnation: str) -> SimWorker | None:
        """The live or dead worker of an incarnation."""
        return self._incarnations.get(incarnation)

    def live_worker(self, worker_id: str) -> SimWorker | None:
        """The worker of this id if it lives."""
        worker = self.workers.get(worker_id)
        return worker if worker is not None and worker.process.alive else None

    def find_worker(self, worker_id: str) -> SimWorker | None:
        """The worker that the registry names, dead or alive."""
        info = self.registry.read().get(worker_id)
        return None if info is None else self._incarnations[info.incarnation]

    def publish(self, info: WorkerInfo) -> None:
        """A worker's entry of the registry."""
        self.registry.publish(info)
        for watcher in self._watchers:
            watcher.on_info(info)

    def on_effect(self, worker: SimWorker, effect: Effect) -> None:
        """For the journal and the watchers."""
        if self._journals:
            self.journal.note(self.clock.now, worker.info.worker_id, describe(effect))
        for check in self._checks.get(type(effect), ()):
            check(worker, effect)

    def on_router_effect(self, router: SimRouter, effect: RouterEffect) -> None:
        """For the journal and the watchers."""
        if self._journals:
            self.journal.note(self.clock.now, router.router_id, describe(effect))
        for check in self._router_checks.get(type(effect), ()):
            check(router, effect)

    # ---- what happens to it

    def start_worker(self, config: SimWorkerConfig) -> SimWorker:
        """Start a worker, or start it again: a new incarnation with an empty pool."""
        worker = SimWorker(self, config, f"{self._rng.getrandbits(128):032x}")
        self.workers[config.worker_id] = worker
        self._incarnations[worker.incarnation] = worker
        for watcher in self._watchers:
            watcher.on_worker(worker)
        self.publish(worker.info)
        return worker

    def start_router(self) -> SimRouter:
        """Start a router; a dead one is not started again, another takes its clients."""
        router = SimRouter(
            self,
            f"router-{len(self.routers) + 1}",
            policy=self.config.policy,
            rng=Random(self._rng.random()),
            keep_decisions=self.config.journal,
        )
        self.routers.append(router)
        for worker_id in self.workers:
            router.connect(worker_id)
        return router

    @property
    def router(self) -> SimRouter:
        """The first router."""
        return self.routers[0]

    def kill_worker(self, worker_id: str, *, restart_after_s: float | None = None) -> None:
        """SIGKILL, and perhaps a restart by the supervisor."""
        worker = self.workers[worker_id]
        self.journal.note(self.clock.now, worker_id, "killed")
        worker.process.kill()
        worker.rank.kill()
        self.network.process_died(worker.process)
        if restart_after_s is not None:
            self.clock.after(restart_after_s, self._restart, worker)

    def _restart(self, worker: SimWorker) -> None:
        if self.workers[worker.config.worker_id] is worker:
            self.start_worker(worker.config)

    def freeze_worker(self, worker_id: str, for_s: float) -> None:
        """SIGSTOP the whole worker, then SIGCONT."""
        worker = self.workers[worker_id]
        self.journal.note(self.clock.now, worker_id, "stopped")
        for process in (worker.process, worker.rank):
            process.freeze()
            self.clock.after(for_s, process.thaw)

    def freeze_rank(self, worker_id: str, for_s: float) -> None:
        """Its rank stands still for a while; its network side goes on."""
        worker = self.workers[worker_id]
        self.journal.note(self.clock.now, worker_id, "its rank stands")
        worker.rank.freeze()
        self.clock.after(for_s, worker.rank.thaw)

    def lag(self, process: SimProcess, for_s: float) -> None:
        """The loop of a router, or of a worker's network side, does not run for a while; ranks go on."""
        self.journal.note(self.clock.now, process.name, "its loop lags")
        process.freeze()
        self.clock.after(for_s, process.thaw)

    def hang_worker(self, worker_id: str) -> None:
        """Its rank never finishes a step again; its network side goes on."""
        self.workers[worker_id].hung = True

    def kill_router(self, router: SimRouter | None = None) -> None:
        """SIGKILL a router (the first one)."""
        router = router or self.router
        self.journal.note(self.clock.now, router.router_id, "killed")
        router.process.kill()
        self.network.process_died(router.process)

    # ---- clients and time

    def submit(self, submit: Submit, *, at: float | None = None, router: int = 0) -> None:
        """A request, now or later, to a router or, if that is dead by then, to the last one."""
        self._num_coming += 1
        self.clock.at(self.clock.now if at is None else at, self._arrive, submit, router)

    def _arrive(self, submit: Submit, router: int) -> None:
        self._num_coming -= 1
        chosen = self.routers[router]
        (chosen if chosen.process.alive else self.routers[-1]).submit(submit)

    def run_until(self, when: float) -> None:
        """Let time pass."""
        self.clock.run_until(when)

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.run_until(self.clock.now + seconds)

    def run_while(self, condition: Callable[[], bool], *, limit_s: float) -> bool:
        """Let time pass event by event while `condition` holds. Returns whether it ended within `limit_s`."""
        return self.clock.run_while(condition, self.clock.now + limit_s)

    def drain(self, *, limit_s: float) -> bool:
        """Run until every request has come and gone. Returns whether that came within `limit_s`."""
        return self.run_while(self._is_busy, limit_s=limit_s)

    def _is_busy(self) -> bool:
        num_live = self._num_coming
        for router in self.routers:
            if router.process.alive:
                num_live += router.num_live
        return num_live > 0

    # ---- checks

    @property
    def results(self) -> dict[str, SimResult]:
        """What the clients got, by request id."""
        if len(self.routers) == 1:
            return self.router.results
        return {name: result for router in self.routers for name, result in router.results.items()}

    def oracle(self, submit: Submit, *, at_most: int | None = None) -> dict[int, list[int]]:
        """The text of every choice, from the tokens alone; of each only the first `at_most` tokens if that is given."""
        engine = self.config.workers[0].engine
        prompt = np.frombuffer(submit.prompt, dtype="<i4").tolist()
        limit = engine.max_model_len - len(prompt)
        if at_most is not None:
            limit = min(limit, at_most)
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
            load = worker.core.load()
            referenced, quarantined = load.num_referenced_blocks, load.num_quarantined_blocks
            if referenced or quarantined:
                found.append(f"{worker_id}: {referenced} referenced, {quarantined} quarantined blocks")
            if worker.decode.num_live or worker.prefill.num_calls:
                found.append(f"{worker_id}: {worker.decode.num_live} choices, {worker.prefill.num_calls} served calls")
            if load.num_assigned or load.num_served:
                found.append(f"{worker_id}: the rank has {load}")
        for router in self.routers:
            if not router.process.alive:
                continue
            if num_live := router.dispatcher.num_live:
                found.append(f"{router.router_id}: {num_live} requests that have not ended")
        return found
