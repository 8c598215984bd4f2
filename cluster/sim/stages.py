"""Where every request is, and in which phase a worker's switch, for faults that wait for a moment.

The stages are those of the table in cluster/worker/README.md, and "moved" (given away, not yet taken up); the phases
are the worker states of ARCHITECTURE section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from cluster.router.effects import Ended, ToWorker
from cluster.sim.clock import VirtualClock
from cluster.sim.router import SimRouter
from cluster.sim.worker import SimWorker
from cluster.types import Dispatch, Moved, Tokens, WorkerInfo
from cluster.worker.effects import OpenFetch, Publish, SendEntry, SendTaken, StartCopy, ToEngine
from engine.messages import Add, Probe, PullClosed, Reserve

REQUEST_STAGES = (
    "probing",
    "waiting for source",
    "waiting for space",
    "pulling",
    "copying",
    "waiting for row",
    "first token",
    "streaming",
    "moved",
    "last token",
    "done",
)
PHASES = ("draining", "switching", "verifying")
STAGES = (*REQUEST_STAGES, *PHASES)
NO_ROW_AFTER_S = 0.02  # longer than a step: who has no row by then waits for another one's end


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A request at a stage: who decodes it, who is (or was last) its source, whose it is. In a phase: the switcher."""

    stage: str
    request_id: str = ""
    worker_id: str = ""
    source_id: str = ""
    router_id: str = ""


class StageWatcher:
    """Tells `listener` of every moment of a stage that it `seeks` then."""

    def __init__(
        self, clock: VirtualClock, listener: Callable[[Moment], None], seeks: Callable[[str, float], bool]
    ) -> None:
        self.deaf = False  # nobody listens any more, nor will: it need not watch from then on
        self._clock = clock
        self._listener = listener
        self._seeks = seeks
        self._dispatched: dict[str, tuple[str, str]] = {}  # request -> (router, worker)
        self._sources: dict[str, str] = {}
        self._reserved: set[str] = set()
        self._commands: dict[type, Callable[[SimWorker, Any], None]] = {
            Probe: lambda worker, probe: self._tell("probing", _owner(probe.request_id)),
            Add: self._on_add,
            Reserve: self._on_reserve,
            PullClosed: self._on_pull_closed,
        }
        self.checks: dict[type, Callable[[SimWorker, Any], None]] = {
            ToEngine: self._on_command,
            SendEntry: self._on_entry,
            StartCopy: lambda worker, effect: self._tell("copying", _owner(effect.piece.call_id)),
            SendTaken: lambda worker, effect: self._tell("pulling", _owner(effect.taken.call_id)),
            Publish: self._on_publish,
            OpenFetch: self._on_open,
        }
        self.router_checks: dict[type, Callable[[SimRouter, Any], None]] = {
            ToWorker: self._on_message,
            Ended: self._on_ended,
        }

    def on_worker(self, worker: SimWorker) -> None:
        """Nothing to see."""

    def on_info(self, info: WorkerInfo) -> None:
        """Nothing to see: phases are told as they begin, by Publish."""

    def _on_message(self, router: SimRouter, effect: ToWorker) -> None:
        dispatch = effect.message
        if isinstance(dispatch, Dispatch):
            self._dispatched[dispatch.request_id] = (router.router_id, effect.worker_id)

    def _on_ended(self, router: SimRouter, effect: Ended) -> None:
        if effect.code is None:
            self._tell("done", effect.request_id)

    def _on_command(self, worker: SimWorker, effect: ToEngine) -> None:
        tell = self._commands.get(type(effect.command))
        if tell is not None:
            tell(worker, effect.command)

    def _on_add(self, worker: SimWorker, add: Add) -> None:
        self._tell("first token", _owner(add.request_id))
        self._look_for_row(worker, add.request_id)

    def _on_reserve(self, worker: SimWorker, reserve: Reserve) -> None:
        engine_id = reserve.add.request_id
        if engine_id in self._reserved:
            self._tell("waiting for space", _owner(engine_id))
        self._reserved.add(engine_id)

    def _on_pull_closed(self, worker: SimWorker, closed: PullClosed) -> None:
        if closed.num_computed_tokens:
            self._tell("first token", _owner(closed.request_id))
            self._look_for_row(worker, closed.request_id)

    def _on_entry(self, worker: SimWorker, effect: SendEntry) -> None:
        entry = effect.entry
        if isinstance(entry, Tokens):
            self._tell("streaming" if entry.finish_reason is None else "last token", entry.request_id)
        elif isinstance(entry, Moved):
            self._tell("moved", entry.request_id)

    def _on_publish(self, worker: SimWorker, effect: Publish) -> None:
        if effect.info.state in PHASES:
            self._listener(Moment(stage=effect.info.state, worker_id=effect.info.worker_id))

    def _on_open(self, worker: SimWorker, effect: OpenFetch) -> None:
        self._sources[effect.open.request_id] = effect.source.worker_id
        self._tell("waiting for source", effect.open.request_id)

    def _look_for_row(self, worker: SimWorker, engine_id: str) -> None:
        core, at = worker.core, self._clock.now + NO_ROW_AFTER_S
        if self._seeks("waiting for row", at) and (owner := _owner(engine_id)):

            def look() -> None:
                if worker.core is core and core.scheduler.lacks_row(engine_id):
                    self._tell("waiting for row", owner)

            self._clock.at(at, look)

    def _tell(self, stage: str, request_id: str) -> None:
        if self.deaf or not self._seeks(stage, self._clock.now):
            return
        dispatched = self._dispatched.get(request_id)
        if dispatched is None:
            return
        router_id, worker_id = dispatched
        source_id = self._sources.get(request_id, "")
        self._listener(
            Moment(stage=stage, request_id=request_id, worker_id=worker_id, source_id=source_id, router_id=router_id)
        )


def _owner(name: str) -> str:
    """The request of an engine id or call id ("d:REQUEST:attempt:..."); "" for a canary's or another's."""
    return name.split(":", 2)[1] if name.startswith("d:") else ""
