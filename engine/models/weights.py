"""Loads checkpoints: safetensors in one file or in shards, `-PT` or `-Paddle` layout, several readers at once.

1. headers -> what is read to where     wrong names and shapes end here, before anything is read
2. per unit (embedding, head, a layer)  its tensors are read, MAX_READERS at a time: straight into the weights where
                                        dtype and layout are theirs, else in chunks
3. while the next unit is read          it is packed: its loaded form goes

So at most two units are there unpacked, and the peak is the model and about one layer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.models.checkpoint_layout import placement
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.safetensors_files import LoadAccount, StoredTensor, TensorReader, read_header

Progress = Callable[[int, int], None]

MAX_READERS = 4
MAX_CHUNK_BYTES = 4 << 20
_LAYERS = "model.layers."
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
    model: Ernie45ForCausalLM, model_dir: Path, progress: Progress | None = None, *, account: LoadAccount | None = None
) -> None:
    """Fill every weight of `model` and pack it.

    `progress(done, total)` in bytes, about 100 times, from this thread. Multi-token-prediction weights are ignored, and
    so is an lm_head.weight where the config ties it. `account` counts what is held beside the packed model (tests).
    Raises ValueError naming tensors that are missing, unexpected or misshapen, before anything is read.
    """
    paths = shard_paths(model_dir)
    units = _planned(model, model_dir, paths)
    chunk_bytes = max(min(unit.num_bytes for unit in units if unit.is_layer) // MAX_READERS, 1)
    account = account or LoadAccount()
    with closing(TensorReader(account.buffers, min(chunk_bytes, MAX_CHUNK_BYTES))) as reader:
        for path in paths:
            reader.open(path)
        _load_units(reader, units, account, progress)


class Packable(Protocol):
    """What turns its loaded weights into the form that its layers read."""

    def pack(self) -> None:
        """Once, after loading."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Read:
    stored: StoredTensor
    targets: list[Tensor]
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What is packed at once, by the prefix of its names. `reads` hold its weights, so they go once they are run."""

    prefix: str
    packable: Packable | None
    reads: list[_Read]

    @property
    def num_bytes(self) -> int:
        """Of its weights in the checkpoint."""
        return sum(read.stored.num_bytes for read in self.reads)

    @property
    def is_layer(self) -> bool:
        """Whether it is a decoder layer."""
        return self.prefix.startswith(_LAYERS)


def _units(model: Ernie45ForCausalLM) -> list[_Unit]:
    """The largest first: what its packing takes beside it comes while little else is there."""
    parts: list[tuple[str, Packable | None]] = [("model.embed_tokens.", model.embed_tokens), ("model.norm.", None)]
    if model.lm_head is not None:
        parts.append(("lm_head.", model.lm_head))
    parts += [(f"{_LAYERS}{index}.", layer) for index, layer in enumerate(model.layers)]
    return [_Unit(prefix=prefix, packable=packable, reads=[]) for prefix, packable in parts]


def _planned(model: Ernie45ForCausalLM, model_dir: Path, paths: list[Path]) -> list[_Unit]:
    """What is read to where, in the order in which it is packed: every target once."""
    targets = dict(model.targets())
    units = _units(model)
    unit_of = {name: next(unit for unit in units if name.startswith(unit.prefix)) for name in targets}
    seen: dict[str, Path] = {}
    unexpected: list[str] = []
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
        read = _planned_read(stored, [targets.pop(name) for name in place.names], place.transposed)
        unit_of[place.names[0]].reads.append(read)
    if unexpected:
        raise ValueError(f"{model_dir}: unexpected weights: {_some(unexpected)}")
    if targets:
        raise ValueError(f"{model_dir}: missing weights: {_some(list(targets))}")
    return units


def _planned_read(stored: StoredTensor, targets: list[Tensor], transposed: bool | None) -> _Read:
    rows = sum(target.shape[0] for target in targets)
    expected = (rows, *targets[0].shape[1:])
    if transposed is None:
        transposed = stored.shape != expected
    if stored.shape != (expected[::-1] if transposed else expected):
        wanted = list(expected[::-1] if transposed else expected)
        raise ValueError(f"{stored.name} has shape {list(stored.shape)}, expected {wanted}")
    return _Read(stored=stored, targets=targets, transposed=transposed)


def _load_units(reader: TensorReader, units: list[_Unit], account: LoadAccount, progress: Progress | None) -> None:
    """Read a unit's tensors, whatever shard they are in, while the one before is packed. The first error ends all."""
    told, done, total = 0, 0, sum(unit.num_bytes for unit in units)
    reading: deque[tuple[_Unit, int, list[Future[int]]]] = deque()
    with ThreadPoolExecutor(MAX_READERS, thread_name_prefix="weights") as pool:
        try:
            for unit in [*units, None]:
                if unit is not None:
                    account.unpacked.hold(unit.num_bytes)
                    reading.append((unit, unit.num_bytes, [pool.submit(_run, reader, read) for read in unit.reads]))
                    unit.reads.clear()
                while len(reading) > (1 if unit is not None else 0):
                    loaded, size, futures = reading.popleft()
                    for future in futures:
                        done += future.result()
                        if progress is not None and ((done - told) * 100 >= total or done == total):
                            told = done
                            progress(done, total)
                    if loaded.packable is not None:
                        loaded.packable.pack()
                    account.unpacked.release(size)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(reader: TensorReader, read: _Read) -> int:
    reader.read(read.stored, read.targets, transposed=read.transposed)
    return read.stored.num_bytes


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
