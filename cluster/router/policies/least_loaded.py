"""The decode worker with the smallest share of its batch in use, the sources with the fewest queued tokens first."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, RequestView, WorkerView


class LeastLoaded:
    """Loads are compared as they are known now; equal ones are ordered at random, so that routers do not herd."""

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        chosen = min(
            ((view.num_sequences / max(1, view.info.max_num_seqs), rng.random(), view) for view in decode),
            key=lambda scored: scored[:2],
        )[2]
        ranked = sorted(((view.queued_tokens, rng.random(), view) for view in prefill), key=lambda scored: scored[:2])
        return Placement(decode=chosen.info.worker_id, sources=tuple(view.info.worker_id for _, _, view in ranked))
