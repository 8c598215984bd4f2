"""Roles over routers and workers that are stubs: what routers say, and how workers answer a switch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from cluster.control.roles import Roles
from cluster.control.router_client import RouterClient, RouterError
from cluster.rpc.switch_client import SwitchCallError
from cluster.spec import RolesSpec
from cluster.traffic import Traffic
from cluster.types import SwitchReply, SwitchRequest, WorkerInfo
from tests.cluster.control.seen import profile, traffic

QUIET = Traffic(num_requests=0)
LONG_PROMPTS = traffic(4.0, 4000.0, 20.0)


def info(worker_id: str, role: Any, **changes: Any) -> WorkerInfo:
    base = WorkerInfo(
        worker_id=worker_id,
        incarnation=f"i-{worker_id}",
        epoch=1,
        role=role,
        state="ready",
        address=f"at-{worker_id}",
        pool=worker_id.rpartition("-")[0],
        max_num_seqs=100,
        profile=profile(),
    )
    return structs.replace(base, **changes)


def worker_json(one: WorkerInfo, **changes: Any) -> dict[str, Any]:
    load = dict.fromkeys(("running", "waiting", "served", "queued_tokens", "context_tokens", "blocks"), 0)
    names = ("worker_id", "incarnation", "epoch", "role", "state")
    told = {name: getattr(one, name) for name in names} | {"link": "up", "heartbeat_age_ms": 10, "hung": False}
    return told | {"load": load | {"free_blocks": 0}, "profile": None} | changes


@dataclass(kw_only=True)
class Rig:
    """Time stands still unless a test moves it."""

    workers: dict[str, WorkerInfo]
    traffic: Traffic = QUIET
    now: float = 1000.0
    lost: set[str] = field(default_factory=set)
    asked: list[tuple[str, SwitchRequest]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    holding: asyncio.Event | None = None  # switches wait for it
    reply: dict[str, Any] = field(default_factory=dict)
    broken: bool = False
    router_answers: bool = True

    def roles(self, **options: Any) -> Roles:
        return Roles(
            RolesSpec(ttft_ms=1000.0, tpot_ms=30.0, **options),
            routers=lambda: (self.client(),),
            infos=lambda: tuple(self.workers.values()),
            wants_prefill=True,
            tell=self.told.append,
            clock=lambda: self.now,
            call=self.call,
        )

    def client(self) -> RouterClient:
        rig = self

        class Client(RouterClient):
            def get(self, path: str) -> tuple[int, dict[str, Any]]:
                assert path == "/status"
                if not rig.router_answers:
                    raise RouterError("no answer")
                return 200, rig.status()

        return Client(host="h", port=1)

    def status(self) -> dict[str, Any]:
        here = [one for one in self.workers.values() if one.worker_id not in self.lost]
        return {"uptime_s": 99.0, "workers": [worker_json(one) for one in here], "traffic": dict(self.traffic.__dict__)}

    async def call(self, address: str, request: SwitchRequest) -> SwitchReply:
        """As a worker does it."""
        self.asked.append((address, request))
        self.called.set()
        if self.holding is not None:
            await self.holding.wait()
        if self.broken:
            raise SwitchCallError(f"the worker at {address}: unavailable")
        worker_id = address.removeprefix("at-")
        one = self.workers[worker_id]
        if request.expected_epoch != one.epoch or request.incarnation != one.incarnation:
            return SwitchReply(outcome="refused", info=one, reason=f"the epoch is {one.epoch}")
        changed = structs.replace(one, epoch=one.epoch + 4, role=request.role or one.role)
        if request.role is None:
            changed = structs.replace(changed, state="draining")
        reply = SwitchReply(outcome="drained" if request.role is None else "switched", info=changed, moved=2)
        reply = structs.replace(reply, **self.reply)
        if reply.outcome in ("switched", "drained"):
            self.workers[worker_id] = changed
        return reply


def three(**more: Any) -> Rig:
    """One prefill and two decode workers."""
    named = (info("prefill-0", "prefill"), info("decode-0", "decode"), info("decode-1", "decode"))
    return Rig(workers={one.worker_id: one for one in named}, **more)
