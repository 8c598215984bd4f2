"""`neap bench engine`: what it refuses, and that a run ends with a table and a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.cli import bench_engine
from engine.bench.session import EngineFigures
from engine.tiny.random_checkpoint import make_random_checkpoint

app = typer.Typer()
app.command("engine")(bench_engine.engine)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "decode_b2"], r"no decode_b2; the measures are prefill_512, .*mixed"),
        (["--vs", "vllm"], r"--vs vllm: can be compared with transformers"),
        (["--dtype", "int8"], r"--dtype int8: expected one of"),
        (["--kv-cache", "lots"], r"expected a size"),
        (["--set", "threads"], r"expected KEY=VALUE"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("--model", str(make_random_checkpoint(tmp_path)), *arguments)
    assert result.exit_code == 1 and re.search(message, result.output)


@pytest.mark.parametrize(("model", "message"), [("shape:x", "no shape 'x'"), ("/nowhere", "does not exist")])
def test_wrong_models_are_named(model: str, message: str) -> None:
    result = invoke("--model", model)
    assert result.exit_code == 1 and message in result.output


def test_a_missing_peer_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "find_spec", lambda name: None)
    result = invoke("--model", str(make_random_checkpoint(tmp_path)), "--vs", "transformers")
    assert result.exit_code == 1 and "not installed: pip install transformers" in result.output


def test_figures_become_a_table_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def measured(specs: object, measures: object, **options: object) -> list[EngineFigures]:
        asked.update(options, measures=measures)
        names = ("neap", "transformers")
        return [
            EngineFigures(engine=name, versions={}, start_s=1.0, peak_rss_mib=10.0, runs={"decode_b1": [rate]})
            for name, rate in zip(names, (8.0, 4.0), strict=True)
        ]

    monkeypatch.setattr(bench_engine, "run_session", measured)
    folder = make_random_checkpoint(tmp_path / "m")
    result = invoke(
        "--model", str(folder), "--vs", "transformers", "--threads", "1", "--json", str(tmp_path / "f.json")
    )
    assert result.exit_code == 0 and "2.00x" in result.output
    measures = asked["measures"]
    assert isinstance(measures, dict) and "mixed" in measures["neap"] and "mixed" not in measures["transformers"]
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["ratios"] == {"decode_b1": 2.0} and found["threads"] == 1
