"""The network process's side of a rank: start it, send it commands, hand its events on, notice its death.

    start() -> on_progress* -> on_ready(RankReady) -> on_events(StepEvents)* -> on_death(reason), once, or close()
Everything is called in the event loop. Torch-free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from typing import Protocol, cast

import msgspec

from cluster.spec import FakeSpec
from cluster.worker.rank_rings import NetworkEnd, RankSpec, RankStuckError
from cluster.worker.rings import MessageTooLargeError
from engine.config import EngineConfig
from engine.kv.layout import KVDType, KVLayout
from engine.kv.memory import KVMemory
from engine.messages import Command, Event, RankFailed, RankProgress, RankReady, Shutdown, StepEvents

_log = logging.getLogger(__name__)
FLUSH_S = 0.005  # how often a full ring is tried again
STOPPED_BEATS = 3  # looks in a row at which a rank must be found stopped
SHUTDOWN_S = 5.0


class EngineHandler(Protocol):
    """Whom a rank's news go to: the worker's shell."""

    def on_progress(self, progress: RankProgress) -> None:
        """The rank loads or warms up."""
        ...

    def on_ready(self, ready: RankReady) -> None:
        """The rank takes commands now."""
        ...

    def on_step_events(self, events: StepEvents) -> None:
        """What a step caused."""
        ...

    def on_death(self, reason: str) -> None:
        """The rank is gone or of no use any more. The last call."""
        ...


class EngineLoop:
    """One rank process. `start` must be called from the main thread: the rank dies with the thread that made it."""

    def __init__(self, engine: EngineConfig, fake: FakeSpec | None, handler: EngineHandler) -> None:
        self._engine = engine
        self._fake = fake
        self._handler = handler
        self._end = NetworkEnd()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._reason = ""
        self._serving = False
        self._over = False
        self._num_stopped = 0

    @property
    def pid(self) -> int:
        """The rank's process id; 0 before start."""
        return self._process.pid if self._process else 0

    @property
    def step_count(self) -> int:
        """Steps finished, read from shared memory: right also while the rank hangs."""
        return self._end.status.step_count

    def step_age_ms(self) -> int:
        """How long the running step has been running; 0 when none runs."""
        return self._end.status.step_age_ms()

    def start(self) -> None:
        """Spawn the rank."""
        spec = RankSpec(engine=self._engine, fds=self._end.fds, parent_pid=os.getpid(), fake=self._fake)
        command = [sys.executable, "-m", "cluster.worker.rank", msgspec.json.encode(spec).decode()]
        self._loop = asyncio.get_running_loop()
        self._process = subprocess.Popen(command, pass_fds=self._end.fds.all(), stdin=subprocess.DEVNULL)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._loop.add_reader(self._end.fileno(), self._on_events)

    def send(self, command: Command) -> None:
        """Send a command. Never blocks; a rank that takes nothing for long is given up (on_death)."""
        if self._over:
            return
        try:
            self._end.send(command)
        except (RankStuckError, MessageTooLargeError) as error:
            self._die(str(error))
            return
        self._flush_later()

    def look(self) -> None:
        """To be called with each heartbeat. A rank that somebody stopped (SIGSTOP) is given up within three.

        A slow step tells nothing, so only the kernel's word counts; a rank under a debugger is left alone.
        """
        self._num_stopped = self._num_stopped + 1 if not self._over and _is_stopped(self.pid) else 0
        if self._num_stopped >= STOPPED_BEATS:
            self._die("the rank's process is stopped")

    async def close(self) -> None:
        """Ask the rank to leave, end it if it does not within a few seconds, and drop everything."""
        if self._process is None:
            self._end.close()
            return
        if self._serving and not self._over:  # while it loads it reads no commands, and has nothing to lose
            self.send(Shutdown())
            self._over = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, SHUTDOWN_S)
        self._over = True
        self._process.kill()
        self._process.wait()
        self._detach()
        self._end.close()

    def _detach(self) -> None:
        assert self._loop is not None, "detached after start"
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _flush_later(self) -> None:
        if self._end.has_backlog and self._flush_timer is None:
            assert self._loop is not None, "commands are sent after start"
            self._flush_timer = self._loop.call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        if not self._over:
            self._end.flush()
            self._flush_later()

    def _on_events(self) -> None:
        for event in self._end.receive():
            if not self._over:
                self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, StepEvents):
            self._handler.on_step_events(event)
        elif isinstance(event, RankProgress):
            self._handler.on_progress(event)
        elif isinstance(event, RankReady):
            self._serving = True
            self._handler.on_ready(event)
        elif isinstance(event, RankFailed):
            self._reason = event.message

    def _on_exit(self) -> None:
        assert self._process is not None, "only a started rank exits"
        if self._over or self._pidfd < 0:
            return
        self._on_events()  # its last words
        code = self._process.wait()
        self._die(self._reason or f"the rank exited with code {code}")

    def _die(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._detach()
        self._handler.on_death(reason)


def _is_stopped(pid: int) -> bool:
    """Whether a process is in job-control stop: state T in /proc/PID/stat, the field after the name in brackets."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False  # gone: the pidfd tells


def layout_of(ready: RankReady) -> KVLayout:
    """The rank's KV layout."""
    return KVLayout(
        num_blocks=ready.num_blocks,
        num_layers=ready.num_layers,
        num_kv_heads=ready.num_kv_heads,
        block_size=ready.block_size,
        head_dim=ready.head_dim,
        dtype=cast(KVDType, ready.kv_dtype),
    )


def map_kv_memory(ready: RankReady) -> KVMemory | None:
    """The rank's KV memory, writable; None when it lies on a device."""
    if not ready.kv_path:
        return None
    return KVMemory.open(ready.kv_path, layout_of(ready), ready.kv_nonce, writable=True)
