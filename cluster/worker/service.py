"""The worker's network process: the shell around the state machines. It moves messages and bytes and decides nothing.

    routers   --link--->  WorkerMachine  --Fetch-->  sources       effects of the machine, done here, in order:
    receivers --Fetch-->  (decode, prefill, role)                  rank, links, calls, copies
    controller --Switch->       ^ StepEvents of the rank           one flush of the links per event

Life cycle: starting (server up, rank loading, canaries) -> ready (and switches: worker/role.py) -> draining (signal) ->
gone; or, when the rank dies, failed:
links broken, which fails their requests at the routers, and exit code 1. Everything runs in one event loop; copies and
packing run in threads. Torch-free.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from cluster.errors import REFUSED
from cluster.rpc.fetch_client import FetchCalls
from cluster.rpc.fetch_server import FetchServicer
from cluster.rpc.link_server import LinkServicer
from cluster.rpc.server import WorkerServer
from cluster.rpc.switch_server import SwitchMethod
from cluster.spec import WorkerSpec
from cluster.transfer.connector import CallFence, SourceUnreachableError
from cluster.transfer.copies import Copies
from cluster.types import (
    Dispatch,
    Failed,
    FetchAccepted,
    FetchOpen,
    FetchRefused,
    FetchReply,
    FetchTaken,
    Heartbeat,
    Piece,
    RouterMessage,
    SwitchReply,
    SwitchRequest,
    Transport,
    WorkerInfo,
)
from cluster.worker.cache_feed import CacheFeed
from cluster.worker.effects import (
    CloseFetch,
    Effect,
    EndCall,
    OpenFetch,
    Publish,
    SendEntry,
    SendFetch,
    SendSwitchReply,
    SendTaken,
    StartCopy,
    ToEngine,
)
from cluster.worker.engine_loop import EngineLoop, layout_of, map_kv_memory
from cluster.worker.failpoints import Failpoint
from cluster.worker.identity import describe_ready, starting_info
from cluster.worker.machine import WorkerMachine
from cluster.worker.transports import Transports
from engine.messages import Load, RankProgress, RankReady, StepEvents

_log = logging.getLogger(__name__)
MAX_TIMER_S = 0.25  # the machines are asked at least this often: only so can they tell their own lag from a silence


class WorkerService:
    """One worker. `on_state` is told of every change of `info`; `on_dead` of the rank's death."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        on_state: Callable[[WorkerInfo], None],
        on_progress: Callable[[RankProgress], None],
        on_dead: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._on_state = on_state
        self._on_progress = on_progress
        self._on_dead = on_dead
        self._info = starting_info(spec)
        self._load = Load()
        self._links = LinkServicer(self, spec.link_outbox_tokens, SwitchMethod(self))
        self._sources = FetchServicer(self)
        self._server = WorkerServer(self._links, self._sources, host=spec.host, port=spec.port)
        self._engine = EngineLoop(spec.engine, spec.fake, self)
        self._cache_feed = CacheFeed()
        self._calls = FetchCalls(self)
        self._transports = Transports(spec.transports)
        self._copies = Copies(self._transports.connectors, self._on_copied)
        self._machine: WorkerMachine | None = None
        self._switches: dict[str, asyncio.Future[SwitchReply]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._healthy: asyncio.Task[None] | None = None
        self._failpoint = Failpoint(spec.failpoint) if spec.failpoint else None

    # ---- life

    async def start(self) -> None:
        """Listen and start the rank. Raises OSError if the port is taken."""
        address = await self._server.start()
        self._engine.start()
        self._set_info(replace(self._info, address=address))

    @property
    def num_live(self) -> int:
        """Requests and served calls that are not over."""
        return self._machine.num_live if self._machine else 0

    async def begin_drain(self) -> None:
        """Take no new request; what runs finishes soon or is given away."""
        await self._server.set_serving(False)
        if self._machine is not None:
            self._do(self._machine.retire(time.monotonic()))

    async def close(self, reason: str) -> None:
        """End links, calls and the rank, in this order."""
        await self._server.set_serving(False)
        self._links.break_all(reason)
        await self._server.stop(0.2)  # long enough for the reason to reach the routers
        self._machine = None
        for waiting in self._switches.values():
            waiting.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await self._calls.close()
        await self._engine.close()
        await asyncio.to_thread(self._copies.close)
        self._transports.close()

    def beat(self) -> None:
        """Send a heartbeat on every link. From the I/O side: also while the engine hangs, and then it says so."""
        self._engine.look()
        heartbeat = Heartbeat(
            info=self._info,
            load=self._load,
            step_count=self._engine.step_count,
            step_age_ms=self._engine.step_age_ms(),
            peers=self._machine.prefill.peers.rates() if self._machine else (),
        )
        self._links.send_heartbeat(heartbeat)
        self._do(self._feed(time.monotonic(), soon=True))

    def _feed(self, now: float, *, soon: bool = False) -> list[Effect]:
        """What the routers are told of the prefix cache, if it is time."""
        news = self._cache_feed.news(now, self._links.link_ids, soon=soon)
        return [SendEntry(link_id=link_id, entry=entry) for link_id, entry in news]

    def _set_info(self, info: WorkerInfo) -> None:
        self._info = info
        self._on_state(info)

    # ---- the rank (EngineHandler)

    def on_progress(self, progress: RankProgress) -> None:
        """See EngineHandler."""
        self._on_progress(progress)

    def on_ready(self, ready: RankReady) -> None:
        """See EngineHandler."""
        layout = layout_of(ready)
        self._transports.open(map_kv_memory(ready))
        self._load = Load(num_blocks=layout.num_blocks - 1, num_free_blocks=layout.num_blocks - 1)
        info = describe_ready(self._info, ready, layout)
        local = self._transports.local_memory(ready)
        self._machine = WorkerMachine(info, layout, local, ready.checksum_algorithm)
        self._set_info(info)
        self._do(self._machine.begin(time.monotonic()))

    def on_step_events(self, events: StepEvents) -> None:
        """See EngineHandler."""
        self._load = events.load
        self._cache_feed.on_step(events.stored, events.evicted)
        if self._machine is not None:
            now = time.monotonic()
            self._do([*self._machine.on_events(now, events), *self._feed(now)])

    def on_death(self, reason: str) -> None:
        """See EngineHandler."""
        self._set_info(replace(self._info, state="failed"))
        self._on_dead(reason)

    # ---- routers (LinkHandler)

    def info(self) -> WorkerInfo:
        """See LinkHandler."""
        return self._info

    def on_router_message(self, link_id: str, message: RouterMessage) -> None:
        """See LinkHandler."""
        if self._machine is None:
            if isinstance(message, Dispatch):
                self._refuse(link_id, message)
            return
        now = time.monotonic()
        if isinstance(message, Dispatch):
            self._do(self._machine.on_dispatch(now, link_id, message))
        else:
            self._do(self._machine.on_abort(now, link_id, message))

    def on_link_broken(self, link_id: str) -> None:
        """See LinkHandler."""
        if self._machine is not None:
            self._do(self._machine.on_link_broken(time.monotonic(), link_id))

    async def switch(self, request: SwitchRequest) -> SwitchReply:
        """See SwitchHandler."""
        if self._machine is None:
            return SwitchReply(outcome="refused", info=self._info, reason=f"the worker is {self._info.state}")
        call_id = secrets.token_hex(8)
        reply: asyncio.Future[SwitchReply] = asyncio.get_running_loop().create_future()
        self._switches[call_id] = reply
        try:
            self._do(self._machine.on_switch(time.monotonic(), call_id, request))
            return await reply
        finally:
            del self._switches[call_id]

    def _refuse(self, link_id: str, dispatch: Dispatch) -> None:
        message = f"the worker is {self._info.state}"
        failed = Failed(request_id=dispatch.request_id, attempt=dispatch.attempt, code=REFUSED, message=message)
        self._do([SendEntry(link_id=link_id, entry=failed)])

    # ---- receivers (FetchHandler)

    def on_fetch(self, call: FetchOpen) -> None:
        """See FetchHandler."""
        if self._machine is None or not self._transports.can_serve:
            refused = FetchRefused(code="state", message=f"the worker is {self._info.state} or its KV is out of reach")
            self._do([SendFetch(call_id=call.call_id, reply=refused), EndCall(call_id=call.call_id)])
            return
        self._do(self._machine.on_fetch(time.monotonic(), self._transports.offered(call)))

    def on_taken(self, taken: FetchTaken) -> None:
        """See FetchHandler."""
        if self._machine is not None:
            self._do(self._machine.on_taken(time.monotonic(), taken))

    def on_call_broken(self, call_id: str) -> None:
        """See FetchHandler."""
        if self._machine is not None:
            self._do(self._machine.on_call_broken(time.monotonic(), call_id))

    def pack(self, transport: Transport, piece: Piece) -> Piece:
        """See FetchHandler."""
        return self._transports.connectors[transport].source().pack(piece)

    # ---- sources (FetchCallHandler) and copies

    def on_fetch_reply(self, call: FetchOpen, reply: FetchReply) -> None:
        """See FetchCallHandler."""
        if self._machine is None:
            return
        now = time.monotonic()
        if isinstance(reply, FetchAccepted):
            fence = CallFence(call_id=call.call_id, source_incarnation=call.source_incarnation)
            try:
                self._copies.begin_call(reply, fence)
            except SourceUnreachableError as error:
                _log.info("call %s: %s", call.call_id, error)
                self._do(self._machine.on_local_unavailable(now, call.call_id))
                return
        self._do(self._machine.on_fetch_reply(now, call.call_id, reply))

    def on_fetch_broken(self, call: FetchOpen) -> None:
        """See FetchCallHandler."""
        self._copies.end_call(call.call_id)
        if self._machine is not None:
            self._do(self._machine.on_fetch_broken(time.monotonic(), call.call_id))

    def _on_copied(self, copy_id: int, ok: bool) -> None:
        if self._machine is not None:
            self._do(self._machine.on_copied(time.monotonic(), copy_id, ok))

    # ---- effects and time

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects if self._failpoint is None else self._failpoint.watch(effects):
            self._perform(effect)
        self._links.flush()
        self._arm_timer()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case ToEngine(command=command):
                self._engine.send(command)
            case SendEntry(link_id=link_id, entry=entry):
                self._links.put(link_id, entry)
            case OpenFetch(source=source, open=opened):
                self._calls.open(source, self._transports.asked(opened, source, self._info))
            case SendTaken(taken=taken):
                self._calls.send_taken(taken)
            case CloseFetch(call_id=call_id):
                self._calls.close_call(call_id)
                self._copies.end_call(call_id)
            case StartCopy(copy_id=copy_id, piece=piece, target_block_ids=targets):
                self._copies.start(copy_id, piece, targets)
            case SendFetch(call_id=call_id, reply=reply):
                self._sources.send(call_id, reply)
            case EndCall(call_id=call_id):
                self._sources.end(call_id)
            case Publish(info=info):
                self._publish(info)
            case SendSwitchReply(call_id=call_id, reply=switched):
                if (waiting := self._switches.get(call_id)) is not None and not waiting.done():
                    waiting.set_result(switched)

    def _publish(self, info: WorkerInfo) -> None:
        if info.state == "ready" and self._info.state == "starting":
            self._healthy = asyncio.get_running_loop().create_task(self._server.set_serving(True))
        self._set_info(info)
        self.beat()

    def _arm_timer(self) -> None:
        if self._machine is None:
            return
        now = time.monotonic()
        wanted = self._machine.next_timer()
        at = now + MAX_TIMER_S if wanted is None else min(now + MAX_TIMER_S, wanted)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._machine is None:
            return
        self._transports.sweep()
        now = time.monotonic()
        self._do(self._machine.on_timer(now))
