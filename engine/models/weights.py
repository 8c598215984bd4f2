"""Loads checkpoints: safetensors in one file or in shards, `-PT` or `-Paddle` layout, several readers at once.

1. headers -> what is read to where     wrong names and shapes end here, before anything is read
2. reads, MAX_READERS at a time         straight into the weights where dtype and layout are theirs; else by chunks
3. pack                                 each weight takes the form that its method reads

So the peak is the model and MAX_READERS * CHUNK_BYTES, less than one layer of any published model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.models.checkpoint_layout import placement
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.safetensors_files import Staging, StoredTensor, TensorReader, read_header

Progress = Callable[[int, int], None]

MAX_READERS = 4
CHUNK_BYTES = 4 << 20
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


def load_weights(
    model: Ernie45ForCausalLM,
    model_dir: Path,
    progress: Progress | None = None,
    *,
    staging: Staging | None = None,
    num_readers: int = MAX_READERS,
) -> None:
    """Fill every weight of `model` and pack it.

    `progress(done, total)` in bytes, about 100 times, from this thread. Multi-token-prediction weights are ignored, and
    so is an lm_head.weight where the config ties it. `staging` counts what is held beside the model (tests). Raises
    ValueError naming tensors that are missing, unexpected or misshapen, before anything is read.
    """
    paths = shard_paths(model_dir)
    reads = _planned(model, model_dir, paths)
    with closing(TensorReader(staging or Staging(CHUNK_BYTES))) as reader:
        for path in paths:
            reader.open(path)
        _read_all(reader, reads, num_readers, progress)
    reads.clear()  # their views would keep the unpacked weights alive while the model packs
    model.pack()


@dataclass(frozen=True, kw_only=True)
class _Read:
    stored: StoredTensor
    targets: list[Tensor]
    transposed: bool


def _planned(model: Ernie45ForCausalLM, model_dir: Path, paths: list[Path]) -> list[_Read]:
    """What is read to where: every target once, in the order of the files."""
    targets = dict(model.targets())
    seen: dict[str, Path] = {}
    unexpected: list[str] = []
    reads: list[_Read] = []
    for stored in (tensor for path in paths for tensor in read_header(path)):
        if stored.name in seen:
            raise ValueError(f"{stored.path}: {stored.name} is in an earlier shard too ({seen[stored.name].name})")
        seen[stored.name] = stored.path
        place = placement(stored.name)
        if _ignored(place.names[0], model.config.tie_word_embeddings):
            continue
        if not all(name in targets for name in place.names):
            unexpected.append(stored.name)
            continue
        reads.append(_planned_read(stored, [targets.pop(name) for name in place.names], place.transposed))
    if unexpected:
        raise ValueError(f"{model_dir}: unexpected weights: {_some(unexpected)}")
    if targets:
        raise ValueError(f"{model_dir}: missing weights: {_some(list(targets))}")
    return reads


def _planned_read(stored: StoredTensor, targets: list[Tensor], transposed: bool | None) -> _Read:
    rows = sum(target.shape[0] for target in targets)
    expected = (rows, *targets[0].shape[1:])
    if transposed is None:
        transposed = stored.shape != expected
    if stored.shape != (expected[::-1] if transposed else expected):
        wanted = list(expected[::-1] if transposed else expected)
        raise ValueError(f"{stored.name} has shape {list(stored.shape)}, expected {wanted}")
    return _Read(stored=stored, targets=targets, transposed=transposed)


def _read_all(reader: TensorReader, reads: list[_Read], num_readers: int, progress: Progress | None) -> None:
    """Several tensors at a time, whatever shard they are in; the first error ends the others."""
    done, told, total = 0, 0, sum(read.stored.num_bytes for read in reads)
    with ThreadPoolExecutor(num_readers, thread_name_prefix="weights") as pool:
        running = {
            pool.submit(reader.read, read.stored, read.targets, transposed=read.transposed): read.stored.num_bytes
            for read in reads
        }
        try:
            for finished in as_completed(running):
                finished.result()
                done += running.pop(finished)
                if progress is not None and ((done - told) * 100 >= total or not running):
                    told = done
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


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


def _ignored(name: str, tied: bool) -> bool:
    return name.startswith("model.mtp_") or (tied and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
