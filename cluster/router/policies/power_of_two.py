"""The better of two workers drawn at random: near the least loaded one, without every router running to the same.

M. Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12 (2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked, rows_in_words, share
from cluster.router.views import RequestView, WorkerView


class PowerOfTwo:
    """Two decode workers by the share of their batch in use, two sources by queued tokens; other sources follow."""

    name = "power-of-two"
    wants_cache = False

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        drawn = rng.sample(decode, min(2, len(decode)))
        chosen = min(drawn, key=share)
        order = rng.sample(prefill, len(prefill))
        order[:2] = sorted(order[:2], key=lambda view: view.queued_tokens)
        names = " and ".join(view.info.worker_id for view in drawn)
        why = f"of {names}, drawn at random, {chosen.info.worker_id} has {rows_in_words(chosen)}"
        return Placement(
            decode=chosen.info.worker_id, sources=ranked(chosen, [view.info.worker_id for view in order]), why=why
        )
