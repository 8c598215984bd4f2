"""Single-producer single-consumer byte rings between a worker's network process and its rank, in shared memory.

    memfd:    0 magic, capacity | 64 tail (the reader's position) | DATA_OFFSET the bytes, wrapping
    eventfd:  number of messages written and not yet taken

The eventfd's counter is what publishes a message: its kernel lock orders the bytes before the count on every CPU, and
the same descriptor wakes an event loop (add_reader) or a poll(). A frame is a length (u32) and that many bytes.
Nobody ever blocks on a full ring: `try_send` says no and the sender keeps a bounded backlog. Torch-free.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

DATA_OFFSET = 4096
_MAGIC = 0x31474E525041454E  # "NEAPRNG1"
_CAPACITY, _TAIL = 1, 8  # u64 slots
_LENGTH = struct.Struct("=I")

COMMAND_RING_BYTES = 8 << 20  # a 131,072-token prompt is 512 KiB
ABORT_RING_BYTES = 1 << 20
EVENT_RING_BYTES = 8 << 20
STATUS_BYTES = 4096


class MessageTooLargeError(ValueError):
    """A message that this ring could not hold even when empty."""


@dataclass(frozen=True, kw_only=True)
class RingFds:
    """The two descriptors of a ring, as a child process gets them (pass_fds keeps the numbers)."""

    memory: int
    event: int


class _Mapping:
    """What both ends share: the mapping and the counters in it."""

    def __init__(self, fds: RingFds) -> None:
        self.fds = fds
        size = os.fstat(fds.memory).st_size
        self._map = mmap.mmap(fds.memory, size)
        self._view = memoryview(self._map)
        self._slots = self._view[:DATA_OFFSET].cast("Q")
        self._data = self._view[DATA_OFFSET:]
        self._capacity = size - DATA_OFFSET
        if self._slots[0] != _MAGIC or self._slots[_CAPACITY] != self._capacity:
            self._unmap()
            raise ValueError("the descriptor is not a ring")

    def fileno(self) -> int:
        """The eventfd: readable while messages wait."""
        return self.fds.event

    def close(self) -> None:
        """Drop the mapping and this process's descriptors."""
        self._unmap()
        os.close(self.fds.memory)
        os.close(self.fds.event)

    def _unmap(self) -> None:
        for view in (self._slots, self._data, self._view):
            view.release()
        self._map.close()


class RingWriter(_Mapping):
    """The producing end. One thread of one process."""

    def __init__(self, fds: RingFds) -> None:
        super().__init__(fds)
        self._head = 0

    def try_send(self, message: bytes) -> bool:
        """Append a message; False when it does not fit now. Raises MessageTooLargeError when it never will."""
        frame = _LENGTH.size + len(message)
        if frame > self._capacity:
            raise MessageTooLargeError(f"a message of {len(message)} bytes; the ring holds {self._capacity}")
        if frame > self._capacity - (self._head - self._slots[_TAIL]):
            return False
        self._put(self._head, _LENGTH.pack(len(message)))
        self._put(self._head + _LENGTH.size, message)
        self._head += frame
        os.eventfd_write(self.fds.event, 1)
        return True

    def _put(self, position: int, data: bytes) -> None:
        at = position % self._capacity
        first = min(len(data), self._capacity - at)
        view = memoryview(data)
        self._data[at : at + first] = view[:first]
        if first < len(data):
            self._data[: len(data) - first] = view[first:]


class RingReader(_Mapping):
    """The consuming end. One thread of one process."""

    def __init__(self, fds: RingFds) -> None:
        super().__init__(fds)
        self._position = 0
        os.set_blocking(fds.event, False)

    def receive(self) -> list[bytes]:
        """Every message that waits now, in order; empty when there is none. Never blocks."""
        try:
            count = os.eventfd_read(self.fds.event)
        except BlockingIOError:
            return []
        messages = []
        for _ in range(count):
            (length,) = _LENGTH.unpack(self._get(self._position, _LENGTH.size))
            messages.append(self._get(self._position + _LENGTH.size, length))
            self._position += _LENGTH.size + length
            self._slots[_TAIL] = self._position
        return messages

    def _get(self, position: int, length: int) -> bytes:
        at = position % self._capacity
        first = min(length, self._capacity - at)
        data = bytes(self._data[at : at + first])
        if first < length:
            data += bytes(self._data[: length - first])
        return data


def create_ring(capacity: int) -> RingFds:
    """Make a ring of `capacity` bytes; the caller opens an end of it here and hands the descriptors to a child."""
    memory = os.memfd_create("neap-ring", os.MFD_CLOEXEC)
    os.ftruncate(memory, DATA_OFFSET + capacity)
    os.pwrite(memory, struct.pack("=QQ", _MAGIC, capacity), 0)
    return RingFds(memory=memory, event=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


class StatusPage:
    """Step count and start of the running step, written by the rank and read by heartbeats without a lock.

    Each value is one aligned 64-bit word, so a reader sees it whole; the two need not belong to the same instant.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, STATUS_BYTES)
        self._view = memoryview(self._map)
        self._slots = self._view.cast("Q")

    @classmethod
    def create(cls) -> StatusPage:
        """A zeroed page."""
        fd = os.memfd_create("neap-status", os.MFD_CLOEXEC)
        os.ftruncate(fd, STATUS_BYTES)
        return cls(fd)

    def begin_step(self) -> None:
        """A step starts now (CLOCK_MONOTONIC, which processes of a host share)."""
        self._slots[1] = time.monotonic_ns()

    def end_step(self) -> None:
        """The running step is over."""
        self._slots[0] = self._slots[0] + 1
        self._slots[1] = 0

    @property
    def step_count(self) -> int:
        """Steps finished since the rank started."""
        return self._slots[0]

    def step_age_ms(self) -> int:
        """How long the running step has been running; 0 when none runs."""
        started = self._slots[1]
        return max(1, (time.monotonic_ns() - started) // 1_000_000) if started else 0

    def close(self) -> None:
        """Drop the mapping and the descriptor."""
        self._slots.release()
        self._view.release()
        self._map.close()
        os.close(self.fd)
