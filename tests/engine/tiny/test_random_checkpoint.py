"""Random checkpoints: deterministic, complete, and made in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.models.model_config import load_model_config
from engine.tiny import random_checkpoint
from engine.tiny.random_checkpoint import default_checkpoint, make_random_checkpoint


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [
        make_random_checkpoint(tmp_path / str(i), seed=s, model_type="ernie4_5_moe") for i, s in enumerate((4, 4, 5))
    ]
    one, again, other = ((path / "model.safetensors").read_bytes() for path in paths)
    assert one == again != other


def test_the_correction_bias_is_not_zero(tmp_path: Path) -> None:
    tensors = load_file(make_random_checkpoint(tmp_path, model_type="ernie4_5_moe") / "model.safetensors")
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert biases and all(bias.shape == (1, 8) and (bias != 0).all() for bias in biases)


def test_the_default_checkpoint_is_made_once(tmp_path: Path) -> None:
    path = default_checkpoint(tmp_path / "cache")
    config = load_model_config(path)
    assert config.max_position_embeddings == 4096 and config.moe is not None and config.moe.num_shared_experts == 2
    assert (path / "tokenizer.json").exists()
    made_ns = (path / "config.json").stat().st_mtime_ns
    assert default_checkpoint(tmp_path / "cache") == path
    assert (path / "config.json").stat().st_mtime_ns == made_ns
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> int:
        (path / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(random_checkpoint, "write_byte_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        default_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_concurrent_start_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = random_checkpoint.write_byte_tokenizer

    def write_after_another_start(path: Path) -> int:
        monkeypatch.setattr(random_checkpoint, "write_byte_tokenizer", write)
        default_checkpoint(tmp_path)
        return write(path)

    monkeypatch.setattr(random_checkpoint, "write_byte_tokenizer", write_after_another_start)
    path = default_checkpoint(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
