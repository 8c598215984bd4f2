"""neap sim: figures, a table, a trace, and exit code 1 when something was violated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import sim
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


def test_a_run_that_shows_too_little_fails_and_says_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sim, "gaps", lambda summary: ["'poison' never struck"])
    file = tmp_path / "sim.json"
    result = CliRunner().invoke(app, ["sim", "--seeds", "1", "--jobs", "1", "--json", str(file)])
    assert result.exit_code == 1
    assert "missing: 'poison' never struck" in result.output
    assert json.loads(file.read_text())["gaps"] == ["'poison' never struck"]


def test_progress_counts_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "_LOG_EVERY_S", 0.0)
    result = CliRunner().invoke(app, ["sim", "--seeds", "9", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "8 of 9 seeds" in result.output and "healthy pieces" in result.output and "empty cells" in result.output
