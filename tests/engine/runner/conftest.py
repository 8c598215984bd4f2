"""One thread, and a small model with its runner."""

from collections.abc import Iterator

import pytest
import torch

from engine.kv.kv_cache import KVCache
from engine.kv.layout import KVLayout
from engine.layers.options import LayerOptions
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.model_config import load_model_config
from engine.models.registry import build_model
from engine.models.weights import load_weights
from engine.runner.model_runner import ModelRunner
from engine.tiny.random_checkpoint import make_random_checkpoint

NUM_BLOCKS = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Ernie45ForCausalLM:
    path = make_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), model_type="ernie4_5_moe")
    options = LayerOptions(device=torch.device("cpu"), dtype=torch.float32)
    built = build_model(load_model_config(path), options)
    load_weights(built, path)
    return built


@pytest.fixture
def runner(model: Ernie45ForCausalLM) -> ModelRunner:
    config = model.config
    layout = KVLayout(
        num_blocks=NUM_BLOCKS,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        block_size=16,
        head_dim=config.head_dim,
        dtype="float32",
    )
    kv = KVCache.on_device(layout, torch.device("cpu"))
    return ModelRunner(model, kv, num_rows=4, max_model_len=200, capture_logits=True)
