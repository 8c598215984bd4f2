"""`neap bench router | serve | engine | ...`: fixed seeds, a table for people, `--json FILE` for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.table import Table

from cluster.bench.load import Target
from cluster.bench.own_cluster import own_cluster
from cluster.bench.router_bench import RouterBenchOptions, bench_router
from cluster.bench.serve_bench import Targets, bench_serve
from cluster.bench.workload import LoadOptions
from cluster.cli.bench_engine import engine
from cluster.cli.bench_goodput import roles
from cluster.cli.bench_output import bench_console, failed, write_json
from cluster.cli.bench_roles import role_switch
from cluster.cli.bench_routing import routing
from cluster.config.environment import api_key as key_from_environment

_SHOWN_COUNTERS = 24

bench_app = typer.Typer(name="bench", help="Measure: the engine, the path around it, or a served load.")
bench_app.command()(engine)
bench_app.command()(routing)
bench_app.command(name="role-switch")(role_switch)
bench_app.command()(roles)

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals; the same seed gives the same load.")]


@bench_app.command()
def router(
    requests: Annotated[int, typer.Option(help="Of the throughput scenario.", min=1)] = 2048,
    concurrency: Annotated[int, typer.Option(help="Streams at once, throughput scenario.", min=1)] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer, an event each.", min=1)] = 32,
    words: Annotated[int, typer.Option(help="Words of each prompt, a token each.", min=1)] = 16,
    crowd: Annotated[int, typer.Option(help="Streams at once, crowd scenario.", min=1)] = 1000,
    low_requests: Annotated[int, typer.Option(help="Of the low-load scenario, one at a time.", min=1)] = 50,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    step_ms: Annotated[float, typer.Option(help="What a step of the fake takes, beside computing it.", min=0)] = 0.0,
    token_ms: Annotated[float, typer.Option(help="What each token of a step adds.", min=0)] = 0.0,
    prefill: Annotated[int, typer.Option(help="Prefill workers; 0: decode workers compute prompts.", min=0)] = 0,
    decode: Annotated[int, typer.Option(help="Decode workers.", min=1)] = 1,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure what router, link and worker cost around an engine that costs next to nothing (the exact fake).

    Every event of every answer is counted, and every eighth text is compared with the fake's oracle, event by event.
    """
    if endpoint not in ("chat", "completions"):
        raise failed("--endpoint: chat or completions")
    options = RouterBenchOptions(
        requests=requests,
        concurrency=concurrency,
        tokens=tokens,
        words=words,
        crowd=crowd,
        low_requests=low_requests,
        endpoint=endpoint,
        step_ms=step_ms,
        token_ms=token_ms,
        prefill=prefill,
        decode=decode,
        seed=seed,
    )
    try:
        figures = bench_router(options)
    except RuntimeError as error:
        raise failed(str(error)) from error
    write_json(json, figures)
    bench_console().print(router_table(figures))
    if any(figures[name]["failures"] for name in ("throughput", "crowd", "low_load")):
        raise typer.Exit(1)


@bench_app.command()
def serve(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Options of neap serve for a cluster of its own, after --.")
    ] = None,
    url: Annotated[str, typer.Option(help="A running OpenAI-style server. Default: start a cluster.")] = "",
    api_key: Annotated[str, typer.Option(help="Its API key, if it has one (also NEAP_API_KEY).")] = "",
    requests: Annotated[int, typer.Option(help="How many.", min=1)] = 100,
    rate: Annotated[float, typer.Option(help="Requests per second, Poisson; 0: the trace's own times.", min=0)] = 2.0,
    prompt_tokens: Annotated[int, typer.Option(help="Mean prompt, synthetic load.", min=1)] = 256,
    output_tokens: Annotated[int, typer.Option(help="Mean answer, synthetic load.", min=1)] = 64,
    spread: Annotated[float, typer.Option(help="Of the log-normal lengths; 0: all alike.", min=0)] = 0.5,
    trace: Annotated[str, typer.Option(help="Replay this (.jsonl or .csv) in place of a synthetic load.")] = "",
    length_scale: Annotated[float, typer.Option(help="Factor on a trace's lengths.", min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Prompt and answer together are cut to this.", min=2)] = 2048,
    ttft_ms: Annotated[float, typer.Option(help="Target for the first token.", min=0)] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Target for the mean time per further token.", min=0)] = 100.0,
    timeout_s: Annotated[float, typer.Option(help="A request that takes longer has failed.", min=0)] = 600.0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure what clients get under an open-loop load: TTFT, TPOT, E2E, goodput, failures by kind.

    The server's own counters over the same time stand beside it.
    """
    load = LoadOptions(
        num_requests=requests,
        rate=rate,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        spread=spread,
        seed=seed,
        trace=trace,
        length_scale=length_scale,
        max_tokens=max_tokens,
    )
    targets = Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    try:
        if not rate and not trace:
            raise ValueError("--rate 0 needs --trace")
        if url:
            figures = bench_serve(_target(url, api_key or key_from_environment()), load, targets, timeout_s)
        else:
            with own_cluster(arguments or []) as cluster:
                figures = bench_serve(cluster.target, load, targets, timeout_s)
    except (OSError, RuntimeError, ValueError) as error:
        raise failed(str(error)) from error
    write_json(json, figures)
    console = bench_console()
    console.print(serve_table(figures))
    console.print(server_table(figures))
    if figures["failures"]:
        raise typer.Exit(1)


def router_table(figures: dict[str, Any]) -> Table:
    """Scenarios side by side."""
    names = ("throughput", "crowd", "low_load")
    table = Table(title="neap bench router", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    rows = (
        *("concurrency", "requests", "failures", "texts_checked", "requests_per_s", "events_per_s"),
        *(f"{time}_p{share}_ms" for time in ("ttft", "tpot", "e2e") for share in (50, 99)),
        *("engine_ttft_p50_ms", "overhead_ttft_p50_ms", "engine_e2e_p50_ms", "overhead_e2e_p50_ms", "cores_used"),
    )
    for row in rows:
        table.add_row(row.replace("_", " "), *(_shown(figures[name].get(row, "")) for name in names))
    kinds = sorted({kind for name in names for kind in figures[name]["cpu_ms_per_request"]})
    for kind in kinds:
        values = (figures[name]["cpu_ms_per_request"].get(kind, "") for name in names)
        table.add_row(f"cpu ms per request, {kind}", *map(_shown, values))
    return table


def serve_table(figures: dict[str, Any]) -> Table:
    """What the clients saw."""
    table = Table(title=f"neap bench serve: {figures['model']}", title_justify="left")
    for name, justify in (("", "left"), ("p50", "right"), ("p90", "right"), ("p99", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        table.add_row(name.replace("_", " "), *(_shown(value) for value in figures[name].values()))
    goodput = figures["goodput"]
    under = f"goodput, ttft <= {goodput['ttft_ms']:g} and tpot <= {goodput['tpot_ms']:g} ms"
    table.add_row(under, f"{goodput['requests_per_s']} /s", f"{goodput['share']:.1%}", "")
    for name in ("requests", "requests_per_s", "output_tokens_per_s", "failures", "seconds", "generator_late_ms"):
        table.add_row(name.replace("_", " "), _shown(figures[name]), "", "")
    return table


def server_table(figures: dict[str, Any]) -> Table:
    """What the server counted meanwhile."""
    table = Table(title="the server's own counters over this time", title_justify="left")
    table.add_column("counter")
    table.add_column("moved by", justify="right")
    for name, value in list(figures["server"].items())[:_SHOWN_COUNTERS]:
        table.add_row(name, _shown(value))
    return table


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{kind}: {count}" for kind, count in value.items()) or "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _target(url: str, api_key: str) -> Target:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
        raise ValueError(f"--url {url}: expected http://HOST:PORT")
    return Target(host=parts.hostname, port=parts.port or 80, api_key=api_key)
