"""Views with round numbers, for the tests of predictions and policies."""

from __future__ import annotations

from typing import Any

from cluster.router.views import RequestView, WorkerView
from cluster.types import PeerRate, WorkerInfo
from engine.scheduler.profile import profile_of
from engine.scheduler.step_cost import StepCost

KV_TOKEN_BYTES = 1000


def worker(worker_id: str, *, factor: float = 1.0, max_num_seqs: int = 8, **load: Any) -> WorkerView:
    """A worker whose steps take 2 ms and 0.1 ms a token, times `factor`."""
    profile = profile_of(
        StepCost(fixed_ms=2.0 * factor, ms_per_token=0.1 * factor),
        max_step_ms=1000.0,
        max_step_tokens=4096,
        max_num_seqs=max_num_seqs,
        kv_token_bytes=KV_TOKEN_BYTES,
    )
    info = WorkerInfo(
        worker_id=worker_id,
        incarnation=f"{worker_id}-incarnation",
        epoch=1,
        role="prefill" if worker_id.startswith("p") else "decode",
        state="ready",
        address="a:1",
        max_num_seqs=max_num_seqs,
        profile=profile,
    )
    return WorkerView(info=info, **{"num_sequences": 0, "queued_tokens": 0, **load})


def rate(peer_id: str, gb_per_s: float = 1.0, latency_ms: float = 1.0) -> dict[str, PeerRate]:
    """1 GB/s and 1 ms: a token of KV takes a microsecond."""
    return {peer_id: PeerRate(peer_id=peer_id, transport="grpc", gb_per_s=gb_per_s, latency_ms=latency_ms)}


def request(num_tokens: int = 1001, *, num_outputs: float = 50.0, num_choices: int = 1, turn: int = 0) -> RequestView:
    """One request."""
    return RequestView(num_tokens=num_tokens, num_choices=num_choices, turn=turn, num_outputs=num_outputs)
