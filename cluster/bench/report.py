"""Figures from outcomes: pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from cluster.bench.client import Outcome


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above (nearest rank). 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def summarise(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float | int | dict[str, int]]:
    """Times in ms. Time per token is from the first token to the end, over the tokens after the first."""
    good = [outcome for outcome in outcomes if not outcome.error]
    first = [outcome.first_token_s * 1000 for outcome in good]
    each = [(o.total_s - o.first_token_s) * 1000 / (o.num_tokens - 1) for o in good if o.num_tokens > 1]
    figures: dict[str, float | int | dict[str, int]] = {"requests": len(outcomes), "seconds": round(seconds, 3)}
    figures["requests_per_s"] = round(len(good) / seconds, 2)
    figures["output_tokens_per_s"] = round(sum(outcome.num_tokens for outcome in good) / seconds, 1)
    for name, values in (("ttft", first), ("time_per_token", each)):
        for share in (50, 95, 99):
            figures[f"{name}_p{share}_ms"] = round(percentile(values, share / 100), 2)
    figures["errors"] = dict(Counter(outcome.error for outcome in outcomes if outcome.error))
    return figures
