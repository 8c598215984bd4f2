"""The placement that costs the fewest predicted milliseconds, the request's own and those that it costs others.

Conditional prefill falls out of it: where the decode worker alone is predicted to be done sooner than with the best
source, counting what its running requests would lose, the request goes there without sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked
from cluster.router.predict import DecodeCosts, Prediction, Predictor
from cluster.router.views import RequestView, WorkerView

MAX_SOURCES_COMPARED = 4  # the soonest ones; a farther one with a much better link is not worth looking for
MAX_CONSIDERED = 8


class Predicted:
    """See cluster/router/predict.py for the arithmetic. Equal costs are ordered at random."""

    name = "predicted"
    wants_cache = True

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """See Policy."""
        predictor = Predictor(request)
        timed = [(sum(ms := predictor.source_ms(view)), rng.random(), ms, view) for view in prefill]
        timed.sort(key=lambda scored: scored[:2])
        scored: list[tuple[float, float, Prediction, WorkerView]] = []
        for view in decode:
            costs = DecodeCosts(request, view)
            options = [predictor.alone(view, costs)]
            usable = [(ms, source) for _, _, ms, source in timed if source.info.worker_id not in view.avoid]
            if usable:
                near = usable[:MAX_SOURCES_COMPARED]
                best = min(near, key=lambda pair: sum(pair[0]) + predictor.transfer_ms(pair[1], view, pair[0][1]))
                options.append(predictor.remote(view, costs, best[1], best[0]))
            scored += [(option.cost_ms, rng.random(), option, view) for option in options]
        scored.sort(key=lambda one: one[:2])
        _, _, best_one, chosen = scored[0]
        alone = best_one.source is None
        sources: tuple[str, ...] = ()
        if not alone:
            first = [view for _, _, _, view in timed if view.info.worker_id == best_one.source]
            others = [view for _, _, _, view in timed if view.info.worker_id != best_one.source]
            sources = ranked(chosen, first + others)
        return Placement(
            decode=best_one.decode,
            sources=sources,
            alone=alone and bool(prefill),
            why="the least predicted cost: its own time to the end, and what it costs others",
            considered=tuple(option for _, _, option, _ in scored[:MAX_CONSIDERED]),
        )
