"""The best static split against changing roles, load by load: how far each keeps its targets, and what it does beyond.

DistServe (OSDI 2024) calls goodput the highest rate at which nine of ten requests keep their targets; `keeps` says that
of each phase, as load. Above it, what still keeps the targets tells how a system degrades.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from cluster.bench.roles.compare import Case, run_case
from cluster.bench.roles.setting import Setting, ideal_of
from cluster.spec import RolesSpec
from cluster.worker.lifeline import die_with_parent

LOADS = (0.6, 0.7, 0.8, 0.85, 0.9)
KEPT = 0.9
NUM_SPLITS = 5


def compare_loads(
    setting: Setting,
    num_workers: int,
    *,
    seed: int = 0,
    spec: RolesSpec | None = None,
    loads: tuple[float, ...] = LOADS,
) -> dict[str, Any]:
    """One seed and one round of the phases at each load (of the ideal, setting.ideal_rate).

    Each load has static splits of its own, between what the phases want; roles change from the middle one on. Shares
    are of 1: of all requests, of their tokens, and of the requests of the phase that fares worst.
    """
    ideal = [ideal_of(setting, number) for number in range(len(setting.phases))]
    wanted = sorted(one["prefill_share"] * num_workers for one in ideal)
    splits = _between(wanted[0], wanted[-1], num_workers)
    base = Case(setting=replace(setting, rounds=1), num_workers=num_workers, seed=seed, mode="static", spec=spec)
    cases = []
    for load in loads:
        at_load = replace(base, setting=base.setting.scaled(load / max(one["load"] for one in ideal)))
        cases += [replace(at_load, split=split) for split in splits]
        cases.append(replace(at_load, mode="dynamic", split=splits[len(splits) // 2]))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, spawn, initializer=die_with_parent) as pool:
        runs = list(pool.map(run_case, cases))
    each = len(splits) + 1
    rows = [_row(load, runs[each * i : each * (i + 1)]) for i, load in enumerate(loads)]
    return {
        "workers": num_workers,
        "seed": seed,
        "splits": splits,
        "targets": {"ttft_ms": setting.ttft_ms, "tpot_ms": setting.tpot_ms},
        "rows": rows,
        "keeps": {way: _keeps(rows, way) for way in ("static", "dynamic")},
        "runs": runs,
    }


def _between(low: float, high: float, num_workers: int) -> list[int]:
    """Some splits from what the one phase wants to what the other does."""
    most = num_workers - 1
    step = (high - low) / (NUM_SPLITS - 1)
    return sorted({min(most, max(1, round(low + step * i))) for i in range(NUM_SPLITS)})


def _row(load: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One load. Every share of `static` is that of the split which is best by it."""
    *static, dynamic = [_shares(run) for run in runs]
    best = {key: max(shares[key] for shares in static) for key in dynamic}
    return {
        "load": load,
        "requests_per_s": runs[-1]["requests_per_s"],
        "static": best,
        "dynamic": dynamic,
        "ratio": {key: round(dynamic[key] / max(1e-9, best[key]), 3) for key in ("requests", "tokens")},
        "changes": runs[-1]["switches"]["to_prefill"] + runs[-1]["switches"]["to_decode"],
    }


def _shares(run: dict[str, Any]) -> dict[str, float]:
    return {
        "requests": run["share"],
        "tokens": round(run["goodput_tokens_per_s"] / run["tokens_per_s"], 4),
        "worst_phase": min(phase["share"] for phase in run["phases"].values()),
    }


def _keeps(rows: list[dict[str, Any]], way: str) -> float | None:
    """The highest load at which nine of ten requests of either phase keep their targets; None if there is none."""
    return max((row["load"] for row in rows if row[way]["worst_phase"] >= KEPT), default=None)
