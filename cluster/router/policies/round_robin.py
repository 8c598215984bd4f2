"""Each worker in turn, whatever its load: for tests, and for machines that are all alike."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked
from cluster.router.views import RequestView, WorkerView


class RoundRobin:
    """Decode worker and first source by the turn; the other sources follow in circular order."""

    name = "round-robin"
    wants_cache = False

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        first = request.turn % len(prefill) if prefill else 0
        chosen = decode[request.turn % len(decode)]
        return Placement(
            decode=chosen.info.worker_id,
            sources=ranked(chosen, [view.info.worker_id for view in (*prefill[first:], *prefill[:first])]),
            why=f"its turn: placement {request.turn} of this router",
        )
