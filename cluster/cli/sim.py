"""`neap sim`: whole histories with faults on a virtual clock, and a checker (cluster/sim/scenario.py)."""

from __future__ import annotations

import json as json_module
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.sim.chaos import KINDS, makes_sense
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.coverage import gaps
from cluster.sim.many import Summary, run_many
from cluster.sim.scenario import run_seed
from cluster.sim.stages import STAGES

_WIDTH = 170  # where there is no terminal
_TTY_EVERY_S = 0.2
_LOG_EVERY_S = 30.0
_SHORT = {
    "waiting for source": "waits source",
    "waiting for space": "waits space",
    "waiting for row": "waits row",
}


def sim(
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 300,
    first: Annotated[int, typer.Option(help="The first one.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Only this one.", min=0)] = None,
    trace: Annotated[bool, typer.Option("--trace", help="With --seed: print its journal, message by message.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes. Default: one per core.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")] = None,
) -> None:
    """Simulate the cluster under faults: at least 4 workers, 50 requests, 5 faults and 2 switches per seed.

    Real dispatcher, role machine, scheduler, block manager and transfers around the exact fake, on a virtual clock.
    Prints how often which fault struck at which stage, and every violation with its seed. Exit code 1 if there is one,
    or if the run was long enough (300 seeds) and something never happened in it that it is to show.
    """
    if seed is not None:
        raise typer.Exit(_one(seed, trace))
    if trace:
        typer.echo("neap: --trace wants one --seed", err=True)
        raise typer.Exit(2)
    console = Console(width=None if os.isatty(1) else _WIDTH)
    progress = _Progress(seeds, every_s=_TTY_EVERY_S if os.isatty(2) else _LOG_EVERY_S)
    summary = run_many(first, seeds, jobs=jobs or len(os.sched_getaffinity(0)), on_progress=progress)
    missing = gaps(summary)
    if json is not None:
        json.write_text(json_module.dumps({**summary.as_json(), "gaps": missing}, indent=1) + "\n")
    _print(console, summary)
    for gap in missing:
        console.print(f"missing: {gap}", style="red", highlight=False)
    raise typer.Exit(1 if summary.num_bad_seeds or missing else 0)


def _one(seed: int, trace: bool) -> int:
    report = run_seed(seed, trace=trace)
    for line in report.journal:
        typer.echo(line)
    faults = ", ".join(f"{kind} at {stage}" for kind, stage in report.cells)
    typer.echo(f"seed {seed}: {_counts(report.codes)}; {faults}; switches: {_counts(report.switches)}")
    for what in report.violations:
        typer.echo(f"VIOLATION: {what}")
    return 1 if report.violations else 0


class _Progress:
    """A line on stderr now and then: in a terminal always the same one, in a log one every half minute."""

    def __init__(self, num_seeds: int, *, every_s: float) -> None:
        self._num_seeds = num_seeds
        self._every_s = every_s
        self._next_s = every_s

    def __call__(self, summary: Summary) -> None:
        done = summary.num_seeds == self._num_seeds
        if summary.seconds < self._next_s and not (done and self._every_s == _TTY_EVERY_S):
            return
        self._next_s = summary.seconds + self._every_s
        left_s = (self._num_seeds - summary.num_seeds) / summary.seeds_per_s
        line = (
            f"{summary.num_seeds} of {self._num_seeds} seeds, {summary.seeds_per_s:.1f}/s, "
            f"{left_s / 60:.0f} min left; {summary.num_bad_seeds} with violations, "
            f"{summary.num_found} of {summary.num_injected} corruptions found, "
            f"{summary.corruption.num_healthy} healthy pieces, {len(summary.empty_cells)} empty cells"
        )
        in_place = self._every_s == _TTY_EVERY_S
        typer.echo(f"\r{line}\x1b[K" if in_place else line, err=True, nl=not in_place or done)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def _print(console: Console, summary: Summary) -> None:
    table = Table(title="faults, by the stage at which they struck", header_style="bold")
    table.add_column("fault")
    for stage in STAGES:
        table.add_column(_SHORT.get(stage, stage), justify="right", overflow="fold")
    for kind in KINDS:
        cells = [str(summary.cells[kind, stage]) if makes_sense(kind, stage) else "-" for stage in STAGES]
        table.add_row(kind, *cells)
    console.print(table)
    injected, found = summary.corruption.injected, summary.corruption.found
    words = f"{summary.num_found} of {summary.num_injected} corruptions found"
    if not summary.num_bad_seeds:
        words += f", {summary.corruption.num_healthy} healthy pieces without a false alarm"
    table = Table(title="KV corruption: found / injected", header_style="bold")
    table.add_column("kind")
    for transport in ("local", "grpc"):
        table.add_column(transport, justify="right")
    for kind in CORRUPTIONS:
        table.add_row(kind, *(f"{found[kind, way]} / {injected[kind, way]}" for way in ("local", "grpc")))
    console.print(table)
    console.print(words)
    console.print(
        f"requests: {_counts(summary.codes)}; {summary.num_moved} moves; switches: {_counts(summary.switches)}"
    )
    empty = ", ".join(f"{kind} / {stage}" for kind, stage in summary.empty_cells)
    console.print(f"empty cells: {empty or 'none'}")
    console.print(
        f"{summary.num_seeds} seeds from {summary.first} in {summary.seconds:.1f} s: "
        f"{summary.seeds_per_s:.1f} seeds/s, {1000 * summary.cpu_s / summary.num_seeds:.0f} ms CPU each, "
        f"{summary.num_bad_seeds} with violations"
    )
    for seed, what in summary.violations:
        console.print(f"seed {seed}: {what}", style="red", highlight=False)
