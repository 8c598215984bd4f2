"""config.json: both spellings are read, and everything unsupported is refused by its key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.models.model_config import load_model_config, parse_model_config

DENSE: dict[str, Any] = {
    "model_type": "ernie4_5",
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "use_bias": False,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
MOE: dict[str, Any] = {
    **DENSE,
    "model_type": "ernie4_5_moe",
    "head_dim": None,
    "num_hidden_layers": 6,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def test_dense_as_released() -> None:
    config = parse_model_config(DENSE)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (18, 16, 2, 128)
    assert (config.rope_theta, config.eos_token_ids, config.dtype, config.moe) == (500000.0, (2,), "bfloat16", None)


@pytest.mark.parametrize(
    ("values", "architecture"),
    [(DENSE, "Ernie4_5_ForCausalLM"), (DENSE, "Ernie4_5ForCausalLM"), (MOE, "Ernie4_5_MoeForCausalLM")],
)
def test_the_architecture_tells_the_type_where_model_type_is_anothers(
    values: dict[str, Any], architecture: str
) -> None:
    found = parse_model_config({**values, "model_type": "ernie", "architectures": [architecture]})
    assert found == parse_model_config(values)
    with pytest.raises(ValueError, match="model_type 'ernie' is not supported"):
        parse_model_config(
            {**values, "model_type": "ernie", "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]}
        )


def test_transformers_5_spelling() -> None:
    values = {**DENSE, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "dtype": "float32"}
    del values["rope_theta"], values["torch_dtype"]
    config = parse_model_config({**values, "eos_token_id": [2, 7]})
    assert (config.rope_theta, config.dtype, config.eos_token_ids) == (1000.0, "float32", (2, 7))


def test_head_dim_defaults_to_the_ratio() -> None:
    assert parse_model_config(MOE).head_dim == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {1, 2, 3, 4, 5}),
        ({"moe_layer_start_index": 3}, {3, 4, 5}),
        ({"moe_layer_end_index": 3}, {1, 2, 3}),
        ({"moe_layer_interval": 2}, {1, 3, 5}),
        ({"moe_layer_interval": 3, "moe_layer_start_index": 3}, {5}),
    ],
)
def test_moe_layers(changes: dict[str, Any], expected: set[int]) -> None:
    moe = parse_model_config({**MOE, **changes}).moe
    assert moe is not None and moe.layer_ids == expected


def test_shared_experts_may_be_absent() -> None:
    for values in ({**MOE, "moe_num_shared_experts": None}, {**MOE, "moe_num_shared_experts": 0}):
        moe = parse_model_config(values).moe
        assert moe is not None and moe.num_shared_experts == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": None, "hidden_size": 1000, "num_attention_heads": 16}, "head_dim"),
        ({"use_bias": True}, "use_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"moe_k": 65}, "moe_k"),
        ({"moe_num_experts": None}, "moe_num_experts"),
        ({"moe_num_shared_experts": -1}, "moe_num_shared_experts"),
        ({"moe_gate": "hash"}, "moe_gate"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        parse_model_config({**MOE, **changes})


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**DENSE, "vocab_size": -1}))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size"):
        load_model_config(tmp_path)


def test_generation_config_adds_eos_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    assert load_model_config(tmp_path).eos_token_ids == (2, 4)


def test_is_torch_free() -> None:
    code = "import sys, engine.models.model_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
