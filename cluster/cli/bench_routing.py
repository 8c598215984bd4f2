"""`neap bench routing`: the policies side by side, on the virtual clock (cluster/bench/routing.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.routing import RoutingOptions, bench_routing
from cluster.bench.routing_processes import ProcessOptions, bench_processes
from cluster.cli.bench_output import bench_console, write_json
from cluster.router.policies import POLICY_NAMES

_DEFAULTS = RoutingOptions()
_UNEQUAL = (
    *("goodput_per_s", "goodput_share", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p90_ms"),
    *("ttft_error_p50", "tpot_error_p50", "decode_only_chosen", "failures"),
)
_PREFIXES = (
    *("cache_hit_tokens", "cache_hit_share", "computed_tokens", "ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms"),
    *("ttft_error_p50", "tpot_error_p50", "decode_only_chosen", "failures"),
)


def routing(
    requests: Annotated[int, typer.Option(help="Of the unequal pools.", min=10)] = _DEFAULTS.requests,
    rate: Annotated[float, typer.Option(help="Requests per second there, Poisson.", min=0.1)] = _DEFAULTS.rate,
    pairs: Annotated[int, typer.Option(help="Prefill and decode workers of each pool.", min=1)] = _DEFAULTS.pairs,
    slowdown: Annotated[float, typer.Option(help="Of the second pool.", min=1.0)] = _DEFAULTS.slowdown,
    ttft_ms: Annotated[float, typer.Option(help="Target for the first token.", min=0)] = _DEFAULTS.ttft_ms,
    tpot_ms: Annotated[float, typer.Option(help="Target per further token.", min=0)] = _DEFAULTS.tpot_ms,
    conversations: Annotated[int, typer.Option(help="Of the shared prefixes.", min=1)] = _DEFAULTS.conversations,
    policy: Annotated[list[str] | None, typer.Option(help="Only these. Repeatable. Default: all.")] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Unequal pools as real processes (fakes), a minute or two; no more.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of loads and ties: the same seed gives the same figures.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")] = None,
) -> None:
    """Compare routing policies on the same loads: two pools of unequal speed, and prompts that share prefixes.

    Real router, schedulers, caches and transfers around the exact fake, on a virtual clock: minutes of load in
    seconds, the same figures on every machine.
    """
    if processes:
        raise typer.Exit(_real(ProcessOptions(slowdown=slowdown, seed=seed), json))
    if unknown := set(policy or ()) - set(POLICY_NAMES):
        typer.echo(f"neap: --policy {', '.join(sorted(unknown))}: one of {', '.join(POLICY_NAMES)}", err=True)
        raise typer.Exit(1)
    options = RoutingOptions(
        requests=requests,
        rate=rate,
        pairs=pairs,
        slowdown=slowdown,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        conversations=conversations,
        seed=seed,
    )
    figures = bench_routing(options, tuple(policy) if policy else POLICY_NAMES)
    write_json(json, figures)
    console = bench_console()
    title = f"two pools, one {slowdown:g} times slower: {requests} requests at {rate:g}/s; "
    title += f"goodput is ttft <= {ttft_ms:g} and tpot <= {tpot_ms:g} ms"
    console.print(_table(title, figures["unequal"], _UNEQUAL))
    _print_ratios(console, figures)
    console.print(_table("conversations under four system prompts", figures["prefixes"], _PREFIXES))
    if any(one["failures"] for scenario in ("unequal", "prefixes") for one in figures[scenario].values()):
        raise typer.Exit(1)


def _real(options: ProcessOptions, json: Path | None) -> int:
    """The unequal pools as processes. Returns the exit code."""
    try:
        figures = bench_processes(options)
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"neap: {error}", err=True)
        return 1
    write_json(json, figures)
    console = bench_console()
    title = f"real processes, one pair {options.slowdown:g} times slower: {options.requests} requests at "
    title += f"{options.rate:g}/s; goodput is ttft <= {options.ttft_ms:g} and tpot <= {options.tpot_ms:g} ms"
    rows = tuple(name for name in _UNEQUAL if name in figures["unequal"]["predicted"])
    console.print(_table(title, figures["unequal"], rows))
    _print_ratios(console, figures)
    return 1 if any(one["failures"] for one in figures["unequal"].values()) else 0


def _print_ratios(console: Console, figures: dict[str, Any]) -> None:
    if ratios := figures.get("ratios"):
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in ratios.items())
        console.print(f"predicted: {told}\n", highlight=False)


def _table(title: str, figures: dict[str, Any], rows: tuple[str, ...]) -> Table:
    """Policies side by side."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.replace("_", " "), *(f"{figures[name][row]:g}" for name in figures))
    return table
