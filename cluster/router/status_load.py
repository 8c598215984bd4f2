"""JSON of /load and /server_info."""

from __future__ import annotations

import dataclasses
from typing import Any

from cluster.router.service import RouterService
from cluster.router.snapshot import DispatchStatus
from cluster.router.status import version

Json = dict[str, Any]
_PRIVATE = frozenset({"api_key", "model_path", "registry", "served_model_name"})
_WORKER_FIELDS = (
    *("worker_id", "role", "state", "pool", "model", "identity", "numerics_class", "kv_fingerprint"),
    *("block_size", "max_model_len", "max_num_seqs", "vocab_size"),
)


def load_json(service: RouterService, dispatch: DispatchStatus) -> Json:
    """The body of /load. `server_load` is what vLLM's has: requests in flight here."""
    admission, spec = service.admission, service.spec
    return {
        "server_load": admission.num_queued + admission.num_running,
        "queued": admission.num_queued,
        "running": admission.num_running,
        "max_queue": spec.max_queue,
        "max_running": spec.max_running,
        "workers": [
            {
                "worker_id": worker.info.worker_id,
                "role": worker.info.role,
                "running": worker.load.num_running,
                "waiting": worker.load.num_waiting,
                "pulling": worker.load.num_pulling,
                "served": worker.load.num_served,
                "queued_tokens": worker.load.queued_tokens,
                "kv_use": round(worker.load.num_referenced_blocks / max(worker.load.num_blocks, 1), 4),
            }
            for worker in dispatch.workers
            if worker.up
        ],
    }


def server_info_json(service: RouterService) -> Json:
    """The body of /server_info: options as they are, without the key and without paths of this machine."""
    spec, text = service.spec, service.text
    return {
        "version": version(),
        "model": spec.served_model_name,
        "has_api_key": bool(spec.api_key),
        "router": {name: getattr(spec, name) for name in spec.__struct_fields__ if name not in _PRIVATE},
        "sampling_defaults": dataclasses.asdict(service.defaults),
        "eos_token_ids": None if text is None else list(text.eos_token_ids),
        "workers": [{name: getattr(peer.info, name) for name in _WORKER_FIELDS} for peer in service.links.peers()],
    }
