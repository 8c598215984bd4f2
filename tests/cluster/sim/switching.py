"""A controller of tests: asks a simulated worker for another role and keeps the reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cluster.sim.cluster import SimCluster
from cluster.types import SwitchReply, SwitchRequest
from engine.config import Role


@dataclass
class Caller:
    """A controller's end of Switch: keeps the reply."""

    replies: list[SwitchReply] = field(default_factory=list)

    def send(self, side: int, message: Any, num_bytes: int = 0) -> None:
        self.replies.append(message)


def ask(sim: SimCluster, worker_id: str, role: Role | None, **changes: Any) -> Caller:
    info = sim.workers[worker_id].info
    request = SwitchRequest(incarnation=info.incarnation, expected_epoch=info.epoch, role=role)
    caller = Caller()
    sim.workers[worker_id].accept_switch(f"switch-{id(caller)}", replace(request, **changes), caller)  # type: ignore[arg-type]
    return caller


def switch(sim: SimCluster, worker_id: str, role: Role | None, **changes: Any) -> SwitchReply:
    """Switch a worker and wait for the reply."""
    caller = ask(sim, worker_id, role, **changes)
    assert sim.run_while(lambda: not caller.replies, limit_s=20)
    return caller.replies[0]
