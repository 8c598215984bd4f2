"""`neap bench engine`: one engine on this machine, alone or beside transformers. Measures in engine/bench."""

from __future__ import annotations

import json as json_module
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.config.environment import cache_dir, child_environment
from cluster.config.model import parse_size
from engine.bench import workload
from engine.bench.report import as_json, table
from engine.bench.session import BenchError, EngineFigures, run_session
from engine.bench.subject import SubjectSpec
from engine.models.hub import lines_of_progress, model_folder

_PEERS = ("transformers",)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHAPE = "shape:"
_WIDTH = 140  # where there is no terminal


def engine(
    model: Annotated[str, typer.Option(help="Folder, Hugging Face id, shape:ernie-0.3b or shape:ernie-moe-mini.")],
    vs: Annotated[str, typer.Option(help="Also measure this, in turns: transformers.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of each engine; 0: all cores.", min=0)] = 0,
    only: Annotated[str, typer.Option(help="Some measures: prefill_512,decode_b1. Default: all.")] = "",
    repetitions: Annotated[int, typer.Option(help="Runs of each measure; the median counts.", min=1)] = 3,
    kv_cache: Annotated[str, typer.Option(help="Our KV memory.", metavar="SIZE")] = "512MiB",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any engine option: max_step_ms=2000. Repeatable.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, after every measure.", metavar="FILE")
    ] = None,
) -> None:
    """Measure prefill, decode and a mixed load of one engine: tokens/s, start time, peak memory.

    Each engine runs in a process of its own. With --vs both do in one run, in turns, and the last row is the ratio;
    the mixed load of transformers (one static batch, minutes) only where --only names it.
    """
    console = Console(stderr=True)

    def save(figures: list[EngineFigures]) -> None:
        if json is not None:
            found = as_json(figures, _about(model, specs[0], repetitions))
            json.write_text(json_module.dumps(found, indent=2) + "\n", encoding="utf-8")

    try:
        measures = _measures(only)
        specs = _specs(model, vs, dtype, threads or len(os.sched_getaffinity(0)), kv_cache, _options(set_ or []))
        by_engine = {spec.engine: _chosen(spec.engine, measures, only) for spec in specs}
        environment = child_environment(OMP_NUM_THREADS=str(specs[0].threads), HF_HUB_OFFLINE="1")
        figures = run_session(
            specs,
            by_engine,
            repetitions=repetitions,
            environment=environment,
            tell=lambda line: console.print(line, style="dim", highlight=False),
            save=save,
        )
    except (ValueError, BenchError, OSError) as error:
        typer.echo(f"neap: {error}", err=True)
        raise typer.Exit(1) from error
    save(figures)
    _show(figures, model, specs[0])


def _measures(only: str) -> list[str]:
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in workload.MEASURES]
    if unknown:
        raise ValueError(f"--only: there is no {unknown[0]}; the measures are {', '.join(workload.MEASURES)}")
    return [name for name in workload.MEASURES if name in chosen or not chosen]


def _chosen(name: str, measures: list[str], only: str) -> list[str]:
    return [one for one in measures if name == "neap" or only or one in workload.RATIO_MEASURES]


def _options(sets: list[str]) -> dict[str, bool | int | float | str]:
    options: dict[str, bool | int | float | str] = {}
    for one in sets:
        key, equals, text = one.partition("=")
        if not equals:
            raise ValueError(f"--set {one}: expected KEY=VALUE")
        try:
            options[key] = json_module.loads(text)
        except ValueError:
            options[key] = text
    return options


def _specs(
    model: str, vs: str, dtype: str, threads: int, kv_cache: str, options: dict[str, bool | int | float | str]
) -> list[SubjectSpec]:
    if vs and vs not in _PEERS:
        raise ValueError(f"--vs {vs}: can be compared with {', '.join(_PEERS)}")
    if vs and find_spec(vs) is None:
        raise ValueError(f"--vs {vs} needs the package {vs}, which is not installed: pip install {vs}")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}")
    kv_cache_bytes = parse_size(kv_cache)
    assert isinstance(kv_cache_bytes, int), "text becomes bytes or an error"
    folder = _folder(model)
    return [
        SubjectSpec(
            engine=name,
            model=folder,
            dtype=dtype,
            threads=threads,
            kv_cache_bytes=kv_cache_bytes,
            options=options if name == "neap" else {},
        )
        for name in ("neap", vs)
        if name
    ]


def _folder(model: str) -> str:
    if not model.startswith(_SHAPE):
        return str(model_folder(model, progress=lines_of_progress(model, lambda line: typer.echo(line, err=True))))
    # not at the top: it takes torch, which no other command should wait for
    from engine.tiny.shapes import shape_checkpoint

    return str(shape_checkpoint(model.removeprefix(_SHAPE), cache_dir(), lambda line: typer.echo(line, err=True)))


def _about(model: str, spec: SubjectSpec, repetitions: int) -> dict[str, object]:
    return {
        "model": model,
        "dtype": spec.dtype,
        "threads": spec.threads,
        "kv_cache_bytes": spec.kv_cache_bytes,
        "options": spec.options,
        "repetitions": repetitions,
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _show(figures: list[EngineFigures], model: str, spec: SubjectSpec) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(f"{model}, {spec.dtype}, {spec.threads} threads on {_cpu_name()}; tokens/s", highlight=False)
    names, rows = table(figures)
    shown = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for index, name in enumerate(names):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
