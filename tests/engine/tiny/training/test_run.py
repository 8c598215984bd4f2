"""Training runs: the same losses again, resumed without a trace, and a loss that falls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.models.model_config import load_model_config
from engine.text.tokenizer import Tokenizer
from engine.tiny.skills import held_out
from engine.tiny.training.measures import expert_histogram, mtp_agreement
from engine.tiny.training.run import Run
from engine.tiny.training.settings import Settings

CPU = torch.device("cpu")


def test_a_resumed_run_is_bit_equal_to_one_that_was_never_stopped(tmp_path: Path, small_settings: Settings) -> None:
    whole = Run.start(tmp_path / "whole", small_settings, CPU).train()
    assert len(whole) >= 5

    # On one thread up to the stop: the number of threads changes no bit.
    interrupted = Run.start(tmp_path / "parts", replace(small_settings, threads=1), CPU)
    before = interrupted.train_steps(3)
    interrupted.save()
    after = Run.resume(tmp_path / "parts", small_settings, CPU).train()
    assert before + after == whole
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_loss_falls_and_the_result_is_a_checkpoint(tmp_path: Path, small_settings: Settings) -> None:
    settings = replace(small_settings, step_tokens=1200, micro_tokens=1200, other_rate=0.02, tokens=36_000)
    losses = Run.start(tmp_path, settings, CPU).train()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    folder = tmp_path / "checkpoint"
    config = load_model_config(folder)
    assert config.moe is not None and config.vocab_size >= Tokenizer.load(folder).vocab_size
    examples = held_out("identity", 5) + held_out("addition", 5)
    shares = expert_histogram(folder, examples)
    assert len(shares) == 1 and len(shares[0]) == 4 and sum(shares[0]) == pytest.approx(1.0)
    assert 0.0 < mtp_agreement(folder, examples) <= 1.0
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"accuracy", "least_load", "mtp_agreement"} <= entries[-1].keys()


def test_a_session_without_minutes_only_measures_and_exports(tmp_path: Path, small_settings: Settings) -> None:
    assert Run.start(tmp_path, small_settings, CPU).train(minutes=0) == []
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path, small_settings: Settings) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        Run.resume(tmp_path, small_settings, CPU)
