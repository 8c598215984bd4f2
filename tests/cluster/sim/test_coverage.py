"""A long run that shows too little is told apart from one that found nothing wrong."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.sim.chaos import CELLS, KINDS
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.corruption import CorruptionCounts
from cluster.sim.coverage import MOST_EMPTY, gaps
from cluster.sim.many import Summary
from cluster.sim.scenario import NUM_FAULTS, NUM_REQUESTS


def summary(num_seeds: int, *, num_healthy: int = 200_000) -> Summary:
    """A run in which everything happened often enough."""
    counts = Counter(dict.fromkeys(((kind, "grpc") for kind in CORRUPTIONS), 100))
    return Summary(
        first=0,
        num_seeds=num_seeds,
        cells=Counter(dict.fromkeys(CELLS, 1 + num_seeds * NUM_FAULTS // len(CELLS))),
        corruption=CorruptionCounts(injected=counts, found=counts.copy(), num_healthy=num_healthy),
        codes=Counter(finished=num_seeds * NUM_REQUESTS),
        switches=Counter(switched=2 * num_seeds),
        num_moved=num_seeds,
    )


@pytest.mark.parametrize("num_seeds", [1, 300, 10_000])
def test_nothing_is_missing_where_everything_happened(num_seeds: int) -> None:
    assert gaps(summary(num_seeds)) == []


def test_two_percent_of_the_cells_may_be_empty_after_300_seeds_none_after_10000() -> None:
    at_most = int(MOST_EMPTY * len(CELLS))
    for num_seeds, num_empty, fine in ((300, at_most, True), (300, at_most + 1, False), (10_000, 1, False)):
        run = summary(num_seeds)
        for cell in CELLS[:num_empty]:
            del run.cells[cell]
        run.cells[CELLS[-1]] += 10 * num_seeds  # as many strikes as before
        assert (gaps(run) == []) is fine, (num_seeds, num_empty)


def test_a_kind_that_never_struck_is_named() -> None:
    run = summary(300)
    run.cells = Counter({cell: 20 for cell in CELLS if cell[0] != KINDS[0]})
    run.corruption.injected = Counter({("flip", "grpc"): 5})
    run.corruption.found = Counter({("flip", "grpc"): 5})
    words = "\n".join(gaps(run))
    assert f"{KINDS[0]!r} never struck" in words and "'zero' was never injected" in words


def test_a_corruption_that_was_not_found_is_missing_however_short_the_run() -> None:
    run = summary(2)
    run.corruption.found["flip", "grpc"] -= 1
    assert len(gaps(run)) == 1


def test_lost_requests_idle_clusters_and_small_counts_are_missing() -> None:
    short = summary(10_000, num_healthy=99_999)
    idle = summary(300)
    idle.switches, idle.cells = Counter(switched=299), Counter(dict.fromkeys(CELLS, 1))
    failing = summary(300)
    failing.codes = Counter(finished=300, cancelled=300 * NUM_REQUESTS - 300)
    lost = summary(1)
    lost.codes = Counter(finished=NUM_REQUESTS - 1)
    assert [len(gaps(run)) for run in (short, idle, failing, lost)] == [1, 2, 1, 1]
