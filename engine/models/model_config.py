"""What a checkpoint's config.json says about a model, checked and in one form. Torch-free.

Accepts both spellings in circulation: the original ones (`rope_theta`) and those of transformers 5 (`rope_parameters`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

ModelType = Literal["ernie4_5", "ernie4_5_moe"]
CheckpointDType = Literal["float32", "bfloat16", "float16"]

Parsed = TypeVar("Parsed")

_DTYPES = ("float32", "bfloat16", "float16")
_MODEL_TYPES: dict[str, ModelType] = {
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
}
_DEFAULT_ROPE_THETA = 500000.0


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts of a model. `layer_ids` are the layers whose MLP is a mixture; the others are dense.

    `num_shared_experts` of them run for every token, as one MLP of width num_shared_experts * intermediate_size.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int
    norm_min: float
    layer_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One text model. Sizes as in the checkpoint; `dtype` is what config.json says that the weights are stored in."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: CheckpointDType
    moe: MoEConfig | None = None


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir`/config.json, and the further eos ids that generation_config.json may name.

    Raises ValueError naming the file and the key that is missing or unsupported.
    """
    config = _parse_file(model_dir / "config.json", parse_model_config)
    if not (model_dir / "generation_config.json").exists():
        return config
    more = _parse_file(model_dir / "generation_config.json", _eos_token_ids)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def _parse_file(path: Path, parse: Callable[[Mapping[str, object]], Parsed]) -> Parsed:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no {path.name}: it is not a checkpoint folder") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object at the top")
    try:
        return parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_model_config(values: Mapping[str, object]) -> ModelConfig:
    """The checked form of a config.json's content. Raises ValueError naming the key."""
    model_type = _model_type(values)
    _refuse_unsupported(values)
    hidden_size = _positive(values, "hidden_size")
    num_layers = _positive(values, "num_hidden_layers")
    num_heads = _positive(values, "num_attention_heads")
    num_kv_heads = _positive(values, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_positive(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(values, hidden_size, num_heads),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(values),
        max_position_embeddings=_positive(values, "max_position_embeddings", 131072),
        tie_word_embeddings=_flag(values, "tie_word_embeddings", True),
        eos_token_ids=_eos_token_ids({"eos_token_id": 2, **values}),
        dtype=_dtype(values),
        moe=_moe(values, num_layers) if model_type == "ernie4_5_moe" else None,
    )


def _model_type(values: Mapping[str, object]) -> ModelType:
    """As told, or else as the architecture says: trainers write model types of their own."""
    model_type = values.get("model_type")
    if model_type in ("ernie4_5", "ernie4_5_moe"):
        return model_type
    architectures = values.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if name in _MODEL_TYPES:
            return _MODEL_TYPES[name]
    raise ValueError(f"model_type {model_type!r} is not supported (supported: ernie4_5, ernie4_5_moe)")


def _refuse_unsupported(values: Mapping[str, object]) -> None:
    if _flag(values, "use_bias", False):
        raise ValueError("use_bias true is not supported: no released ERNIE 4.5 model has biases")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported (supported: silu)")
    if values.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config is not supported: this engine loads float32, bfloat16 and float16 weights"
        )
    if values.get("rope_scaling") is not None:
        raise ValueError("rope_scaling is not supported: ERNIE 4.5 uses unscaled rotary positions")
    if _number(values, "compression_ratio", 1.0) != 1.0:
        raise ValueError(f"compression_ratio {values['compression_ratio']!r} is not supported (supported: 1.0)")
    if values.get("moe_gate", "topk") not in (None, "topk"):
        raise ValueError(f"moe_gate {values['moe_gate']!r} is not supported (supported: topk)")


def _positive(values: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _integer(values: Mapping[str, object], key: str, default: int) -> int:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    return value


def _number(values: Mapping[str, object], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _flag(values: Mapping[str, object], key: str, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _head_dim(values: Mapping[str, object], hidden_size: int, num_heads: int) -> int:
    # The dense 0.3B model has head_dim 128 with hidden_size / heads = 64: an absent key is only a ratio if it divides.
    head_dim = _positive(values, "head_dim", hidden_size // num_heads if hidden_size % num_heads == 0 else None)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even (rotary pairs), got {head_dim}")
    return head_dim


def _rope_theta(values: Mapping[str, object]) -> float:
    parameters = values.get("rope_parameters")
    if parameters is None:
        return _number(values, "rope_theta", _DEFAULT_ROPE_THETA)
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {parameters!r}")
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters.rope_type {parameters['rope_type']!r} is not supported (supported: default)")
    return _number(parameters, "rope_theta", _number(values, "rope_theta", _DEFAULT_ROPE_THETA))


def _eos_token_ids(values: Mapping[str, object]) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _dtype(values: Mapping[str, object]) -> CheckpointDType:
    value = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    if value not in _DTYPES:
        raise ValueError(f"torch_dtype {value!r} is not supported (supported: {', '.join(_DTYPES)})")
    return cast(CheckpointDType, value)


def _moe(values: Mapping[str, object], num_layers: int) -> MoEConfig:
    num_experts = _positive(values, "moe_num_experts")
    top_k = _positive(values, "moe_k")
    if top_k > num_experts:
        raise ValueError(f"moe_k {top_k} is above moe_num_experts {num_experts}")
    num_shared_experts = _integer(values, "moe_num_shared_experts", 0)
    start = _integer(values, "moe_layer_start_index", 0)
    end = _integer(values, "moe_layer_end_index", -1)
    interval = _positive(values, "moe_layer_interval", 1)
    if num_shared_experts < 0 or start < 0 or end < -1:
        raise ValueError(
            "moe_num_shared_experts, moe_layer_start_index and moe_layer_end_index (-1: last) can't be negative"
        )
    last = num_layers - 1 if end == -1 else end
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=_positive(values, "moe_intermediate_size"),
        num_shared_experts=num_shared_experts,
        norm_min=_number(values, "moe_norm_min", 1e-12),
        layer_ids=frozenset(i for i in range(num_layers) if start <= i <= last and (i + 1) % interval == 0),
    )
