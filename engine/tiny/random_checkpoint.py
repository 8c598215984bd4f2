"""Writes small random ERNIE 4.5 checkpoints in the HF `-PT` layout: for tests, and for serving without a model."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.tiny.byte_tokenizer import write_byte_tokenizer

DType = Literal["float32", "bfloat16", "float16"]
Config = dict[str, Any]  # config.json's own keys
Tensors = Iterator[tuple[str, Tensor]]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DENSE: Config = {
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
_MOE: Config = {
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
_DEFAULT_NAME = "random-moe-1"


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
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_model_tensors(values, generator, _DTYPES[dtype]))
    if values.get("num_nextn_predict_layers"):
        tensors.update(_mtp_tensors(values, generator, _DTYPES[dtype]))
    _write_shards(path, tensors, num_shards)
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return path


def default_checkpoint(cache_dir: Path) -> Path:
    """The checkpoint that is served without a model: a small MoE with a byte-level tokenizer, made once.

    Made in a folder of its own and renamed, so that a killed or concurrent start never leaves half of one.
    """
    final = cache_dir / _DEFAULT_NAME
    if (final / "config.json").exists():
        return final
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = cache_dir / f".{_DEFAULT_NAME}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        vocab_size = write_byte_tokenizer(temporary)
        make_random_checkpoint(
            temporary,
            model_type="ernie4_5_moe",
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=256,
            moe_num_shared_experts=2,
        )
        try:
            temporary.rename(final)
        except OSError:
            # Another process was first: its folder is as good.
            if not (final / "config.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _model_tensors(config: Config, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    hidden_size, vocab_size = config["hidden_size"], config["vocab_size"]
    # The final norm gives rows of length sqrt(hidden_size), so logits get a standard deviation of about 2.5.
    table_std = 2.5 / hidden_size**0.5
    yield "model.embed_tokens.weight", _normal((vocab_size, hidden_size), table_std, generator, dtype)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from _attention_tensors(prefix, config, generator, dtype)
        if config["model_type"] == "ernie4_5_moe" and _is_moe_layer(config, layer):
            yield from _moe_tensors(f"{prefix}mlp.", config, generator, dtype)
        else:
            yield from _mlp_tensors(f"{prefix}mlp.", hidden_size, config["intermediate_size"], generator, dtype)
    yield "model.norm.weight", _norm_weight(hidden_size, generator, dtype)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _normal((vocab_size, hidden_size), table_std, generator, dtype)


def _attention_tensors(prefix: str, config: Config, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    hidden_size, head_dim = config["hidden_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", _norm_weight(hidden_size, generator, dtype)
    # Queries and keys a little larger than unit, so that attention looks at some tokens more than at others.
    for name, size, gain in (("q", q_size, 1.5), ("k", kv_size, 1.5), ("v", kv_size, 1.0)):
        yield f"{prefix}self_attn.{name}_proj.weight", _linear(size, hidden_size, generator, dtype, gain)
    yield f"{prefix}self_attn.o_proj.weight", _linear(hidden_size, q_size, generator, dtype)


def _mlp_tensors(
    prefix: str, hidden_size: int, intermediate_size: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensors:
    yield f"{prefix}gate_proj.weight", _linear(intermediate_size, hidden_size, generator, dtype)
    yield f"{prefix}up_proj.weight", _linear(intermediate_size, hidden_size, generator, dtype)
    yield f"{prefix}down_proj.weight", _linear(hidden_size, intermediate_size, generator, dtype, 2.0)


def _is_moe_layer(config: Config, layer: int) -> bool:
    end = config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if end == -1 else end
    in_range: bool = config["moe_layer_start_index"] <= layer <= last
    return in_range and (layer + 1) % config["moe_layer_interval"] == 0


def _moe_tensors(prefix: str, config: Config, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    num_experts, hidden_size, size = config["moe_num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    yield f"{prefix}gate.weight", _linear(num_experts, hidden_size, generator, torch.float32, 1.5)
    # Large enough against scores of about 1 / E that it changes which experts are chosen.
    bias = _normal((1, num_experts), 0.5 / num_experts, generator, torch.float32)
    yield f"{prefix}moe_statics.e_score_correction_bias", bias
    for index in range(num_experts):
        yield from _mlp_tensors(f"{prefix}experts.{index}.", hidden_size, size, generator, dtype)
    if config["moe_num_shared_experts"]:
        shared_size = config["moe_num_shared_experts"] * size
        yield from _mlp_tensors(f"{prefix}shared_experts.", hidden_size, shared_size, generator, dtype)


def _mtp_tensors(config: Config, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    hidden_size = config["hidden_size"]
    block = "model.mtp_block.0."
    yield from _attention_tensors(block, config, generator, dtype)
    yield from _mlp_tensors(f"{block}mlp.", hidden_size, config["intermediate_size"], generator, dtype)
    for name in ("mtp_emb_norm", "mtp_hidden_norm"):
        yield f"model.{name}.0.weight", _norm_weight(hidden_size, generator, dtype)
    yield "model.mtp_linear_proj.0.weight", _linear(hidden_size, 2 * hidden_size, generator, dtype)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def _linear(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Keeps unit variance times gain squared."""
    return _normal((rows, columns), gain / columns**0.5, generator, dtype)


def _norm_weight(size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (1.0 + 0.1 * torch.randn(size, generator=generator)).to(dtype)


def _write_shards(path: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    size = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file_name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = {name: tensors[name] for name in names[index * size : (index + 1) * size]}
        save_file(shard, path / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")
