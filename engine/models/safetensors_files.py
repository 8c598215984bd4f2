"""Reads tensors out of safetensors files with pread, straight to where they belong or through a small staging buffer.

Not memory-mapped: mapped pages count as this process's memory until the file is closed, so a load would peak at twice
the model. Format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: `offset` in bytes from the start of the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """As stored."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their data. Raises ValueError naming the file (and the tensor).

    Everything is checked against the file's size, so that a truncated download is told here.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: not a readable safetensors file (its header does not fit)")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        found = [_stored(path, name, entry, 8 + header_bytes) for name, entry in entries]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error!r})") from error
    for tensor in found:
        if tensor.offset < 8 + header_bytes or tensor.offset + tensor.num_bytes > size:
            raise ValueError(f"{path}: not a readable safetensors file ({tensor.name} lies outside of it)")
    return sorted(found, key=lambda tensor: tensor.offset)


def _stored(path: Path, name: str, entry: dict[str, object], data_start: int) -> StoredTensor:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"{name}: shape and data_offsets are lists")
    if entry["dtype"] not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ValueError(f"{path}: {name} is stored as {entry['dtype']}, which is not supported (supported: {known})")
    dtype = _DTYPES[str(entry["dtype"])]
    sizes = tuple(int(one) for one in shape)
    start, end = (int(one) for one in offsets)
    if min(sizes, default=1) < 0 or end - start != math.prod(sizes) * dtype.itemsize:
        raise TypeError(f"{name}: {end - start} bytes are not those of its shape {list(sizes)}")
    return StoredTensor(path=path, name=name, dtype=dtype, shape=sizes, offset=data_start + start)


class ByteCount:
    """How many bytes are held, and were at most. Threads may share it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.held_bytes = 0
        self._lock = threading.Lock()

    def hold(self, num_bytes: int) -> None:
        """From now on."""
        with self._lock:
            self.held_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def release(self, num_bytes: int) -> None:
        """No longer."""
        with self._lock:
            self.held_bytes -= num_bytes


class LoadAccount:
    """What a load holds beside the packed model, for tests: weights that are not packed yet, and readers' buffers."""

    def __init__(self) -> None:
        self.unpacked = ByteCount()
        self.buffers = ByteCount()


class TensorReader:
    """The open files of one load. Threads may share it; close it after the last read.

    What can't be read straight to its place goes through buffers of `chunk_bytes` (or one row, if that is more).
    """

    def __init__(self, buffers: ByteCount, chunk_bytes: int) -> None:
        self._buffers = buffers
        self._chunk_bytes = chunk_bytes
        self._descriptors: dict[Path, int] = {}

    def open(self, path: Path) -> None:
        """Before the first read of that file."""
        self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """All files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, stored: StoredTensor, targets: list[Tensor], *, transposed: bool) -> None:
        """Fill `targets`, which lie behind one another along dimension 0 of the tensor, or of its transpose.

        Casts and moves to other devices in chunks of rows; equal memory is read into without a copy. Shapes have been
        checked. Raises ValueError if the file ends early (it has been cut since its header was read).
        """
        if transposed:
            self._read_chunks(stored, targets, transposed=True)
            return
        row, row_bytes = 0, stored.num_bytes // max(stored.shape[0], 1)
        for target in targets:
            part = StoredTensor(
                path=stored.path,
                name=stored.name,
                dtype=stored.dtype,
                shape=tuple(target.shape),
                offset=stored.offset + row * row_bytes,
            )
            if target.device.type == "cpu" and target.dtype == stored.dtype and target.is_contiguous():
                self._fill(part, 0, target.view(-1).view(torch.uint8))
            else:
                self._read_chunks(part, [target], transposed=False)
            row += target.shape[0]

    def _read_chunks(self, stored: StoredTensor, targets: list[Tensor], *, transposed: bool) -> None:
        num_rows = stored.shape[0]
        row_bytes = stored.num_bytes // max(num_rows, 1)
        step = max(self._chunk_bytes // max(row_bytes, 1), 1)
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            self._buffers.hold(count * row_bytes)
            data = torch.empty(count * row_bytes, dtype=torch.uint8)
            self._fill(stored, start * row_bytes, data)
            chunk = data.view(stored.dtype).view(count, *stored.shape[1:])
            column = 0
            for target in targets:
                if transposed:
                    target[:, start : start + count].copy_(chunk[:, column : column + target.shape[0]].T)
                    column += target.shape[0]
                else:
                    target[start : start + count].copy_(chunk)
            self._buffers.release(count * row_bytes)

    def _fill(self, stored: StoredTensor, start: int, data: Tensor) -> None:
        left = data.numpy().data
        offset = stored.offset + start
        while left:
            count = os.preadv(self._descriptors[stored.path], [left], offset)
            if count == 0:
                raise ValueError(f"{stored.path} ends within {stored.name}: it has been cut while it was read")
            left, offset = left[count:], offset + count
