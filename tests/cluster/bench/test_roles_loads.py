"""Static splits against changing roles, load by load."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.bench.roles.compare import Case, run_case
from cluster.bench.roles.loads import compare_loads
from cluster.bench.roles.setting import ideal_of, load_setting


def test_each_load_has_its_own_runs_and_best_splits() -> None:
    setting = replace(load_setting(), phase_s=40.0)
    found = compare_loads(setting, 4, seed=5, loads=(0.1, 3.0))
    assert found["splits"] == [3]  # of four workers the phases want 2.6 and 3.7
    low, high = found["rows"]
    assert high["requests_per_s"] > low["requests_per_s"]
    for way in ("static", "dynamic"):
        assert low[way]["worst_phase"] > high[way]["worst_phase"]
        assert all(0.0 <= share <= 1.0 for row in (low, high) for share in row[way].values())
        assert found["keeps"][way] == (0.1 if low[way]["worst_phase"] >= 0.9 else None)

    factor = 3.0 / max(ideal_of(setting, number)["load"] for number in (0, 1))
    case = Case(setting=replace(setting, rounds=1).scaled(factor), num_workers=4, seed=5, mode="static", split=3)
    alone = run_case(case)
    assert high["static"]["requests"] == alone["share"]
    assert high["ratio"]["requests"] == pytest.approx(high["dynamic"]["requests"] / alone["share"], abs=1e-3)
