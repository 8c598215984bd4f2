"""The bench of the planner decides something, however many workers there are."""

from __future__ import annotations

import pytest

from cluster.bench import planner_bench


@pytest.mark.parametrize("num_workers", [64, 1024])
def test_it_measures_decisions_that_change_something(num_workers: int) -> None:
    found = planner_bench.decide(num_workers, runs=2)
    assert found.num_changes > 0 and 0.0 < found.fastest_ms <= found.median_ms


def test_it_prints_a_line_per_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planner_bench, "SIZES", (8, 16))
    planner_bench.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["workers", "8", "16"]
