"""Whole histories under faults (cluster/sim/scenario.py): no violation, and every request is accounted for."""

from __future__ import annotations

import pytest

from cluster.sim.coverage import gaps
from cluster.sim.many import Summary, run_many
from cluster.sim.scenario import NUM_FAULTS, NUM_REQUESTS, run_seed


def check(summary: Summary) -> None:
    """Nothing was violated, every corruption was found, and requests did run."""
    assert not summary.violations
    assert summary.corruption.found == summary.corruption.injected
    assert summary.codes.total() == summary.num_seeds * NUM_REQUESTS
    assert summary.codes["finished"] > 0.6 * summary.codes.total()
    assert set(summary.codes) <= {
        *(
            "finished",
            "cancelled",
            "router lost",
            "deadline_exceeded",
            "decode_worker_lost",
            "poison ended",
            "no_worker",
        )
    }
    assert summary.num_moved and summary.switches["switched"] > summary.num_seeds


@pytest.mark.timeout(600)
def test_seeds_without_a_violation() -> None:
    """Some; 300 and their table are `make sim`, which .ci/run calls (cluster/sim/coverage.py says what they show)."""
    summary = run_many(0, 24, jobs=2)
    check(summary)
    assert summary.cells.total() > 0.9 * 24 * NUM_FAULTS
    assert summary.corruption.num_healthy > 24 and summary.num_injected > 24


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_10000_seeds_without_a_violation_or_an_empty_cell() -> None:
    summary = run_many(1000, 10_000, jobs=2)
    check(summary)
    assert gaps(summary) == []


def test_the_same_seed_gives_the_same_journal() -> None:
    one, two = run_seed(11, trace=True), run_seed(11, trace=True)
    assert one.journal and one.journal == two.journal
    assert one.cells == two.cells and one.codes == two.codes


def test_trace_changes_nothing() -> None:
    one, two = run_seed(12, trace=True), run_seed(12)
    assert (one.cells, one.codes, one.virtual_s) == (two.cells, two.codes, two.virtual_s) and not two.journal
