"""Loading: every tensor in its place, shards, dtypes, and errors that name the tensor or file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.layers.options import LayerOptions
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.model_config import load_model_config
from engine.models.registry import build_model
from engine.models.safetensors_files import LoadAccount, read_header
from engine.models.weights import load_weights, weights_digest
from engine.tiny.random_checkpoint import make_random_checkpoint

MOE: dict[str, Any] = {"model_type": "ernie4_5_moe", "tie_word_embeddings": False}


def fresh_model(path: Path, dtype: torch.dtype = torch.float32) -> Ernie45ForCausalLM:
    return build_model(load_model_config(path), LayerOptions(device=torch.device("cpu"), dtype=dtype))


def load(path: Path, dtype: torch.dtype = torch.float32) -> Ernie45ForCausalLM:
    model = fresh_model(path, dtype)
    load_weights(model, path)
    return model


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "moe"])
def test_every_tensor_lands_in_its_place(tmp_path: Path, shape: dict[str, Any], num_shards: int) -> None:
    make_random_checkpoint(tmp_path, num_shards=num_shards, **shape)
    stored: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored.update(load_file(file))
    targets = dict(load(tmp_path).targets())
    assert targets.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(targets[name], tensor), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_but_the_router_stays_float32(tmp_path: Path, stored: Any) -> None:
    make_random_checkpoint(tmp_path, dtype=stored, **MOE)
    for name, tensor in load(tmp_path, torch.bfloat16).targets():
        is_router = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if is_router else torch.bfloat16), name


def test_multi_token_prediction_and_a_tied_head_are_ignored(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path, model_type="ernie4_5_moe", num_nextn_predict_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("model.mtp_") for name in tensors)
    tensors["lm_head.weight"] = torch.zeros(320, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    stored = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    save_file(stored, path / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, r"missing weights: model\.norm\.weight"),
        ({"model.extra.weight": torch.zeros(2)}, r"unexpected weights: model\.extra\.weight"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \[3\], expected \[64\]"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str) -> None:
    make_random_checkpoint(tmp_path)
    change(tmp_path, **tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path, num_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: not a readable"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not a safetensors index"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="neither"):
        load(tmp_path)


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path, num_shards=2)
    model = build_model(load_model_config(tmp_path), LayerOptions(device=torch.device("cpu"), dtype=torch.float32))
    seen: list[tuple[int, int]] = []
    load_weights(model, tmp_path, lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values())
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) > 10


@pytest.mark.parametrize("shape", [{}, {**MOE, "moe_layer_start_index": 0}], ids=["dense", "moe"])
def test_a_load_holds_little_beside_the_packed_model(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Cast from bfloat16, so everything goes through buffers; from many shards, so tensors of a layer lie apart."""
    make_random_checkpoint(tmp_path, dtype="bfloat16", num_shards=5, num_hidden_layers=6, **shape)
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.0."))
    table = tensors["model.embed_tokens.weight"].nbytes
    model, account = fresh_model(tmp_path), LoadAccount()
    load_weights(model, tmp_path, account=account)
    assert 0 < account.buffers.peak_bytes <= layer
    assert max(layer, table) <= account.unpacked.peak_bytes <= 2 * max(layer, table)
    assert account.buffers.held_bytes == account.unpacked.held_bytes == 0


def test_an_error_in_a_reader_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_random_checkpoint(tmp_path, num_shards=3)
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    with pytest.raises(ValueError, match=r"model-0000.-of-00003\.safetensors ends within model\..*: it has been cut"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, r"x is stored as I8, which is not supported"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, r"8 bytes are not those of its shape \[4\]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, r"x lies outside of it"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, r"not a readable safetensors file"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, r"not a readable safetensors file"),
        ([], r"not a readable safetensors file"),
    ],
)
def test_headers_are_checked_against_the_file(tmp_path: Path, entry: object, message: str) -> None:
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_header(file)


def test_digest_names_the_weights(tmp_path: Path) -> None:
    one = make_random_checkpoint(tmp_path / "one", seed=1)
    again = make_random_checkpoint(tmp_path / "again", seed=1)
    other = make_random_checkpoint(tmp_path / "other", seed=2)
    assert weights_digest(one) == weights_digest(again) != weights_digest(other)
    change(one, **{"model.norm.weight": torch.zeros(64)})
    assert weights_digest(one) != weights_digest(again)
