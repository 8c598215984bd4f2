"""The tensors of an ERNIE 4.5 checkpoint in the HF `-PT` layout, by config.json's own keys: names, shapes, and how
random values for them are drawn so that a model of any size behaves: unit variance, attention that looks somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
ITEM_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
Config = Mapping[str, Any]  # config.json's own keys


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor: normally distributed with `mean` and `std`."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    std: float
    mean: float = 0.0

    @property
    def num_elements(self) -> int:
        """Elements, not bytes."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """As stored."""
        return self.num_elements * ITEM_BYTES[self.dtype]


Specs = Iterator[TensorSpec]


def checkpoint_tensors(config: Config, dtype: DType) -> Specs:
    """All of a model's, in the order they are drawn, the multi-token-prediction block last (if it has one)."""
    yield from _model_tensors(config, dtype)
    if config.get("num_nextn_predict_layers"):
        yield from _mtp_tensors(config, dtype)


def _model_tensors(config: Config, dtype: DType) -> Specs:
    hidden_size, vocab_size = config["hidden_size"], config["vocab_size"]
    # The final norm gives rows of length sqrt(hidden_size), so logits get a standard deviation of about 2.5.
    table_std = 2.5 / hidden_size**0.5
    table = (vocab_size, hidden_size)
    yield TensorSpec(name="model.embed_tokens.weight", shape=table, dtype=dtype, std=table_std)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from _attention_tensors(prefix, config, dtype)
        if config["model_type"] == "ernie4_5_moe" and _is_moe_layer(config, layer):
            yield from _moe_tensors(f"{prefix}mlp.", config, dtype)
        else:
            yield from _mlp_tensors(f"{prefix}mlp.", hidden_size, config["intermediate_size"], dtype)
    yield _norm_weight("model.norm", hidden_size, dtype)
    if not config["tie_word_embeddings"]:
        yield TensorSpec(name="lm_head.weight", shape=table, dtype=dtype, std=table_std)


def _attention_tensors(prefix: str, config: Config, dtype: DType) -> Specs:
    hidden_size, head_dim = config["hidden_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _norm_weight(f"{prefix}{name}", hidden_size, dtype)
    # Queries and keys a little larger than unit, so that attention looks at some tokens more than at others.
    for name, size, gain in (("q", q_size, 1.5), ("k", kv_size, 1.5), ("v", kv_size, 1.0)):
        yield _linear(f"{prefix}self_attn.{name}_proj", size, hidden_size, dtype, gain)
    yield _linear(f"{prefix}self_attn.o_proj", hidden_size, q_size, dtype)


def _mlp_tensors(prefix: str, hidden_size: int, intermediate_size: int, dtype: DType) -> Specs:
    yield _linear(f"{prefix}gate_proj", intermediate_size, hidden_size, dtype)
    yield _linear(f"{prefix}up_proj", intermediate_size, hidden_size, dtype)
    yield _linear(f"{prefix}down_proj", hidden_size, intermediate_size, dtype, 2.0)


def _is_moe_layer(config: Config, layer: int) -> bool:
    end = config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if end == -1 else end
    in_range: bool = config["moe_layer_start_index"] <= layer <= last
    return in_range and (layer + 1) % config["moe_layer_interval"] == 0


def _moe_tensors(prefix: str, config: Config, dtype: DType) -> Specs:
    num_experts, hidden_size, size = config["moe_num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    yield _linear(f"{prefix}gate", num_experts, hidden_size, "float32", 1.5)
    # Large enough against scores of about 1 / E that it changes which experts are chosen.
    bias, std = f"{prefix}moe_statics.e_score_correction_bias", 0.5 / num_experts
    yield TensorSpec(name=bias, shape=(1, num_experts), dtype="float32", std=std)
    for index in range(num_experts):
        yield from _mlp_tensors(f"{prefix}experts.{index}.", hidden_size, size, dtype)
    if config["moe_num_shared_experts"]:
        shared_size = config["moe_num_shared_experts"] * size
        yield from _mlp_tensors(f"{prefix}shared_experts.", hidden_size, shared_size, dtype)


def _mtp_tensors(config: Config, dtype: DType) -> Specs:
    hidden_size = config["hidden_size"]
    block = "model.mtp_block.0."
    yield from _attention_tensors(block, config, dtype)
    yield from _mlp_tensors(f"{block}mlp.", hidden_size, config["intermediate_size"], dtype)
    for name in ("mtp_emb_norm", "mtp_hidden_norm"):
        yield _norm_weight(f"model.{name}.0", hidden_size, dtype)
    yield _linear("model.mtp_linear_proj.0", hidden_size, 2 * hidden_size, dtype)


def _linear(name: str, rows: int, columns: int, dtype: DType, gain: float = 1.0) -> TensorSpec:
    """Keeps unit variance times gain squared."""
    return TensorSpec(name=f"{name}.weight", shape=(rows, columns), dtype=dtype, std=gain / columns**0.5)


def _norm_weight(name: str, size: int, dtype: DType) -> TensorSpec:
    return TensorSpec(name=f"{name}.weight", shape=(size,), dtype=dtype, std=0.1, mean=1.0)
