"""Workers that hold the prompt's beginning, unless they are busier than that is worth. Counts tokens, not time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked, rows_in_words, share
from cluster.router.views import RequestView, WorkerView

MOST_AHEAD = 0.25  # of its batch that a decode worker may have in use beyond the least loaded one


class PrefixAware:
    """Sources by the tokens that they would have to compute first: queued ones and what the prompt misses there.

    Among the decode workers that are not much busier than the least loaded one, the one that holds most.
    """

    name = "prefix-aware"
    wants_cache = True

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        limit = min(share(view) for view in decode) + MOST_AHEAD
        near = [view for view in decode if share(view) <= limit]
        chosen = min(
            ((-view.cached_tokens, share(view), rng.random(), view) for view in near), key=lambda scored: scored[:3]
        )[3]
        order = sorted(
            ((view.queued_tokens - view.cached_tokens, rng.random(), view) for view in prefill),
            key=lambda scored: scored[:2],
        )
        why = f"{chosen.info.worker_id} holds {chosen.cached_tokens} of {request.num_tokens} tokens"
        why += f" and has {rows_in_words(chosen)}"
        if order:
            first = order[0][2]
            why += f"; {first.info.worker_id} holds {first.cached_tokens} and has {first.queued_tokens} queued"
        sources = ranked(chosen, [view.info.worker_id for _, _, view in order])
        return Placement(decode=chosen.info.worker_id, sources=sources, why=why)
