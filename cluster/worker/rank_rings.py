"""What crosses between network process and rank, over three rings: commands and aborts down, events up.

Every command carries a number, so the rank sees them in the order they were sent although aborts have a lane of their
own. The lane lets them overtake what waits because the command ring is full; what an overtaking abort would undo is
taken out of that backlog. Encoded with msgspec (engine/messages.py). Torch-free.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from cluster.spec import FakeSpec
from cluster.worker.rings import (
    ABORT_RING_BYTES,
    COMMAND_RING_BYTES,
    EVENT_RING_BYTES,
    RingFds,
    RingReader,
    RingWriter,
    StatusPage,
    create_ring,
)
from engine.config import EngineConfig
from engine.messages import Abort, Add, Command, EndServe, Event, Reserve, Serve, Shutdown

MAX_BACKLOG_BYTES = 64 << 20
_NUMBER_BYTES = 8
_FULL_RING_PAUSE_S = 0.001


class RankStuckError(RuntimeError):
    """The other end takes nothing for too long, or too much waits for it."""


class RankFds(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors that a rank inherits. `parent` is the read end of a pipe that the network process holds open."""

    commands: RingFds
    aborts: RingFds
    events: RingFds
    status: int
    parent: int

    def all(self) -> tuple[int, ...]:
        """Every descriptor, for pass_fds."""
        rings = (self.commands, self.aborts, self.events)
        return (*(fd for ring in rings for fd in (ring.memory, ring.event)), self.status, self.parent)


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told. `parent_pid` closes the gap between fork and PDEATHSIG."""

    engine: EngineConfig
    fds: RankFds
    parent_pid: int
    fake: FakeSpec | None = None


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    command: Command
    message: bytes


class NetworkEnd:
    """The network process's end. Creates the rings; use it from one thread."""

    def __init__(
        self,
        *,
        command_bytes: int = COMMAND_RING_BYTES,
        abort_bytes: int = ABORT_RING_BYTES,
        event_bytes: int = EVENT_RING_BYTES,
    ) -> None:
        parent, self._held_open = os.pipe2(os.O_CLOEXEC)
        self.status = StatusPage.create()
        self._commands = RingWriter(create_ring(command_bytes))
        self._aborts = RingWriter(create_ring(abort_bytes))
        self._events = RingReader(create_ring(event_bytes))
        self.fds = RankFds(
            commands=self._commands.fds,
            aborts=self._aborts.fds,
            events=self._events.fds,
            status=self.status.fd,
            parent=parent,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._number = 0
        self._waiting: deque[_Waiting] = deque()
        self._waiting_aborts: deque[_Waiting] = deque()
        self._waiting_bytes = 0

    @property
    def has_backlog(self) -> bool:
        """Whether commands wait because a ring was full: call `flush` soon."""
        return bool(self._waiting or self._waiting_aborts)

    def fileno(self) -> int:
        """Readable while events wait."""
        return self._events.fileno()

    def send(self, command: Command) -> None:
        """Send or queue a command. Raises MessageTooLargeError, and RankStuckError when too much waits."""
        self._number += 1
        waiting = _Waiting(
            command=command, message=self._number.to_bytes(_NUMBER_BYTES, "little") + self._encoder.encode(command)
        )
        if isinstance(command, Abort | EndServe | Shutdown):
            self._forget_undone(command)
            self._waiting_aborts.append(waiting)
        else:
            self._waiting.append(waiting)
        self._waiting_bytes += len(waiting.message)
        self.flush()
        if self._waiting_bytes > MAX_BACKLOG_BYTES:
            raise RankStuckError(f"{self._waiting_bytes} bytes of commands wait for the rank")

    def flush(self) -> None:
        """Send what waits, as far as it fits."""
        for lane, ring in ((self._waiting_aborts, self._aborts), (self._waiting, self._commands)):
            while lane and ring.try_send(lane[0].message):
                self._waiting_bytes -= len(lane.popleft().message)

    def receive(self) -> list[Event]:
        """Every event that waits now."""
        return [self._decoder.decode(message) for message in self._events.receive()]

    def close(self) -> None:
        """Drop every descriptor; a rank that still runs sees EOF and leaves."""
        os.close(self._held_open)
        os.close(self.fds.parent)
        for end in (self._commands, self._aborts, self._events, self.status):
            end.close()

    def _forget_undone(self, command: Command) -> None:
        kept = deque(waiting for waiting in self._waiting if not _undoes(command, waiting.command))
        self._waiting_bytes -= sum(len(w.message) for w in self._waiting) - sum(len(w.message) for w in kept)
        self._waiting = kept


class RankEnd:
    """The rank's end. Use it from one thread."""

    def __init__(self, fds: RankFds) -> None:
        self.status = StatusPage(fds.status)
        self._commands = RingReader(fds.commands)
        self._aborts = RingReader(fds.aborts)
        self._events = RingWriter(fds.events)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._poll = select.poll()
        self._poll.register(self._commands, select.POLLIN)
        self._poll.register(self._aborts, select.POLLIN)

    def receive(self) -> list[Command]:
        """Every command that waits now, in the order they were sent. Never blocks."""
        # Aborts first: whatever was sent before the last of them is in the command ring by then.
        messages = self._aborts.receive()
        messages += self._commands.receive()
        messages.sort(key=lambda message: int.from_bytes(message[:_NUMBER_BYTES], "little"))
        return [self._decoder.decode(memoryview(message)[_NUMBER_BYTES:]) for message in messages]

    def wait(self, timeout_s: float) -> None:
        """Sleep until a command comes, at most timeout_s."""
        self._poll.poll(timeout_s * 1000)

    def send(self, event: Event, *, timeout_s: float) -> None:
        """Send an event. Raises RankStuckError if the network process takes none for timeout_s."""
        message = self._encoder.encode(event)
        deadline = time.monotonic() + timeout_s
        while not self._events.try_send(message):
            if time.monotonic() > deadline:
                raise RankStuckError(f"the network process took no event for {timeout_s:g} s")
            time.sleep(_FULL_RING_PAUSE_S)

    def close(self) -> None:
        """Drop the mappings and descriptors."""
        for end in (self._commands, self._aborts, self._events, self.status):
            end.close()


def _undoes(command: Command, earlier: Command) -> bool:
    """Whether `command`, arriving before `earlier`, must keep it from arriving at all."""
    match command, earlier:
        case Abort(), Add():
            return earlier.request_id == command.request_id
        case Abort(), Reserve():
            return earlier.add.request_id == command.request_id
        case EndServe(), Serve():
            return earlier.call_id == command.call_id
    return False
