"""JSON for people and tools: /status (for `neap status`), /health/ready, /v1/models, /version."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

from cluster.router.breakers import BreakerStatus
from cluster.router.decision import as_json
from cluster.router.service import Readiness, RouterService
from cluster.router.snapshot import DispatchStatus, WorkerStatus

MAX_TOLD = 32  # decisions, where no request is named

Json = dict[str, Any]


def version() -> str:
    """The distribution's version; "source" when it runs from a tree that was never installed."""
    try:
        return metadata.version("neap-serve")
    except metadata.PackageNotFoundError:
        return "source"


def readiness_json(readiness: Readiness) -> Json:
    """The body of /health and /health/ready."""
    return {
        "status": "ready" if readiness.ready else "starting" if readiness.stage != "draining" else "draining",
        "stage": readiness.stage,
        "percent": readiness.percent,
        "reason": readiness.reason,
        "prefill_ready": readiness.prefill_ready,
        "decode_ready": readiness.decode_ready,
    }


def model_json(service: RouterService) -> Json | None:
    """The served model's entry in /v1/models, or None while it can't be served."""
    if not service.readiness().ready:
        return None
    return {
        "id": service.spec.served_model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "neap",
        "max_model_len": service.limits().max_model_len,
    }


def status_json(service: RouterService, dispatch: DispatchStatus) -> Json:
    """Everything that `neap status` shows."""
    by_id = {worker.info.worker_id: worker for worker in dispatch.workers}
    by_incarnation = {worker.info.incarnation: worker.info.worker_id for worker in dispatch.workers}
    workers = []
    for peer in service.links.peers():
        known = by_id.get(peer.info.worker_id)
        entry: Json = {
            "worker_id": peer.info.worker_id,
            "role": peer.info.role,
            "state": peer.info.state,
            "epoch": peer.info.epoch,
            "incarnation": peer.info.incarnation,
            "pool": peer.info.pool,
            "node": peer.info.node,
            "pid": peer.info.pid,
            "address": peer.info.address,
            "model": peer.info.model,
            "numerics_class": peer.info.numerics_class,
            "max_model_len": peer.info.max_model_len,
            "max_num_seqs": peer.info.max_num_seqs,
            "link": "up" if peer.up else "down",
            "heartbeat_age_ms": int((service.clock() - peer.beat_at) * 1000) if peer.beat else None,
        }
        workers.append(entry | (_load_json(known) if known is not None else {"load": None}))
    return {
        "router_id": service.spec.router_id,
        "version": version(),
        "model": service.spec.served_model_name,
        "policy": service.spec.policy,
        "uptime_s": round(service.clock() - service.started_at, 1),
        "readiness": readiness_json(service.readiness()),
        "requests": {
            "queued": service.admission.num_queued,
            "running": service.admission.num_running,
            "waiting_for_a_worker": dispatch.num_waiting,
            "max_queue": service.spec.max_queue,
            "max_running": service.spec.max_running,
        },
        "counters": dispatch.counters,
        "traffic": traffic_json(service, dispatch),
        "predictions": {
            "ttft_error_p50": round(dispatch.errors.ttft_p50, 4),
            "ttft_of": dispatch.errors.num_ttft,
            "tpot_error_p50": round(dispatch.errors.tpot_p50, 4),
            "tpot_of": dispatch.errors.num_tpot,
        },
        "breakers": [_breaker_json(breaker, by_incarnation, service.clock()) for breaker in dispatch.breakers],
        "workers": workers,
    }


def traffic_json(service: RouterService, dispatch: DispatchStatus) -> Json:
    """What came in and how it was served lately (cluster/traffic.py), for the controller's planner too."""
    traffic = service.calls.traffic.traffic(service.clock(), num_queued=dispatch.num_waiting)
    values = dataclasses.asdict(traffic).items()
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values}


def why_json(service: RouterService, dispatch: DispatchStatus, request_id: str) -> Json:
    """The last decisions, newest first; with an id (as clients see it, or its beginning) only that request's."""
    asked = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    chosen = [one for one in dispatch.decisions if one.request_id.startswith(asked)]
    now = service.clock()
    return {"decisions": [as_json(one, now) for one in chosen[: len(chosen) if asked else MAX_TOLD]]}


def _breaker_json(breaker: BreakerStatus, worker_of: dict[str, str], now: float) -> Json:
    return {
        "decode": worker_of.get(breaker.decode_incarnation, "a worker that is gone"),
        "source": breaker.source_id,
        "failures": breaker.num_failures,
        "reason": breaker.reason,
        "open_for_s": round(max(0.0, breaker.open_until - now), 1),
    }


def _load_json(worker: WorkerStatus) -> Json:
    load = worker.load
    used = load.num_referenced_blocks
    return {
        "hung": worker.hung,
        "assigned": worker.num_sequences,
        "step_count": worker.step_count,
        "step_age_ms": worker.step_age_ms,
        "profile": _profile_json(worker),
        "load": {
            "running": load.num_running,
            "paused": load.num_paused,
            "pulling": load.num_pulling,
            "waiting": load.num_waiting,
            "served": load.num_served,
            "queued_tokens": load.queued_tokens,
            "context_tokens": load.context_tokens,
            "kv_use": round(used / load.num_blocks, 4) if load.num_blocks else 0.0,
            "blocks": load.num_blocks,
            "free_blocks": load.num_free_blocks,
            "referenced_blocks": used,
            "quarantined_blocks": load.num_quarantined_blocks,
            "prefix_cache_queries": load.prefix_cache_queries,
            "prefix_cache_hits": load.prefix_cache_hits,
            "preemptions": load.num_preemptions,
            "prompt_tokens": load.prompt_tokens,
            "generation_tokens": load.generation_tokens,
        },
    }


def _profile_json(worker: WorkerStatus) -> Json | None:
    """What a worker measured of itself, with its factors of now; None if it did not."""
    profile, load = worker.info.profile, worker.load
    if not profile.known:
        return None
    return {
        "prefill_ms": [[count, round(ms, 3)] for count, ms in profile.prefill],
        "decode_ms": [[count, round(ms, 3)] for count, ms in profile.decode],
        "prefill_scale": round(load.prefill_scale, 3),
        "decode_scale": round(load.decode_scale, 3),
        "kv_token_bytes": profile.kv_token_bytes,
        "peers": [
            {"peer": peer.peer_id, "transport": peer.transport, "gb_per_s": round(peer.gb_per_s, 3)}
            | {"latency_ms": round(peer.latency_ms, 3)}
            for peer in worker.peers
        ],
    }
