"""Loads `-PT` checkpoints: safetensors in one file or in shards, memory-mapped, one tensor at a time.

Each tensor is cast and copied straight into its place in the packed weights, so the peak is the model and one tensor.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.ernie45 import Ernie45ForCausalLM

Progress = Callable[[int, int], None]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLE_BYTES = 4096
_SAMPLES_PER_SHARD = 256


def shard_paths(model_dir: Path) -> list[Path]:
    """The checkpoint's files, in order. Raises ValueError naming the file that is missing or malformed."""
    index = model_dir / _INDEX
    if not index.exists():
        single = model_dir / _SINGLE
        if not single.is_file():
            raise ValueError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
    paths = [model_dir / str(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{index} names {path.name}, which is missing")
    if not paths:
        raise ValueError(f"{index}: weight_map is empty")
    return paths


def load_weights(model: Ernie45ForCausalLM, model_dir: Path, progress: Progress | None = None) -> None:
    """Fill every weight of `model` and pack it.

    `progress(done, total)` in bytes, about 100 times. Multi-token-prediction weights are ignored, and so is an
    lm_head.weight where the config ties it. Raises ValueError naming tensors that are missing, unexpected or misshapen.
    """
    targets = dict(model.targets())
    paths = shard_paths(model_dir)
    done, told, total = 0, 0, sum(path.stat().st_size for path in paths)
    unexpected: list[str] = []
    for name, tensor in _tensors(paths):
        target = targets.pop(name, None)
        if target is not None:
            if tensor.shape != target.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
            target.copy_(tensor)
        elif not _ignored(name, model.config.tie_word_embeddings):
            unexpected.append(name)
        done += tensor.nbytes
        if progress is not None and (done - told) * 100 >= total:
            told = done
            progress(done, total)
    if unexpected:
        raise ValueError(f"{model_dir}: unexpected weights: {_some(unexpected)}")
    if targets:
        raise ValueError(f"{model_dir}: missing weights: {_some(list(targets))}")
    model.pack()
    if progress is not None:
        progress(total, total)


def weights_digest(model_dir: Path) -> str:
    """32 hex digits that name these weights for the cache identity.

    Per shard in name order: its safetensors header, its size, and 256 evenly spaced samples of 4 KiB (all of it where
    it is no larger). Hashing every byte of a large checkpoint would take longer than loading it; a changed value
    between two samples goes unseen, so checkpoints edited by hand need a new header (any metadata will do).
    """
    digest = hashlib.sha256()
    for path in shard_paths(model_dir):
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            digest.update(struct.pack("<Q", size))
            digest.update(file.read(min(header_bytes, size)))
            last = max(size - _SAMPLE_BYTES, 0)
            step = max(last // (_SAMPLES_PER_SHARD - 1), _SAMPLE_BYTES)
            for offset in [*range(0, last, step), last]:
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118 - the handle is no mapping
                    if name in seen:
                        raise ValueError(f"{path}: {name} is in an earlier shard too")
                    seen.add(name)
                    yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _ignored(name: str, tied: bool) -> bool:
    return name.startswith("model.mtp_") or (tied and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
