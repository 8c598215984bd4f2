"""Each worker in turn, whatever its load: for tests, and for machines that are all alike."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, RequestView, WorkerView


class RoundRobin:
    """Decode worker and first source by the turn; the other sources follow in circular order."""

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        first = request.turn % len(prefill) if prefill else 0
        sources = [*prefill[first:], *prefill[:first]]
        return Placement(
            decode=decode[request.turn % len(decode)].info.worker_id,
            sources=tuple(view.info.worker_id for view in sources),
        )
