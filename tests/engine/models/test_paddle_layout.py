"""`-Paddle` checkpoints: transposed linears and fused names give the same model, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import build_engine
from engine.models import weights
from engine.models.checkpoint_layout import placement
from engine.models.weights import load_weights
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.engine.exactness.harness import Cores, Outcome, prompts
from tests.engine.models.test_weights import fresh_model

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"dtype": "bfloat16", "tie_word_embeddings": False},
    "moe": {"dtype": "bfloat16", "model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1},
}
Tensors = dict[str, torch.Tensor]


def to_paddle(tensors: Tensors) -> Tensors:
    """The same weights as the trainer of ERNIE stores them."""
    linear = {name: tensor for name, tensor in tensors.items() if name.endswith(("_proj.weight", ".mlp.gate.weight"))}
    out: Tensors = {}
    for name, tensor in tensors.items():
        paddle = "ernie." + name.removeprefix("model.") if name.startswith("model.") else name
        stem = name.rpartition("_proj")[0]
        if stem.endswith(("_k", ".k", ".v", ".up")):
            continue  # part of a fused one
        if stem.endswith("self_attn.q"):
            parts = [linear[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[paddle.replace("q_proj", "qkv_proj")] = torch.cat(parts).T.contiguous()
        elif stem.endswith(".gate"):
            parts = [linear[name.replace("gate_proj", part)] for part in ("gate_proj", "up_proj")]
            out[paddle.replace("gate_proj", "up_gate_proj")] = torch.cat(parts).T.contiguous()
        else:
            out[paddle] = tensor.T.contiguous() if name in linear or name == "lm_head.weight" else tensor
    return out


def write_both(folder: Path, shape: dict[str, Any]) -> tuple[Path, Path]:
    torch_layout = make_random_checkpoint(folder / "PT", seed=3, **shape)
    paddle_layout = folder / "Paddle"
    paddle_layout.mkdir()
    save_file(to_paddle(load_file(torch_layout / "model.safetensors")), paddle_layout / "model.safetensors")
    shutil.copy(torch_layout / "config.json", paddle_layout)
    return torch_layout, paddle_layout


def answer(path: Path) -> Outcome:
    built = build_engine(EngineConfig(model=str(path), kv_cache_bytes=4 << 20), capture_logits=True)
    outcome = Cores(built).alone(prompts(1, [23])[0])
    assert built.memory is not None
    built.memory.close()
    return outcome


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_layouts_give_the_same_logits(tmp_path: Path, shape: dict[str, Any]) -> None:
    torch_layout, paddle_layout = write_both(tmp_path, shape)
    ours, theirs = answer(torch_layout), answer(paddle_layout)
    assert ours.tokens == theirs.tokens and len(ours.tokens) == 8
    for position, logits in ours.logits.items():
        assert logits.std() > 0.5 and np.array_equal(logits, theirs.logits[position])


def test_transposing_in_small_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_layout, paddle_layout = write_both(tmp_path, SHAPES["moe"])
    monkeypatch.setattr(weights, "MAX_CHUNK_BYTES", 1000)
    expected = fresh_model(torch_layout)
    load_weights(expected, torch_layout)
    model = fresh_model(paddle_layout)
    load_weights(model, paddle_layout)
    targets = dict(model.targets())
    for name, tensor in expected.targets():
        assert torch.equal(targets[name], tensor), name


def test_a_misshapen_fused_weight_is_named(tmp_path: Path) -> None:
    _, paddle_layout = write_both(tmp_path, SHAPES["dense"])
    file = paddle_layout / "model.safetensors"
    tensors = load_file(file)
    name = "ernie.layers.0.self_attn.qkv_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, file)
    with pytest.raises(ValueError, match=r"qkv_proj\.weight has shape \[256, 64\], expected \[64, 256\]"):
        load_weights(fresh_model(paddle_layout), paddle_layout)


@pytest.mark.parametrize("suffix", ["quant_weight", "weight_scale", "super_scales", "code_zp"])
def test_quantised_weights_are_refused_by_name(suffix: str) -> None:
    name = f"ernie.layers.3.mlp.experts.0.up_gate_proj.{suffix}"
    with pytest.raises(ValueError, match=f"{suffix}: quantised weights are not supported"):
        placement(name)
