"""The routers of one cluster: processes that know nothing of each other and share the same workers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.config.environment import child_environment
from cluster.control.child import Child
from cluster.control.router_client import RouterClient, reachable
from cluster.spec import RouterSpec

DRAIN_S = 30.0
HURRY_S = 5.0


def router_argv(spec: Path) -> list[str]:
    """The command line of a router's process."""
    return [sys.executable, "-m", "cluster.router", str(spec)]


@dataclass(frozen=True, kw_only=True)
class EndedRouter:
    """A router's process that ended by itself. `failed`: it said itself that trying again is of no use."""

    name: str
    failed: bool
    words: str
    log: str


class Routers:
    """Starts, watches and ends the routers, by name. Nothing here restarts one; the controller does."""

    def __init__(self, run_dir: Path, argv: Callable[[Path], list[str]]) -> None:
        self._run_dir = run_dir
        self._argv = argv
        self._specs: dict[str, RouterSpec] = {}
        self._children: dict[str, Child] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The routers, in the order of their ports."""
        return tuple(self._specs)

    def add(self, specs: tuple[RouterSpec, ...]) -> None:
        """Say which routers there are to be: "router", or "router-0" and so on."""
        self._specs = {"router" if len(specs) == 1 else f"router-{i}": spec for i, spec in enumerate(specs)}

    def launch(self, name: str) -> None:
        """Start a router's process, or start it again."""
        path = self._run_dir / f"{name}.json"
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(self._specs[name]))
        self._children[name] = Child(self._argv(path), log=self._run_dir / f"{name}.log", env=child_environment())

    def client(self, name: str) -> RouterClient | None:
        """Talks to a router; None until its port is bound."""
        child, spec = self._children.get(name), self._specs.get(name)
        if child is None or spec is None or not child.listening:
            return None
        port = int(child.listening.rpartition(":")[2])
        return RouterClient(host=reachable(spec.host), port=port, api_key=spec.api_key)

    def ended(self) -> list[EndedRouter]:
        """Those whose process is gone."""
        return [
            EndedRouter(
                name=name,
                failed=bool(child.failed),
                words=f"{child.last_words()} (exit code {child.exit_code})",
                log=str(child.log),
            )
            for name, child in self._children.items()
            if child.exit_code is not None
        ]

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drain all at once; `hurry` cuts the waiting short."""
        children = list(self._children.values())
        for child in children:
            child.terminate()
        drained = asyncio.gather(*(asyncio.to_thread(child.wait, DRAIN_S) for child in children))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if hurry.is_set():  # the second signal lets them end their streams with an error event, without waiting
            for child in children:
                child.terminate()
            await asyncio.gather(*(asyncio.to_thread(child.wait, HURRY_S) for child in children))
        for child in children:
            child.kill()
        await drained
        self._children.clear()
