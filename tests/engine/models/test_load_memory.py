"""Several shards are loaded within the memory of the model and one layer: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tiny.random_checkpoint import make_random_checkpoint

ROOT = Path(__file__).resolve().parents[3]
_ALLOCATOR_BYTES = 16 << 20  # what the process takes besides: threads, the allocator's own, code that is loaded late


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """113 MB of bfloat16 in 4 shards, 14 MB a layer."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        dtype="bfloat16",
        num_shards=4,
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )


def test_the_peak_is_the_model_and_one_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_dir = Path.home() / ".cache" / "neap"
    command = [sys.executable, "-m", "tests.engine.models.load_child", str(folder), str(cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True, cwd=ROOT)
    figures: dict[str, int] = json.loads(done.stdout)
    with capsys.disabled():
        print(" ".join(f"{name}={size / 1e6:.1f}MB" for name, size in figures.items()))
    assert figures["buffers"] <= figures["layer"]
    assert figures["unpacked"] <= 2 * figures["layer"]
    assert figures["model"] <= figures["loading"] <= figures["model"] + figures["layer"] + _ALLOCATOR_BYTES
