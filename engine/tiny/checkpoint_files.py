"""Writes safetensors files as a stream: every tensor is drawn when its turn comes, so one is in memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.tiny.tensor_specs import ITEM_BYTES, TensorSpec

Draw = Callable[[TensorSpec], Tensor]
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_checkpoint_files(folder: Path, specs: Sequence[TensorSpec], draw: Draw, num_shards: int = 1) -> None:
    """model.safetensors, or shards with their index. `draw` is called once per spec, in order."""
    if num_shards == 1:
        _write_file(folder / "model.safetensors", specs, draw)
        return
    size = -(-len(specs) // num_shards)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file_name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = specs[index * size : (index + 1) * size]
        _write_file(folder / file_name, shard, draw)
        weight_map.update({spec.name: file_name for spec in shard})
    index_json = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")


def _write_file(path: Path, specs: Sequence[TensorSpec], draw: Draw) -> None:
    """Length of the header, header (JSON), data. Wider types first, so that every tensor is aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda one: -ITEM_BYTES[one.dtype]):
        starts[spec.name], end = end, end + spec.num_bytes
        offsets = [starts[spec.name], end]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        data_start = file.tell()
        for spec in specs:
            file.seek(data_start + starts[spec.name])
            file.write(draw(spec).reshape(-1).view(torch.uint8).numpy().data)
