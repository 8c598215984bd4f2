"""The real planner over the model: it sees what routers and workers would tell it, as late as they would.

Heartbeats carry a worker's load as it was then; the planner runs every `interval_s`, with a heartbeat; what it plans
reaches the workers after a call. Nothing of the load to come, and nothing of the model's inside, gets here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from cluster.bench.roles.machine import Job
from cluster.bench.roles.model import ClusterModel
from cluster.bench.roles.setting import Hardware, Setting
from cluster.control.observation import ObservationWindow
from cluster.control.planner import PlannedSwitch, Planner
from cluster.spec import RolesSpec
from cluster.types import WorkerInfo, WorkerState
from engine.config import Role
from engine.messages import Load

BLOCK_TOKENS = 64


class Control:
    """Implements model.Watcher with cluster/control's planner. `spec` has the options of the cluster file's `roles`."""

    def __init__(
        self, setting: Setting, hardware: Sequence[Hardware], split: int, spec: RolesSpec | None = None
    ) -> None:
        targets = RolesSpec(ttft_ms=setting.ttft_ms, tpot_ms=setting.tpot_ms)
        self.spec = targets if spec is None else spec
        self.window = ObservationWindow(wants_prefill=split > 0)
        self.words: Counter[str] = Counter()
        self.timeline: list[tuple[float, int]] = []  # (seconds, prefill workers) at every change
        self._planner = Planner(self.spec)
        self._every = max(1, round(self.spec.interval_s / setting.heartbeat_s))
        self._call_s = setting.switch.call_ms / 1000
        self._beats = 0
        self._generated = 0
        self._infos = [
            WorkerInfo(
                worker_id=f"worker-{index:04d}",
                incarnation=f"{index:032x}",
                epoch=1,
                role="prefill" if index < split else "decode",
                state="ready",
                address="",
                block_size=BLOCK_TOKENS,
                max_num_seqs=one.max_num_seqs,
                pool=f"pool-{index * setting.pools // len(hardware)}",
                profile=one.profile,
            )
            for index, one in enumerate(hardware)
        ]

    # ---- what the router tells

    def on_request(self, now: float, job: Job) -> None:
        """See Watcher."""
        self.window.traffic.on_request(now, job.prompt)

    def on_first_token(self, now: float, job: Job) -> None:
        """See Watcher."""
        self.window.traffic.on_first_token(now, (now - job.at) * 1000)
        self.window.traffic.on_begin()

    def on_end(self, now: float, job: Job) -> None:
        """See Watcher."""
        tpot_ms = (now - job.first_at) * 1000 / (job.outputs - 1) if job.outputs > 1 else None
        self.window.traffic.on_end(now, job.outputs, tpot_ms)

    # ---- what workers tell

    def on_state(self, now: float, index: int, role: Role, state: str) -> None:
        """See Watcher: told with the next heartbeat."""
        info = self._infos[index]
        shown: WorkerState = "draining" if state == "draining" else "ready"
        self._infos[index] = replace(info, role=role, state=shown, epoch=info.epoch + 1)
        if state == "rolled back":
            self.window.on_failed_switch(now, info.worker_id)
        elif state == "ready":
            self.timeline.append((now, sum(one.role == "prefill" for one in self._infos)))

    def on_beat(self, now: float, cluster: ClusterModel) -> None:
        """Every worker's heartbeat; then, every so many of them, a plan."""
        for machine, info in zip(cluster.machines, self._infos, strict=True):
            tokens = machine.hardware.kv_tokens
            load = Load(
                num_running=machine.num_rows + machine.num_own,
                num_waiting=len(machine.waiting),
                queued_tokens=machine.queued_tokens,
                num_blocks=tokens // BLOCK_TOKENS,
                num_free_blocks=max(0, tokens - machine.reserved) // BLOCK_TOKENS,
                context_tokens=machine.context,
            )
            self.window.on_worker(now, info, load)
        generated = sum(machine.generated(now) for machine in cluster.machines)
        self.window.traffic.on_tokens(now, generated - self._generated)
        self._generated = generated
        self._beats += 1
        if self._beats % self._every:
            return
        traffic = self.window.traffic.traffic(now, num_queued=len(cluster.queue))
        plan = self._planner.plan(self.window.observe(now, traffic))
        for planned in plan.switches:
            self._ask(now, cluster, planned)
        if not plan.switches:
            self.words[_gist(plan.words)] += 1

    def _ask(self, now: float, cluster: ClusterModel, planned: PlannedSwitch) -> None:
        index = int(planned.worker_id.rpartition("-")[2])
        if self._infos[index].epoch == planned.epoch:
            cluster.switch_at(now + self._call_s, index, planned.role)


def _gist(words: tuple[str, ...]) -> str:
    """Why nothing was planned, without the numbers."""
    last = words[-1] if words else ""
    return "".join(letter for letter in last if not letter.isdigit())[:60]
