"""The same load on the same workers: every static split, colocation with chunked prefill, and roles that change.

    1. sweep     every sensible split, and several chunk sizes for colocation: first seed, one round of shorter phases
    2. compare   the best splits and chunk size, and the planner started from the best split, on every seed and all
                 rounds; of the splits the one that is best there counts
    3. variants  loads that don't suit changing roles, on fewer workers: where it doesn't pay

A static split may be best in requests per second by giving up the phase that has few of them. So two best ones are
kept: by requests per second, and by the tokens (of prompts and answers) of the requests that kept both targets.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product, repeat
from statistics import median
from typing import Any, Literal

import msgspec

from cluster.bench.planner_bench import observation
from cluster.bench.report import percentile
from cluster.bench.roles.control import Control
from cluster.bench.roles.figures import Requests, load_figures
from cluster.bench.roles.machine import Job
from cluster.bench.roles.model import ClusterModel
from cluster.bench.roles.setting import Phase, Setting, ideal_of, ideal_rate, replayed_load, shifting_load
from cluster.control.planner import Planner
from cluster.spec import RolesSpec
from cluster.worker.lifeline import die_with_parent

Mode = Literal["static", "colocated", "dynamic"]
SWEEP_PHASE_S = 300.0
LONGER = 6.0  # answers, in the variant of long ones
CHUNK_MS = (0.96, 1.4, 2.0)  # of the TPOT target: bounds of a mixed step that colocation is tried with


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `split`: prefill workers (at the start); `chunk_ms`: bound of a step, 0 the hardware's."""

    setting: Setting
    num_workers: int
    seed: int
    mode: Mode
    split: int = 0
    chunk_ms: float = 0.0
    spec: RolesSpec | None = None
    traces: tuple[Requests, ...] = ()


def run_case(case: Case) -> dict[str, Any]:
    """Run one and sum it up."""
    setting = case.setting
    load = (
        replayed_load(setting, list(case.traces), case.num_workers)
        if case.traces
        else shifting_load(setting, load_figures(), case.num_workers, case.seed)
    )
    hardware = [setting.kind] * case.num_workers
    control = Control(setting, hardware, case.split, case.spec) if case.mode == "dynamic" else None
    model = ClusterModel(setting, hardware, case.split, watcher=control, max_step_ms=case.chunk_ms or None)
    jobs = model.run(load)
    figures: dict[str, Any] = {
        "mode": case.mode,
        "split": case.split,
        "chunk_ms": case.chunk_ms,
        "seed": case.seed,
        **goodput(setting, jobs),
    }
    if control is not None:
        changes = model.changes
        figures["switches"] = {
            "to_prefill": changes.to_prefill,
            "to_decode": changes.to_decode,
            "rolled_back": changes.rolled_back,
            "moved": changes.moved,
            "begun_again": changes.begun_again,
            "mean_ms": round(changes.busy_ms / max(1, changes.to_prefill + changes.to_decode + changes.rolled_back), 1),
        }
        figures["prefill_workers"] = [[round(at, 1), num] for at, num in control.timeline]
        figures["idle_because"] = dict(control.words.most_common(4))
    return figures


def goodput(setting: Setting, jobs: Sequence[Job]) -> dict[str, Any]:
    """What kept both targets: requests and their tokens per second of the whole load, and shares by phase."""
    names = [phase.trace for phase in setting.phases]
    num, good = [0] * len(names), [0] * len(names)
    tokens = good_tokens = 0
    ttft: list[list[float]] = [[] for _ in names]
    tpot: list[list[float]] = [[] for _ in names]
    refused = 0
    for job in jobs:
        phase = int(job.at / setting.phase_s) % len(names)
        num[phase] += 1
        tokens += job.prompt + job.outputs
        refused += job.first_at < 0.0
        if job.end_at < 0.0:
            continue
        first_ms = (job.first_at - job.at) * 1000
        each_ms = (job.end_at - job.first_at) * 1000 / (job.outputs - 1) if job.outputs > 1 else 0.0
        ttft[phase].append(first_ms)
        tpot[phase].append(each_ms)
        if first_ms <= setting.ttft_ms and each_ms <= setting.tpot_ms:
            good[phase] += 1
            good_tokens += job.prompt + job.outputs
    shares = [g / max(1, n) for g, n in zip(good, num, strict=True)]
    return {
        "requests": len(jobs),
        "requests_per_s": round(len(jobs) / setting.seconds, 3),
        "goodput_per_s": round(sum(good) / setting.seconds, 3),
        "tokens_per_s": round(tokens / setting.seconds, 1),
        "goodput_tokens_per_s": round(good_tokens / setting.seconds, 1),
        "share": round(sum(good) / max(1, len(jobs)), 4),
        "phases_share": round(sum(shares) / len(shares), 4),
        "never_served": refused,
        "phases": {
            name: {
                "requests": num[i],
                "share": round(shares[i], 4),
                **{f"ttft_p{p}_ms": round(percentile(ttft[i], p / 100), 1) for p in (50, 90) if ttft[i]},
                **{f"tpot_p{p}_ms": round(percentile(tpot[i], p / 100), 2) for p in (50, 90) if tpot[i]},
            }
            for i, name in enumerate(names)
        },
    }


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `neap bench roles` was asked. `load` scales the committed rates; `traces` replace the drawn requests."""

    workers: int = 64
    first_seed: int = 0
    seeds: int = 5
    load: float = 1.0
    spec: RolesSpec | None = None
    traces: tuple[Requests, ...] = ()
    variants: bool = True


def compare(setting: Setting, options: CompareOptions) -> dict[str, Any]:
    """All three parts."""
    setting = setting.scaled(options.load)
    base = Case(
        setting=setting,
        num_workers=options.workers,
        seed=options.first_seed,
        mode="static",
        spec=options.spec,
        traces=options.traces,
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, spawn, initializer=die_with_parent) as pool:
        once = replace(base, setting=replace(setting, rounds=1, phase_s=min(SWEEP_PHASE_S, setting.phase_s)))
        swept = list(pool.map(run_case, [*_splits(once), *_chunks(once)]))
        static = [one for one in swept if one["mode"] == "static"]
        chunked = (one for one in swept if one["mode"] == "colocated")
        chunk_ms = max(chunked, key=lambda one: one["goodput_tokens_per_s"])
        splits = {
            split: list(pool.map(run_case, _seeded(replace(base, split=split), options.seeds)))
            for split in _best_splits(static)
        }
        best, by_tokens = _best_of(splits, "goodput_per_s"), _best_of(splits, "goodput_tokens_per_s")
        rows = {
            "colocated": replace(base, mode="colocated", chunk_ms=chunk_ms["chunk_ms"]),
            "dynamic": replace(base, mode="dynamic", split=by_tokens),
        }
        runs = {
            "static": splits[best],
            "static_tokens": splits[by_tokens],
            **{name: list(pool.map(run_case, _seeded(case, options.seeds))) for name, case in rows.items()},
        }
        variants = _variants(setting, options, pool.map) if options.variants and not options.traces else {}
    return {
        "workers": options.workers,
        "first_seed": options.first_seed,
        "load": options.load,
        "rounds": setting.rounds,
        "roles": msgspec.to_builtins(options.spec or RolesSpec()),
        "hardware": setting.machines,
        "targets": {"ttft_ms": setting.ttft_ms, "tpot_ms": setting.tpot_ms},
        "ideal": {phase.trace: ideal_of(setting, number) for number, phase in enumerate(setting.phases)},
        "best_split": best,
        "tokens_split": by_tokens,
        "chunk_ms": chunk_ms["chunk_ms"],
        **{name: _summed(some) for name, some in runs.items()},
        "ratios": _ratios(runs),
        "switches": [one["switches"] for one in runs["dynamic"]],
        "sweep": swept,
        "splits": {str(split): some for split, some in splits.items()},
        "runs": runs,
        "variants": variants,
    }


def _seeded(case: Case, seeds: int) -> list[Case]:
    return [replace(case, seed=case.seed + number) for number in range(1 if case.traces else seeds)]


def _splits(case: Case) -> list[Case]:
    """Every split of a small cluster; of a large one some twelve from a little below what the one phase wants."""
    num = case.num_workers
    step = max(1, num // 20)
    low = 1
    if step > 1:
        low = int(
            min(ideal_of(case.setting, number)["prefill_share"] for number in range(len(case.setting.phases))) * num
        )
    return [replace(case, split=split) for split in range(max(1, low - step), num, step)]


def _best_splits(swept: list[dict[str, Any]]) -> list[int]:
    """The two best by requests per second, and by tokens per second: phases are shorter in the sweep."""
    found: set[int] = set()
    for key in ("goodput_per_s", "goodput_tokens_per_s"):
        found.update(one["split"] for one in sorted(swept, key=lambda one: -one[key])[:2])
    return sorted(found)


def _best_of(splits: dict[int, list[dict[str, Any]]], key: str) -> int:
    """The split with the highest median over the seeds."""
    return max(splits, key=lambda split: median(one[key] for one in splits[split]))


def _chunks(case: Case) -> list[Case]:
    target = case.setting.tpot_ms
    return [replace(case, mode="colocated", chunk_ms=round(factor * target, 1)) for factor in CHUNK_MS]


def _summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Least, median and most over the seeds."""

    def three(values: Iterable[float]) -> dict[str, float]:
        values = list(values)
        return {"min": min(values), "median": round(median(values), 4), "max": max(values)}

    return {
        "goodput_per_s": three(one["goodput_per_s"] for one in runs),
        "requests_per_s": three(one["requests_per_s"] for one in runs),
        "goodput_tokens_per_s": three(one["goodput_tokens_per_s"] for one in runs),
        "tokens_per_s": three(one["tokens_per_s"] for one in runs),
        "phases_share": three(one["phases_share"] for one in runs),
        "shares": {name: three(one["phases"][name]["share"] for one in runs) for name in runs[0]["phases"]},
        "never_served": three(one["never_served"] for one in runs),
    }


def _ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of the dynamic runs to the others, seed by seed: medians."""
    found: dict[str, Any] = {}
    for name, key in product(("static", "static_tokens", "colocated"), ("goodput_per_s", "goodput_tokens_per_s")):
        ratios = [d[key] / max(1e-9, s[key]) for d, s in zip(runs["dynamic"], runs[name], strict=True)]
        found[f"{key}_over_{name}"] = {
            "min": round(min(ratios), 3),
            "median": round(median(ratios), 3),
            "max": round(max(ratios), 3),
        }
    return found


def as_loaded(setting: Setting, phase: Phase, other: Phase, machines: str = "") -> Phase:
    """`other` at the rate that loads the workers, or those `machines`, as `phase` loads the setting's."""

    def rate(one: Phase, machines: str) -> float:
        alone = replace(setting, phases=(one,), phase_s=4000 / one.rate, rounds=1, machines=machines)
        return ideal_rate(alone, shifting_load(alone, load_figures(), 1, 0))[0]

    here = setting.machines
    return replace(other, rate=phase.rate * rate(other, machines or here) / rate(phase, here))


def on_machines(setting: Setting, machines: str) -> Setting:
    """The same on other machines, at rates that load them alike. Raises ValueError for one that is not in the file."""
    if machines not in setting.hardware:
        raise ValueError(f"machines {machines!r}: expected one of {', '.join(setting.hardware)}")
    phases = tuple(as_loaded(setting, phase, phase, machines) for phase in setting.phases)
    return replace(setting, machines=machines, phases=phases)


def _variants(setting: Setting, options: CompareOptions, run_all: Any) -> dict[str, Any]:
    """Where changing roles does not pay. Each against its own best static split."""
    num = min(options.workers, 8)
    steady = {
        f"only {phase.trace}": replace(setting, phases=(phase,), phase_s=setting.phase_s * 2, rounds=1)
        for phase in setting.phases
    }
    longer = [replace(phase, longer=LONGER) for phase in setting.phases]
    long = replace(setting, phases=tuple(map(as_loaded, repeat(setting), setting.phases, longer)), rounds=1)
    short = replace(setting, phase_s=30.0, rounds=20)
    loads = {**steady, "phases of 30 s": short, f"answers {LONGER:g} times as long": long}
    found = {}
    for name, one in loads.items():
        base = Case(setting=one, num_workers=num, seed=options.first_seed, mode="static", spec=options.spec)
        cases = [replace(base, split=split) for split in range(1, num)]
        best = max(run_all(run_case, cases), key=lambda figures: figures["phases_share"])
        dynamic = next(iter(run_all(run_case, [replace(base, mode="dynamic", split=best["split"])])))
        found[name] = {
            "workers": num,
            "static_split": best["split"],
            "static": best["phases_share"],
            "dynamic": dynamic["phases_share"],
            "switches": dynamic["switches"]["to_prefill"] + dynamic["switches"]["to_decode"],
        }
    return found


def planner_ms(num_workers: int, runs: int = 30) -> dict[str, float]:
    """Milliseconds of the planner's fastest and median decision, and CPU time of one, in a cluster of this size."""
    seen, planner = observation(num_workers), Planner(RolesSpec())
    took = []
    cpu_s = time.process_time()
    for _ in range(runs):
        began = time.perf_counter()
        planner.plan(seen)
        took.append((time.perf_counter() - began) * 1000)
    cpu_ms = (time.process_time() - cpu_s) * 1000 / runs
    return {"min": round(min(took), 2), "median": round(median(took), 2), "cpu": round(cpu_ms, 2)}
