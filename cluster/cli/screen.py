"""What people see of a start: a live table on a terminal, a line each 10 s elsewhere, and one box when it is ready."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.control.backend import Progress
from cluster.control.controller import Snapshot
from cluster.control.router_client import RouterClient

LINE_EVERY_S = 10.0
QUESTION = "What is the capital of France?"  # the embedded model knows it too


class Screen(Protocol):
    """Where a start is shown."""

    def draw(self, snapshot: Snapshot) -> None:
        """Show where the start stands; called several times a second."""
        ...

    def tell(self, line: str) -> None:
        """One event for people."""
        ...

    def ready(self, client: RouterClient, model: str, notes: tuple[tuple[str, str], ...]) -> None:
        """The ready box."""
        ...

    def close(self) -> None:
        """Nothing more is drawn."""
        ...


class Rates:
    """GB/s per worker, from how far its loading was when it was first seen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: dict[str, tuple[float, int]] = {}

    def describe(self, worker_id: str, progress: Progress) -> str:
        """Such as "loading 1.2 of 4.8 GB (0.9 GB/s)" or "warming up 3 of 8"."""
        if progress.stage != "load":
            self._first.pop(worker_id, None)
            return f"warming up {progress.done} of {progress.total}"
        now = self._clock()
        since, start = self._first.setdefault(worker_id, (now, progress.done))
        rate = (progress.done - start) / (now - since) / 1e9 if now > since else 0.0
        speed = f" ({rate:.1f} GB/s)" if rate else ""
        return f"loading {progress.done / 1e9:.2g} of {progress.total / 1e9:.2g} GB{speed}"


def curl_line(client: RouterClient, model: str) -> str:
    """A request to copy. The key is named, not shown."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32})
    key = " -H 'authorization: Bearer '$NEAP_API_KEY" if client.api_key else ""
    return f"curl {client.url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"


class _Box:
    """The ready box and single lines, the same on a terminal and elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = clock()
        self._rates = Rates(clock)

    def tell(self, line: str) -> None:
        """One event for people."""
        self._console.print(f"neap: {line}", soft_wrap=True, markup=False, highlight=False)

    def ready(self, client: RouterClient, model: str, notes: tuple[tuple[str, str], ...]) -> None:
        """The ready box. Its lines have no border, so that they can be copied."""
        seconds = self._clock() - self._started
        rows = [("endpoint", f"{client.url}/v1"), ("model", model), *notes, ("talk", "neap chat"), ("stop", "ctrl-C")]
        width = max(len(name) for name, _ in rows) + 2
        self._console.rule(f"[bold green]neap is ready[/] after {seconds:.0f} s", align="left")
        for name, value in rows:
            line = Text.assemble((f"  {name}".ljust(width + 2), "bold"), value)
            self._console.print(line, soft_wrap=True, highlight=False)
        self._console.print(curl_line(client, model), soft_wrap=True, markup=False, highlight=False)
        self._console.rule()


class TerminalScreen(_Box):
    """A table that is drawn anew in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def draw(self, snapshot: Snapshot) -> None:
        """Redraw the table."""
        if not self._live.is_started:
            self._live.start()
        seconds = self._clock() - self._started
        table = Table.grid(padding=(0, 2))
        for view in snapshot.workers:
            bar: ProgressBar | str = ""
            words = view.state
            if view.progress is not None and view.state in ("launching", "starting"):
                words = self._rates.describe(view.worker_id, view.progress)
                bar = ProgressBar(total=max(view.progress.total, 1), completed=view.progress.done, width=24)
            table.add_row(f"  {view.worker_id}", view.role, words, bar)
        title = Text(f"neap: {snapshot.doing} ({seconds:.0f} s)")
        self._live.update(Group(title, table), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        if self._live.is_started:
            self._live.stop()


class LineScreen(_Box):
    """A line each 10 s, and at each change of what is done."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._next = 0.0
        self._doing = ""

    def draw(self, snapshot: Snapshot) -> None:
        """Say where the start stands if that is due."""
        rates = {v.worker_id: self._rates.describe(v.worker_id, v.progress) for v in snapshot.workers if v.progress}
        now = self._clock()
        if now < self._next and snapshot.doing == self._doing:
            return
        self._next, self._doing = now + LINE_EVERY_S, snapshot.doing
        parts = [
            f"{v.worker_id} {rates[v.worker_id] if v.state in ('launching', 'starting') and v.progress else v.state}"
            for v in snapshot.workers
        ]
        self.tell(": ".join(part for part in (snapshot.doing, ", ".join(parts)) if part))

    def close(self) -> None:
        """Nothing is open."""


def make_screen() -> Screen:
    """By where stdout goes."""
    console = Console()
    return TerminalScreen(console) if console.is_terminal else LineScreen(Console(width=100))
