"""Percentiles."""

from __future__ import annotations

from cluster.bench.report import percentile


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.75, 0.99)] == [2.0, 3.0, 4.0]
    assert percentile([], 0.5) == 0.0
