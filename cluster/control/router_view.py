"""What the routers' /status says of workers and traffic, as the planner's types. JSON of another process: checked."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from msgspec.structs import replace

from cluster.control.router_client import RouterClient, RouterError
from cluster.traffic import Traffic, added
from cluster.types import PeerRate, WorkerInfo, WorkerState
from engine.config import Role
from engine.messages import Load

SETTLED_S = 5.0  # a router that runs no longer than this may not have found its workers yet
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
_STATES: dict[str, WorkerState] = {state: state for state in get_args(WorkerState)}
_OPTIONAL = {name for name, hint in get_type_hints(Traffic).items() if type(None) in get_args(hint)}


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A worker as a router hears it. `info` is the registry's, with what the heartbeat said since."""

    info: WorkerInfo
    load: Load
    peers: tuple[PeerRate, ...]
    age_ms: int


@dataclass(frozen=True, kw_only=True)
class View:
    """All routers that answered, as one: each worker once, by the youngest heartbeat."""

    heard: tuple[Heard, ...]
    traffic: Traffic
    num_routers: int


async def look(clients: Iterable[RouterClient], infos: Iterable[WorkerInfo]) -> View:
    """Ask all routers at once. Those that don't answer as they should, or have just started, are left out."""
    known = {info.incarnation: info for info in infos}
    answers = await asyncio.gather(*(_ask(client, known) for client in clients))
    parts = [answer for answer in answers if answer is not None]
    youngest: dict[str, Heard] = {}
    for heard, _ in parts:
        for one in heard:
            other = youngest.get(one.info.worker_id)
            if other is None or one.age_ms < other.age_ms:
                youngest[one.info.worker_id] = one
    return View(
        heard=tuple(youngest[name] for name in sorted(youngest)),
        traffic=added(traffic for _, traffic in parts),
        num_routers=len(parts),
    )


async def _ask(client: RouterClient, known: dict[str, WorkerInfo]) -> tuple[list[Heard], Traffic] | None:
    try:
        code, body = await asyncio.to_thread(client.get, "/status")
        return parse(body, known) if code == 200 and float(body["uptime_s"]) >= SETTLED_S else None
    except (RouterError, KeyError, TypeError, ValueError):
        return None  # a router of another version, or on its way up or down


def parse(body: dict[str, Any], known: dict[str, WorkerInfo]) -> tuple[list[Heard], Traffic]:
    """One router's /status; `known` by incarnation. Raises KeyError, TypeError or ValueError if it is none."""
    heard = [
        _heard(worker, known[worker["incarnation"]])
        for worker in body["workers"]
        if worker["link"] == "up"
        and worker["heartbeat_age_ms"] is not None
        and not worker.get("hung")
        and worker["load"]
        and worker["incarnation"] in known
    ]
    return heard, _traffic(body["traffic"])


def _heard(worker: dict[str, Any], info: WorkerInfo) -> Heard:
    load, profile = worker["load"], worker.get("profile") or {}
    return Heard(
        info=replace(info, role=_ROLES[worker["role"]], state=_STATES[worker["state"]], epoch=int(worker["epoch"])),
        load=Load(
            num_running=int(load["running"]),
            num_waiting=int(load["waiting"]),
            num_pulling=int(load.get("pulling", 0)),
            num_served=int(load["served"]),
            queued_tokens=int(load["queued_tokens"]),
            context_tokens=int(load["context_tokens"]),
            num_blocks=int(load["blocks"]),
            num_free_blocks=int(load["free_blocks"]),
            prefill_scale=float(profile.get("prefill_scale", 1.0)),
            decode_scale=float(profile.get("decode_scale", 1.0)),
        ),
        peers=tuple(
            PeerRate(
                peer_id=str(peer["peer"]),
                transport=peer["transport"],
                gb_per_s=max(float(peer["gb_per_s"]), 1e-3),
                latency_ms=float(peer["latency_ms"]),
            )
            for peer in profile.get("peers", ())
        ),
        age_ms=int(worker["heartbeat_age_ms"]),
    )


def _traffic(body: dict[str, Any]) -> Traffic:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Traffic):
        value = body[field.name]
        if value is None and field.name in _OPTIONAL:
            continue
        number = float(value)
        if not 0.0 <= number < float("inf"):
            raise ValueError(f"traffic.{field.name} is {number}")
        values[field.name] = int(number) if field.type == "int" else number
    return Traffic(**values)
