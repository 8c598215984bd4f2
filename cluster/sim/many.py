"""Many seeds over several processes, and what they showed together. Each seed is run for itself (scenario.py)."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.sim.chaos import CELLS, KINDS
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.corruption import CorruptionCounts
from cluster.sim.scenario import SeedReport, run_seed
from cluster.sim.stages import STAGES

CHUNK = 8  # seeds handed to a process at a time
CHUNKS_PER_PROCESS = 250  # a fresh one after so many, whatever the run's length
MAX_KEPT = 50  # violations kept in words


@dataclass(kw_only=True)
class Summary:
    """The sum of many reports."""

    first: int
    num_seeds: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0  # of all processes, their starts not counted
    virtual_s: float = 0.0
    num_bad_seeds: int = 0
    violations: list[tuple[int, str]] = field(default_factory=list)
    cells: Counter[tuple[str, str]] = field(default_factory=Counter)
    corruption: CorruptionCounts = field(default_factory=CorruptionCounts)
    codes: Counter[str] = field(default_factory=Counter)
    switches: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_moved: int = 0

    def add(self, report: SeedReport) -> None:
        """One more seed."""
        self.num_seeds += 1
        self.num_bad_seeds += bool(report.violations)
        self.violations += [(report.seed, what) for what in report.violations]
        del self.violations[MAX_KEPT:]
        self.cells += report.cells
        self.corruption.injected += report.corruption.injected
        self.corruption.found += report.corruption.found
        self.corruption.num_healthy += report.corruption.num_healthy
        self.codes += report.codes
        self.switches += report.switches
        self.num_tokens += report.num_tokens
        self.num_moved += report.num_moved
        self.virtual_s += report.virtual_s
        self.cpu_s += report.cpu_s

    @property
    def num_injected(self) -> int:
        """Corruptions of all kinds."""
        return self.corruption.injected.total()

    @property
    def num_found(self) -> int:
        """Those of them that were found."""
        return self.corruption.found.total()

    @property
    def empty_cells(self) -> list[tuple[str, str]]:
        """(fault, stage) pairs that never came."""
        return [cell for cell in CELLS if not self.cells[cell]]

    @property
    def seeds_per_s(self) -> float:
        """By the clock on the wall."""
        return self.num_seeds / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        injected, found = self.corruption.injected, self.corruption.found
        return {
            "first": self.first,
            "seeds": self.num_seeds,
            "seconds": round(self.seconds, 3),
            "seeds_per_s": round(self.seeds_per_s, 2),
            "cpu_s": round(self.cpu_s, 3),
            "cpu_ms_per_seed": round(1000 * self.cpu_s / max(1, self.num_seeds), 2),
            "virtual_s": round(self.virtual_s, 1),
            "bad_seeds": self.num_bad_seeds,
            "violations": [{"seed": seed, "what": what} for seed, what in self.violations],
            "faults": {kind: {stage: self.cells[kind, stage] for stage in STAGES} for kind in KINDS},
            "empty_cells": [list(cell) for cell in self.empty_cells],
            "corruption": {
                kind: {
                    transport: {"injected": injected[kind, transport], "found": found[kind, transport]}
                    for transport in ("local", "grpc")
                }
                for kind in CORRUPTIONS
            },
            "injected": self.num_injected,
            "found": self.num_found,
            "healthy_pieces": self.corruption.num_healthy,
            "requests": dict(self.codes),
            "switches": dict(self.switches),
            "moved": self.num_moved,
            "tokens": self.num_tokens,
        }


def run_many(
    first: int, num_seeds: int, *, jobs: int, on_progress: Callable[[Summary], None] = lambda summary: None
) -> Summary:
    """Run seeds [first, first + num_seeds) in `jobs` processes; one means this one."""
    summary = Summary(first=first)
    started = time.perf_counter()
    for reports in _chunks(range(first, first + num_seeds), jobs):
        for report in reports:
            summary.add(report)
        summary.seconds = time.perf_counter() - started
        on_progress(summary)
    return summary


def _chunks(seeds: range, jobs: int) -> Iterator[list[SeedReport]]:
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    if jobs == 1 or len(chunks) == 1:
        yield from map(run_chunk, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(chunks)), maxtasksperchild=CHUNKS_PER_PROCESS) as pool:
        yield from pool.imap_unordered(run_chunk, chunks)


def run_chunk(seeds: range) -> list[SeedReport]:
    """Some seeds, one after the other.

    Garbage is collected between runs, not during them, and is looked for only among what the runs have made: what was
    there before (every module) is set aside, as going through it would take a tenth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        reports = []
        for seed in seeds:
            started = time.process_time()
            report = run_seed(seed)
            gc.collect()
            report.cpu_s = time.process_time() - started
            reports.append(report)
        return reports
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
