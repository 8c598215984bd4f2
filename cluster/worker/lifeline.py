"""A child process ends with its parent: by PDEATHSIG, and by the EOF of a pipe that the parent holds open.

PDEATHSIG covers a parent that is killed at any moment, the pipe one that died before the child set it. Torch-free.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone. Call it from the main thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def is_pipe(fd: int) -> bool:
    """Whether a descriptor is a pipe or a socket that a parent may hold the other end of."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def watch_pipe(fd: int, on_eof: Callable[[], object]) -> None:
    """Call `on_eof` in a thread of its own when the other end of a pipe is closed. What comes through it is ignored."""

    def watch() -> None:
        while os.read(fd, 4096):
            pass
        on_eof()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
