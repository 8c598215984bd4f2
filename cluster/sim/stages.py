"""Where every request is, and in which phase a worker's switch, for faults that wait for a moment.

The stages are those of the table in cluster/worker/README.md, and "moved" (given away, not yet taken up); the phases
are the worker states of ARCHITECTURE section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cluster.router.effects import Ended, RouterEffect, ToWorker
from cluster.sim.clock import VirtualClock
from cluster.sim.router import SimRouter
from cluster.sim.worker import SimWorker
from cluster.types import Dispatch, Moved, Tokens, WorkerInfo
from cluster.worker.effects import Effect, OpenFetch, Publish, SendEntry, SendTaken, StartCopy, ToEngine
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
_TELLING = (Probe, Add, Reserve, PullClosed)
NO_ROW_AFTER_S = 0.02  # longer than a step: who has no row by then waits for another one's end


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A request at a stage: who decodes it, who is (or was last) its source, whose it is. In a phase: the switcher."""

    stage: str
    request_id: str = ""
    worker_id: str = ""
    source_id: str = ""
    router_id: str = ""


class StageWatcher:
    """Tells `listener` of every moment."""

    def __init__(self, clock: VirtualClock, listener: Callable[[Moment], None]) -> None:
        self.deaf = False  # nobody listens any more, nor will: nothing is kept up to date from then on
        self._clock = clock
        self._listener = listener
        self._dispatched: dict[str, tuple[str, str, int]] = {}  # request -> (router, worker, attempt)
        self._sources: dict[str, str] = {}
        self._reserved: set[str] = set()

    def on_worker(self, worker: SimWorker) -> None:
        """Nothing to see."""

    def on_info(self, info: WorkerInfo) -> None:
        """Nothing to see: phases are told as they begin, by Publish."""

    def on_router_effect(self, router: SimRouter, effect: RouterEffect) -> None:
        """Dispatches and ends."""
        if self.deaf:
            return
        if isinstance(effect, ToWorker):
            if isinstance(effect.message, Dispatch):
                dispatch = effect.message
                self._dispatched[dispatch.request_id] = (router.router_id, effect.worker_id, dispatch.attempt)
        elif isinstance(effect, Ended) and effect.code is None:
            self._tell("done", effect.request_id)

    def on_effect(self, worker: SimWorker, effect: Effect) -> None:
        """Everything else."""
        if self.deaf:
            return
        if isinstance(effect, ToEngine):
            command = effect.command
            if not isinstance(command, _TELLING):
                return
            if isinstance(command, Probe):
                self._tell("probing", _owner(command.request_id))
            elif isinstance(command, Add):
                self._tell("first token", _owner(command.request_id))
                self._look_for_row(worker, command.request_id)
            elif isinstance(command, Reserve):
                if command.add.request_id in self._reserved:
                    self._tell("waiting for space", _owner(command.add.request_id))
                self._reserved.add(command.add.request_id)
            elif isinstance(command, PullClosed) and command.num_computed_tokens:
                self._tell("first token", _owner(command.request_id))
                self._look_for_row(worker, command.request_id)
        elif isinstance(effect, SendEntry):
            if isinstance(effect.entry, Tokens):
                last = effect.entry.finish_reason is not None
                self._tell("last token" if last else "streaming", effect.entry.request_id)
            elif isinstance(effect.entry, Moved):
                self._tell("moved", effect.entry.request_id)
        elif isinstance(effect, StartCopy):
            self._tell("copying", _owner(effect.piece.call_id))
        elif isinstance(effect, SendTaken):
            self._tell("pulling", _owner(effect.taken.call_id))
        elif isinstance(effect, Publish):
            if effect.info.state in PHASES:
                self._listener(Moment(stage=effect.info.state, worker_id=effect.info.worker_id))
        elif isinstance(effect, OpenFetch):
            self._sources[effect.open.request_id] = effect.source.worker_id
            self._tell("waiting for source", effect.open.request_id)

    def _look_for_row(self, worker: SimWorker, engine_id: str) -> None:
        core = worker.core
        if owner := _owner(engine_id):

            def look() -> None:
                if worker.core is core and core.scheduler.lacks_row(engine_id):
                    self._tell("waiting for row", owner)

            self._clock.after(NO_ROW_AFTER_S, look)

    def _tell(self, stage: str, request_id: str) -> None:
        dispatched = self._dispatched.get(request_id)
        if self.deaf or dispatched is None:
            return
        router_id, worker_id, _ = dispatched
        source_id = self._sources.get(request_id, "")
        self._listener(
            Moment(stage=stage, request_id=request_id, worker_id=worker_id, source_id=source_id, router_id=router_id)
        )


def _owner(name: str) -> str:
    """The request of an engine id or call id ("d:REQUEST:attempt:..."); "" for a canary's or another's."""
    return name.split(":", 2)[1] if name.startswith("d:") else ""
