"""One child process (a worker or the router): its start, its news, its end.

stdin   a pipe that is never written: its EOF tells the child that we are gone (PDEATHSIG, which the child sets,
        covers a parent that was killed; the pipe covers one that died before the child set it)
stdout  JSON objects, one a line, are news: {"progress": {stage, done, total}}, {"failed": why}, {"listening": where};
        everything else is log
stderr  log
end     SIGTERM = drain; after a grace SIGKILL. SIGINT is blocked in children: ctrl-C reaches the whole foreground
        group, and whoever started them decides in which order they stop. No new session: Ray kills a process group.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cluster.control.backend import Progress

_LAST_LINES = 20


class Child:
    """A running child process. Methods may be called from any thread; create it on one that outlives the child."""

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._log_file: IO[bytes] = log.open("ab")
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.progress: Progress | None = None
        self.failed = ""
        self.listening = ""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the child
        try:
            self._process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(env)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._reader = threading.Thread(target=self._read, name=f"log of {self.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if a signal ended it."""
        return self._process.poll()

    def last_words(self) -> str:
        """Why it ended, as far as it said: its "failed" message, else the last line of its log."""
        if self.exit_code is not None:
            self._reader.join(timeout=1.0)
        return self.failed or next((line for line in reversed(self._last_lines) if line.strip()), "")

    def terminate(self) -> None:
        """Ask it to drain and exit. Nothing happens if it has exited."""
        self._process.terminate()

    def kill(self) -> None:
        """End it now and wait for that."""
        self._process.kill()
        self._process.wait()
        self._close()

    def stop(self, grace_s: float) -> int:
        """Drain, wait up to grace_s, then kill. Returns the exit code."""
        self.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        self._close()
        return code

    def wait(self, timeout_s: float) -> bool:
        """True if it has exited within timeout_s."""
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.exit_code is not None

    def _close(self) -> None:
        self._reader.join(timeout=1.0)
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.close()

    def _read(self) -> None:
        """Copy output to the log and take the news out of it, until the child and all that inherited its pipe exit."""
        assert self._process.stdout is not None, "stdout is a pipe"
        with self._log_file as log, self._process.stdout as stdout:
            for raw in stdout:
                log.write(raw)
                log.flush()
                line = raw.decode(errors="replace").rstrip()
                news = _parse_news(line)
                if news is None:
                    self._last_lines.append(line)
                else:
                    self._take(news)

    def _take(self, news: dict[str, Any]) -> None:
        progress = news.get("progress")
        if isinstance(progress, dict):
            self.progress = Progress(
                stage=str(progress.get("stage", "")),
                done=int(progress.get("done", 0)),
                total=int(progress.get("total", 0)),
            )
        self.failed = str(news.get("failed", self.failed))
        self.listening = str(news.get("listening", self.listening))


def _parse_news(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        news = json.loads(line)
    except ValueError:
        return None
    return news if isinstance(news, dict) and news.keys() & {"progress", "failed", "listening"} else None
