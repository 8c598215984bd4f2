"""The placement that costs the fewest predicted milliseconds, the request's own and those that it costs others.

Conditional prefill falls out of it: where the decode worker alone is predicted to be done sooner than with the best
source, counting what its running requests would lose, the request goes there without sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster.router.policies.base import Placement, ranked
from cluster.router.predict import DecodeCosts, Prediction, Predictor, SourceCosts
from cluster.router.views import RequestView, WorkerView

MAX_SOURCES_COMPARED = 4  # the soonest ones; a farther one with a much better link is not worth looking for
MAX_DECODERS_COMPARED = 4
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
        timed = [(costs.ready_ms, rng.random(), costs) for costs in (SourceCosts(request, view) for view in prefill)]
        timed.sort(key=lambda scored: scored[:2])
        sources = [costs for _, _, costs in timed]
        scored: list[tuple[float, float, Prediction, WorkerView]] = []
        for view, costs in _nearest([(view, DecodeCosts(request, view)) for view in decode], rng):
            usable = [source for source in sources if source.worker_id not in view.avoid] if view.avoid else sources
            soonest = _soonest(view, usable) if usable else None
            options = []
            if soonest is None or (request.may_be_alone and _may_compute(view, soonest)):
                options.append(predictor.alone(view, costs))
            if soonest is not None:
                options.append(predictor.remote(view, costs, soonest))
            scored += [(option.cost_ms, rng.random(), option, view) for option in options]
        scored.sort(key=lambda one: one[:2])
        _, _, best_one, chosen = scored[0]
        alone = best_one.source is None
        order: tuple[str, ...] = ()
        if not alone:
            ids = [source.worker_id for source in sources]
            ids.sort(key=lambda worker_id: worker_id != best_one.source)  # the others stay in their order
            order = ranked(chosen, ids)
        return Placement(
            decode=best_one.decode,
            sources=order,
            alone=alone and bool(prefill),
            why="the least predicted cost: its own time to the end, and what it costs others",
            considered=tuple(option for _, _, option, _ in scored[:MAX_CONSIDERED]),
        )


def _may_compute(decode: WorkerView, source: SourceCosts) -> bool:
    """Whether it may compute the prompt itself: prompt after prompt behind a full batch slows all rows beyond measure.

    Each of them alone may look cheaper than a queue elsewhere. What it holds more of than the source is no such prompt.
    """
    return decode.has_row or decode.cached_tokens > source.cached_tokens


def _nearest(decode: list[tuple[WorkerView, DecodeCosts]], rng: Random) -> list[tuple[WorkerView, DecodeCosts]]:
    """The decode workers that are worth a closer look: those that cost least, and the one that holds most."""
    if len(decode) <= MAX_DECODERS_COMPARED:
        return decode
    most = max(decode, key=lambda pair: pair[0].cached_tokens)
    near = sorted(decode, key=lambda pair: (pair[1].least_ms, rng.random()))[:MAX_DECODERS_COMPARED]
    return near if most in near or not most[0].cached_tokens else [*near, most]


def _soonest(decode: WorkerView, sources: Sequence[SourceCosts]) -> SourceCosts:
    """The best source for this decode worker. `sources` are in the order of their `ready_ms`."""
    best, best_ms = sources[0], float("inf")
    for source in sources[:MAX_SOURCES_COMPARED]:
        if source.ready_ms >= best_ms:
            break
        ms = source.ready_ms + source.transfer_ms(decode)
        if ms < best_ms:
            best, best_ms = source, ms
    return best
