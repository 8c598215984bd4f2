"""`neap bench role-switch`: what changing roles under load costs, and that it loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.bench.role_switch import RoleSwitchOptions, bench_role_switch
from cluster.cli.bench_output import bench_console, failed, write_json


def role_switch(
    switches: Annotated[int, typer.Option(help="How many, decode to prefill and back in turn.", min=1)] = 100,
    inflight: Annotated[int, typer.Option(help="Requests at once, all the time.", min=8)] = 12,
    output_tokens: Annotated[int, typer.Option(help="Of each answer.", min=1)] = 200,
    prefill: Annotated[int, typer.Option(help="Prefill workers at the start.", min=1)] = 2,
    decode: Annotated[int, typer.Option(help="Decode workers at the start.", min=2)] = 2,
    model: Annotated[str, typer.Option(help="Checkpoint. Default: the embedded one.")] = "",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")] = None,
) -> None:
    """Switch roles under load and compare every text with the undisturbed run.

    Exit code 1 if a request failed or a text differs.
    """
    options = RoleSwitchOptions(
        switches=switches,
        inflight=inflight,
        output_tokens=output_tokens,
        prefill=prefill,
        decode=decode,
        model=model,
        seed=seed,
    )
    try:
        figures = bench_role_switch(options)
    except (OSError, RuntimeError, ValueError) as error:
        raise failed(str(error)) from error
    write_json(json, figures)
    table = Table(title=f"neap bench role-switch: {prefill} + {decode} workers", title_justify="left")
    for name, justify in (("", "left"), ("p50", "right"), ("p99", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in figures.items():
        if name == "options":
            continue
        cells = [f"{value['p50']:g}", f"{value['p99']:g}"] if isinstance(value, dict) else [str(value), ""]
        table.add_row(name.replace("_", " "), *cells)
    bench_console().print(table)
    if figures["failed"] or figures["text_mismatches"]:
        raise typer.Exit(1)
