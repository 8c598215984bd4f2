"""What a worker says of itself: the one place that makes a WorkerInfo from its spec and from what its rank tells."""

from __future__ import annotations

import os
import secrets

from msgspec.structs import replace

from cluster.spec import WorkerSpec
from cluster.types import WorkerInfo
from engine.kv.layout import KVLayout
from engine.messages import RankReady


def starting_info(spec: WorkerSpec) -> WorkerInfo:
    """A new incarnation, before its address and its engine are known."""
    return WorkerInfo(
        worker_id=spec.worker_id,
        incarnation=secrets.token_hex(16),
        epoch=1,
        role=spec.role,
        state="starting",
        address="",
        model=spec.engine.served_model_name or spec.engine.model,
        pool=spec.pool,
        node=spec.node,
        pid=os.getpid(),
    )


def describe_ready(info: WorkerInfo, ready: RankReady, layout: KVLayout) -> WorkerInfo:
    """The same worker, with its engine warm. Its canaries make it ready (worker/role.py)."""
    return replace(
        info,
        identity=ready.identity,
        kv_fingerprint=layout.fingerprint(),
        numerics_class=ready.numerics_class,
        block_size=ready.block_size,
        max_model_len=ready.max_model_len,
        max_num_seqs=ready.max_num_seqs,
        vocab_size=ready.vocab_size,
        eos_token_ids=ready.eos_token_ids,
        profile=ready.profile,
    )
