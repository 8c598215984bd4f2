"""Random checkpoints of published shapes, for benches: real sizes, real names, values that cost little to draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.checkpoint_files import Draw, write_checkpoint_files
from engine.tiny.random_checkpoint import made_once
from engine.tiny.tensor_specs import TensorSpec, checkpoint_tensors

_VERSION = 1  # of the values: another one is another folder
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 1024,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "vocab_size": 103424,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    # ERNIE-4.5-0.3B as published: 361 M parameters
    "ernie-0.3b": {
        **_COMMON,
        "architectures": ["Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5",
        "head_dim": 128,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_key_value_heads": 2,
    },
    # built like 21B-A3B (layer 0 dense, then 64 experts, 6 of them and 2 shared for each token), 1.29 B parameters
    "ernie-moe-mini": {
        **_COMMON,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "head_dim": 64,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 512,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 11,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "moe_use_aux_free": True,
    },
}
_POOL_SIZE = 8_388_617  # a prime: rows of a matrix fall on different places of the pool


def shape_checkpoint(name: str, cache_dir: Path, tell: Callable[[str], None] | None = None) -> Path:
    """The folder of a shape's checkpoint (bfloat16, with a byte-level tokenizer), written when first asked for.

    Raises ValueError for a name that is not in SHAPES.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; the shapes are {', '.join(SHAPES)}")
    config = SHAPES[name]

    def make(path: Path) -> None:
        specs = list(checkpoint_tensors(config, "bfloat16"))
        if tell is not None:
            size, count = sum(spec.num_bytes for spec in specs), sum(spec.num_elements for spec in specs)
            tell(f"writing {name}: {count / 1e6:.0f} M random parameters, {size / 1e9:.2f} GB, to {final}")
        write_byte_tokenizer(path)
        write_checkpoint_files(path, specs, _pooled(seed=0))
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    final = cache_dir / "shapes" / f"{name}-{_VERSION}"
    return made_once(final, make)


def _pooled(seed: int) -> Draw:
    """Tensors as stretches of one pool of normal values, each from another start: drawing all would take a minute."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL_SIZE, generator=generator)
    scaled: dict[tuple[float, float, str], Tensor] = {}

    def draw(spec: TensorSpec) -> Tensor:
        key = (spec.std, spec.mean, spec.dtype)
        if key not in scaled:
            scaled[key] = (pool * spec.std + spec.mean).to(getattr(torch, spec.dtype))
        source = scaled[key]
        out = torch.empty(spec.num_elements, dtype=source.dtype)
        start = int(torch.randint(_POOL_SIZE, (), generator=generator))
        done = 0
        while done < spec.num_elements:
            count = min(_POOL_SIZE - start, spec.num_elements - done)
            out[done : done + count] = source[start : start + count]
            start, done = 0, done + count
        return out.view(spec.shape)

    return draw
