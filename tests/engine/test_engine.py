"""build_engine: what it tells about itself, and every user error named before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import BuiltEngine, build_engine
from engine.kv.memory import KVMemory
from engine.messages import Add
from engine.request import FinishReason, SamplingParams
from engine.tiny.random_checkpoint import make_random_checkpoint


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="bfloat16")


@contextmanager
def built(path: Path, **settings: Any) -> Iterator[BuiltEngine]:
    settings = {"kv_cache_bytes": 2 << 20, "device": "cpu", **settings}
    engine = build_engine(EngineConfig(model=str(path), **settings))
    yield engine
    assert engine.memory is not None
    engine.memory.close()


def test_an_engine_generates(checkpoint: Path) -> None:
    with built(checkpoint) as engine:
        prompt = np.arange(3, 40, dtype="<i4").tobytes()
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        engine.core.submit(Add(request_id="a", prompt=prompt, params=params, seed=0))
        news = []
        while engine.core.has_work:
            events = engine.core.step()
            news += events.tokens if events else ()
    assert sum(len(one.token_ids) for one in news) == 5 and news[-1].finish_reason is FinishReason.LENGTH


def test_auto_takes_the_checkpoints_dtype_and_length(checkpoint: Path) -> None:
    with built(checkpoint) as engine:
        layout = engine.layout
        assert (layout.dtype, layout.block_size, layout.num_layers) == ("bfloat16", 16, 3)
        assert layout.total_bytes <= 2 << 20
        assert engine.max_model_len == 2048
        assert "bfloat16" in engine.numerics_class and "kernels=" in engine.numerics_class
        assert engine.checksum_algorithm == "xxh3_64"


def test_the_memory_is_the_one_that_peers_map(checkpoint: Path) -> None:
    with built(checkpoint, dtype="float32") as engine:
        assert engine.memory is not None and engine.layout.dtype == "float32"
        other = KVMemory.open(engine.memory.path, engine.layout, engine.memory.nonce, writable=False)
        engine.runner.kv.tensor[1] = 2.5
        assert (other.block(1).view(np.float32) == 2.5).all()
        other.close()


def test_a_length_left_open_is_what_the_memory_holds(checkpoint: Path) -> None:
    with built(checkpoint, kv_cache_bytes=256 << 10) as engine:
        assert engine.max_model_len == (engine.layout.num_blocks - 1) * 16 < 2048


def test_identity_depends_on_weights_dtype_and_block_size(checkpoint: Path, tmp_path: Path) -> None:
    other = make_random_checkpoint(tmp_path, seed=1, dtype="bfloat16")
    identities = set()
    for path, settings in (
        (checkpoint, {}),
        (checkpoint, {"dtype": "float32"}),
        (checkpoint, {"block_size": 32}),
        (other, {}),
    ):
        with built(path, **settings) as engine:
            identities.add(engine.identity)
    assert len(identities) == 4
    with built(checkpoint, max_num_seqs=3) as engine:
        assert engine.identity in identities


def test_progress_has_both_stages_and_ends_them(checkpoint: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    config = EngineConfig(model=str(checkpoint), kv_cache_bytes=2 << 20, device="cpu")
    engine = build_engine(config, progress=lambda stage, *counts: seen.setdefault(stage, []).append(counts))
    assert engine.memory is not None
    engine.memory.close()
    assert list(seen) == ["load", "warmup"]
    for counts in seen.values():
        assert counts == sorted(counts) and counts[-1][0] == counts[-1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 4096}, "max_model_len 4096 is above the model's 2048"),
        ({"max_model_len": 2048, "kv_cache_bytes": 256 << 10}, "kv_cache_bytes"),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_errors_name_what_the_user_gave(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        settings = {"model": "/nowhere"}
        message = "/nowhere"
    config = EngineConfig(**{"model": str(checkpoint), "device": "cpu", **settings})
    with pytest.raises(ValueError, match=message):
        build_engine(config)
