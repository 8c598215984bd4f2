"""neap sim: figures, a table, a trace, and exit code 1 when something was violated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.sim import copies


def test_seeds_print_the_table_and_write_figures(tmp_path: Path) -> None:
    file = tmp_path / "sim.json"
    result = CliRunner().invoke(app, ["sim", "--seeds", "3", "--jobs", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures["seeds"] == 3 and figures["bad_seeds"] == 0 and not figures["violations"]
    assert sum(sum(stages.values()) for stages in figures["faults"].values()) == 15
    assert "seeds/s" in result.output and "D crashes" in result.output and "partial write" in result.output


def test_one_seed_is_replayed_with_its_journal() -> None:
    result = CliRunner().invoke(app, ["sim", "--seed", "4", "--trace"])
    assert result.exit_code == 0, result.output
    assert "ToWorker decode-" in result.output and "chaos" in result.output and "seed 4:" in result.output


def test_trace_wants_a_seed() -> None:
    assert CliRunner().invoke(app, ["sim", "--trace"]).exit_code == 2


def test_a_violation_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "verify", lambda memory, copy, piece: None)
    result = CliRunner().invoke(app, ["sim", "--first", "1", "--seeds", "3", "--jobs", "1"])
    assert result.exit_code == 1
    assert "was not found" in result.output and "seed 1" in result.output.replace("\n", " ")
