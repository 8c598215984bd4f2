"""`neap bench roles`: goodput of the best static split, of colocation and of roles that change, as a load shifts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from cluster.bench.roles.compare import CompareOptions, compare, on_machines, planner_ms
from cluster.bench.roles.figures import Requests
from cluster.bench.roles.loads import compare_loads
from cluster.bench.roles.processes import ProcessOptions, bench_processes
from cluster.bench.roles.setting import load_setting
from cluster.bench.workload import read_trace
from cluster.cli.bench_output import bench_console, failed, write_json

_ROWS = {
    "static": "best static split, by requests/s",
    "static_tokens": "best static split, by tokens/s",
    "colocated": "colocated, chunked prefill",
    "dynamic": "roles that change",
}
_PLANNED_WORKERS = 1024


def roles(
    workers: Annotated[int, typer.Option(help="Of the simulated cluster.", min=2)] = 64,
    seeds: Annotated[int, typer.Option(help="Loads to draw.", min=1)] = 5,
    load: Annotated[float, typer.Option(help="Factor on the committed rates.", min=0.01)] = 1.0,
    rounds: Annotated[int, typer.Option(help="Of the phases; 0: as committed.", min=0)] = 0,
    machines: Annotated[str, typer.Option(help="Hardware of roles.json. Default: the committed one.")] = "",
    trace_a: Annotated[Path | None, typer.Option(help="Replay this trace in the first phases.")] = None,
    trace_b: Annotated[Path | None, typer.Option(help="Replay this trace in the others.")] = None,
    variants: Annotated[bool, typer.Option(help="Also loads that don't suit changing roles.")] = True,
    processes: Annotated[bool, typer.Option(help="Real workers (sleeping fakes) in place of the model.")] = False,
    loads: Annotated[bool, typer.Option(help="Instead: static splits and changing roles, load by load.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first load.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")] = None,
) -> None:
    """Compare static splits, colocation and changing roles on a load that shifts, in a simulator of whole requests.

    Targets, rates and hardware are those of cluster/bench/roles/roles.json.
    """
    if processes:
        _roles_of_processes(ProcessOptions(seed=seed), json)
        return
    if (trace_a is None) != (trace_b is None):
        raise failed("--trace-a and --trace-b go together")
    try:
        traces = tuple(_requests(path) for path in (trace_a, trace_b) if path is not None)
        options = CompareOptions(
            workers=workers, first_seed=seed, seeds=seeds, load=load, traces=traces, variants=variants
        )
        setting = load_setting()
        if machines:
            setting = on_machines(setting, machines)
        if loads:
            _roles_by_load(compare_loads(setting, workers, seed=seed), json)
            return
        figures = compare(replace(setting, rounds=rounds or setting.rounds), options)
    except (OSError, ValueError) as error:
        raise failed(str(error)) from error
    figures["planner_ms"] = decisions = {"workers": _PLANNED_WORKERS, **planner_ms(_PLANNED_WORKERS)}
    write_json(json, figures)
    console = bench_console()
    console.print(_main_table(figures))
    console.print(_ratio_table(figures))
    if figures["variants"]:
        console.print(_variant_table(figures))
    switches = ", ".join(str(one["to_prefill"] + one["to_decode"]) for one in figures["switches"])
    console.print(f"Changes of roles, seed by seed: {switches}.")
    console.print(
        f"The planner decides for {_PLANNED_WORKERS} workers in {decisions['min']:.1f} ms at best, "
        f"{decisions['median']:.1f} ms in the median; {decisions['cpu']:.1f} ms of CPU time each."
    )


def _roles_by_load(figures: dict[str, Any], json: Path | None) -> None:
    write_json(json, figures)
    title = f"neap bench roles --loads: {figures['workers']} workers, shares that keep the targets, one seed; "
    table = Table(title=f"{title}the best of splits {figures['splits']} by each", title_justify="left")
    keys = ("requests", "tokens", "worst_phase")
    table.add_column("load")
    for name in (*(f"{way}, {key}" for way in ("static", "dynamic") for key in keys), "ratios", "changes"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in figures["rows"]:
        shares = (f"{row[way][key]:.1%}" for way in ("static", "dynamic") for key in keys)
        ratios = " / ".join(f"{ratio:.2f}" for ratio in row["ratio"].values())
        table.add_row(f"{row['load']:.0%}", *shares, ratios, str(row["changes"]))
    console = bench_console()
    console.print(table)
    kept = {way: "no load" if load is None else f"{load:.0%}" for way, load in figures["keeps"].items()}
    console.print(f"Nine of ten of either phase: static up to {kept['static']}, dynamic up to {kept['dynamic']}.")


def _roles_of_processes(options: ProcessOptions, json: Path | None) -> None:
    try:
        figures = bench_processes(options)
    except (OSError, RuntimeError) as error:
        raise failed(str(error)) from error
    write_json(json, figures)
    title = f"neap bench roles --processes: {options.workers} workers, {options.ttft_ms:g} ms to the first token and "
    table = Table(title=title + f"{options.tpot_ms:g} ms per token", title_justify="left")
    keys = ("goodput_per_s", "requests_per_s", "goodput_tokens_per_s", "failures", "ttft_p90_ms", "tpot_p90_ms")
    table.add_column("")
    for key in (*keys, *figures["rates"], "changes"):
        table.add_column(key.replace("_", " "), justify="right")
    for name, run in figures["runs"].items():
        cells = (*(run[key] for key in keys), *run["shares"].values(), run["split_at_end"]["changes"])
        table.add_row(name, *(f"{cell:g}" for cell in cells))
    console = bench_console()
    console.print(table)
    console.print(
        "Goodput of roles that change, by requests and by tokens, over the best static split: "
        f"{_both(figures['over_best_static'])}; over colocation: {_both(figures['over_colocated'])}."
    )


def _both(ratios: dict[str, float]) -> str:
    return ", ".join(f"{ratio:g}" for ratio in ratios.values())


def _requests(path: Path) -> Requests:
    trace = read_trace(path)
    return Requests(
        at=np.array([one.at_s for one in trace]),
        prompts=np.array([one.prompt_tokens for one in trace]),
        outputs=np.array([one.output_tokens for one in trace]),
    )


def _main_table(figures: dict[str, Any]) -> Table:
    """Goodput: least, median and most over the seeds."""
    targets = figures["targets"]
    title = f"neap bench roles: {figures['workers']} workers ({figures['hardware']}), requests that keep "
    title += f"{targets['ttft_ms']:g} ms to the first token and {targets['tpot_ms']:g} ms per token"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    phases = list(figures["ideal"])
    for name in ("goodput /s", "of /s", "tokens k/s", "of k/s", *(f"{phase}, share" for phase in phases)):
        table.add_column(name, justify="right")
    notes = {
        "static": f" ({figures['best_split']} prefill)",
        "static_tokens": f" ({figures['tokens_split']} prefill)",
        "colocated": f" ({figures['chunk_ms']:g} ms steps)",
    }
    for key, words in _ROWS.items():
        row = figures[key]
        shares = (_three(row["shares"][phase], factor=100.0) + " %" for phase in phases)
        table.add_row(
            words + notes.get(key, ""),
            _three(row["goodput_per_s"]),
            f"{row['requests_per_s']['median']:.1f}",
            _three(row["goodput_tokens_per_s"], factor=1e-3),
            f"{row['tokens_per_s']['median'] / 1000:.1f}",
            *shares,
        )
    return table


def _ratio_table(figures: dict[str, Any]) -> Table:
    table = Table(title="roles that change, over the others", title_justify="left")
    table.add_column("ratio")
    table.add_column("min / median / max", justify="right")
    for name, values in figures["ratios"].items():
        table.add_row(name.replace("_", " "), " / ".join(f"{values[key]:.2f}" for key in ("min", "median", "max")))
    return table


def _variant_table(figures: dict[str, Any]) -> Table:
    table = Table(title="where it does not pay: mean share of phases, one seed", title_justify="left")
    for name in ("load", "workers", "best static split", "static", "dynamic", "changes"):
        table.add_column(name, justify="left" if name == "load" else "right")
    for name, one in figures["variants"].items():
        cells = (one["workers"], one["static_split"], f"{one['static']:.1%}", f"{one['dynamic']:.1%}", one["switches"])
        table.add_row(name, *map(str, cells))
    return table


def _three(values: dict[str, float], *, factor: float = 1.0) -> str:
    return " / ".join(f"{values[key] * factor:.1f}" for key in ("min", "median", "max"))
