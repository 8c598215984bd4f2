"""Writes random ERNIE 4.5 checkpoints in the HF `-PT` layout: for tests and benches."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.tiny.checkpoint_files import Draw, write_checkpoint_files
from engine.tiny.tensor_specs import DType, TensorSpec, checkpoint_tensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DENSE: dict[str, Any] = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE: dict[str, Any] = {
    **_DENSE,
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "head_dim": 16,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def make_random_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    num_shards: int = 1,
    model_type: Literal["ernie4_5", "ernie4_5_moe"] = "ernie4_5",
    **config: Any,
) -> Path:
    """Write a checkpoint folder; the same arguments give the same bytes. Returns `path`.

    `config` overrides keys of config.json (its own names: hidden_size, moe_k, ...); sizes left out are tiny. With
    num_nextn_predict_layers 1 a multi-token-prediction block is written too.
    """
    values = {
        **(_MOE if model_type == "ernie4_5_moe" else _DENSE),
        "torch_dtype": dtype,
        "model_type": model_type,
        **config,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_checkpoint_files(path, list(checkpoint_tensors(values, dtype)), drawn(seed), num_shards)
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return path


def made_once(final: Path, make: Callable[[Path], None]) -> Path:
    """The folder `final`, made by `make` if it is not there yet (it has a config.json when it is whole).

    Made in a folder of its own and renamed, so that a killed or concurrent start never leaves half of one.
    """
    if (final / "config.json").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        make(temporary)
        try:
            temporary.rename(final)
        except OSError:
            # Another process was first: its folder is as good.
            if not (final / "config.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def drawn(seed: int) -> Draw:
    """Each tensor from one generator, in the order of the calls."""
    generator = torch.Generator().manual_seed(seed)

    def draw(spec: TensorSpec) -> Tensor:
        values = torch.randn(spec.shape, generator=generator) * spec.std
        return (spec.mean + values if spec.mean else values).to(_DTYPES[spec.dtype])

    return draw
