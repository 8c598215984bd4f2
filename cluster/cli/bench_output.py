"""How a benchmark shows its figures: a table for people, JSON for machines, one line when it could not run."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

_WIDTH = 140  # where there is no terminal


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures to a file, if one was asked for."""
    if path is not None:
        path.write_text(json_module.dumps(figures, indent=2) + "\n", encoding="utf-8")


def bench_console() -> Console:
    """As wide as the terminal, or of a fixed width."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def failed(message: str) -> typer.Exit:
    """Say why it could not run; to be raised."""
    typer.echo(f"neap: {message}", err=True)
    return typer.Exit(1)
