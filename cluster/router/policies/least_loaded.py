"""The decode worker with the smallest share of its batch in use, the sources with the fewest queued tokens first."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked, rows_in_words, share
from cluster.router.views import RequestView, WorkerView


class LeastLoaded:
    """Loads are compared as they are known now; equal ones are ordered at random, so that routers do not herd."""

    name = "least-loaded"
    wants_cache = False

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        chosen = min(((share(view), rng.random(), view) for view in decode), key=lambda scored: scored[:2])[2]
        order = sorted(((view.queued_tokens, rng.random(), view) for view in prefill), key=lambda scored: scored[:2])
        why = f"{chosen.info.worker_id} has {rows_in_words(chosen)}, the smallest share"
        if order:
            why += f"; {order[0][2].info.worker_id} has the fewest tokens queued ({order[0][0]})"
        sources = ranked(chosen, [view.info.worker_id for _, _, view in order])
        return Placement(decode=chosen.info.worker_id, sources=sources, why=why)
