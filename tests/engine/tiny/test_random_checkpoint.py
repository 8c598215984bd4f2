"""Random checkpoints: deterministic, complete, and made in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.tiny.random_checkpoint import made_once, make_random_checkpoint


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


def write_config(path: Path) -> None:
    (path / "config.json").write_text("{}")


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    path = made_once(tmp_path / "cache" / "one", write_config)
    made_ns = (path / "config.json").stat().st_mtime_ns
    assert made_once(tmp_path / "cache" / "one", write_config) == path
    assert (path / "config.json").stat().st_mtime_ns == made_ns
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["one"]


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        (path / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        made_once(tmp_path / "one", fail)
    assert not list(tmp_path.iterdir())


def test_a_concurrent_start_is_not_disturbed(tmp_path: Path) -> None:
    def write_after_another_start(path: Path) -> None:
        made_once(tmp_path / "one", write_config)
        write_config(path)

    path = made_once(tmp_path / "one", write_after_another_start)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
