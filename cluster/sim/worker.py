"""A worker on the virtual clock: the real machines, scheduler and block manager around the exact fake model.

What cluster/worker/service.py does over gRPC, rings and shared memory, this does with callbacks. The rank's steps take
their predicted time; a hung rank finishes none while the network side goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any, Protocol

from msgspec.structs import replace

from cluster.sim.clock import VirtualClock
from cluster.sim.copies import land, payload
from cluster.sim.faults import Faults
from cluster.sim.network import Connection, End, Network
from cluster.sim.process import SimProcess
from cluster.sim.worker_config import SimWorkerConfig
from cluster.transfer.connector import CallFence
from cluster.types import (
    HEARTBEAT_S,
    Dispatch,
    Entry,
    FetchAccepted,
    FetchOpen,
    FetchReply,
    FetchTaken,
    Heartbeat,
    LocalMemory,
    Piece,
    RouterMessage,
    SwitchRequest,
    WorkerInfo,
)
from cluster.worker.cache_feed import CacheFeed
from cluster.worker.decode import DecodeMachine
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
from cluster.worker.machine import WorkerMachine
from cluster.worker.prefill import PrefillMachine
from engine.fake_engine import ArrayMemory, build_fake_engine
from engine.messages import StepEvents

RING_S = 20e-6  # a command on its way to the rank


class World(Protocol):
    """What a worker needs of the cluster around it."""

    clock: VirtualClock
    network: Network
    faults: Faults
    memories: dict[str, tuple[str, ArrayMemory]]
    workers: dict[str, SimWorker]

    def on_effect(self, worker: SimWorker, effect: Effect) -> None:
        """A worker is about to perform an effect: for the journal, and for whoever waits for a stage."""
        ...

    def publish(self, info: WorkerInfo) -> None:
        """A worker's entry of the registry."""
        ...


class SimWorker:
    """One incarnation of a worker."""

    def __init__(self, world: World, config: SimWorkerConfig, incarnation: str) -> None:
        self.config = config
        self.incarnation = incarnation
        self._world = world
        self.process = SimProcess(world.clock, config.worker_id)  # the network side
        self.rank = SimProcess(world.clock, config.worker_id)
        self.memory = ArrayMemory(config.engine.layout)
        self.core = build_fake_engine(config.engine, memory=self.memory)
        layout = config.engine.layout
        info = WorkerInfo(
            worker_id=config.worker_id,
            incarnation=incarnation,
            epoch=1,
            role=config.role,
            state="starting",
            address=f"{config.worker_id}:1",
            identity=config.engine.model.identity,
            kv_fingerprint=layout.fingerprint(),
            block_size=layout.block_size,
            max_model_len=config.engine.max_model_len,
            max_num_seqs=config.engine.engine.max_num_seqs,
            vocab_size=config.engine.model.vocab_size,
            eos_token_ids=(config.engine.model.eos_token_id,),
            profile=config.engine.profile,
        )
        path = f"/sim/{incarnation}"
        world.memories[path] = (config.host, self.memory)
        local = LocalMemory(path=path, nonce=incarnation.encode(), num_blocks=layout.num_blocks)
        self.machine = WorkerMachine(info, layout, local, "xxh3_64")
        self.cache_feed = CacheFeed()
        self.core.scheduler.blocks.cache.record_changes()
        self.hung = False
        self.num_steps = 0
        self._jitter = Random(incarnation)
        self._step_started_at: float | None = None
        self._kicked = False
        self._links: dict[str, Connection] = {}
        self._outbox: dict[str, list[Entry]] = {}
        self._fetches: dict[str, Connection] = {}  # calls that we made
        self._served: dict[str, Connection] = {}
        self._remote_calls: set[str] = set()  # served with transport "grpc": pieces carry their bytes
        self._source_memory: dict[str, ArrayMemory] = {}
        self._fences: dict[str, CallFence] = {}  # of calls that we made
        self._switches: dict[str, Connection] = {}
        self._wake_up_at = float("inf")
        self._beat()
        self._do(self.machine.begin(world.clock.now))

    @property
    def info(self) -> WorkerInfo:
        """What it is now."""
        return self.machine.info

    @property
    def decode(self) -> DecodeMachine:
        """Its side as decode worker."""
        return self.machine.decode

    @property
    def prefill(self) -> PrefillMachine:
        """Its side as source."""
        return self.machine.prefill

    # ---- the link

    def accept_link(self, link_id: str) -> End:
        """A router connects: our end of its link. Say Welcome with `welcome` once the connection stands."""
        return End(
            process=self.process,
            on_message=partial(self._from_router, link_id),
            on_closed=partial(self._link_broken, link_id),
        )

    def welcome(self, link_id: str, connection: Connection) -> None:
        """The connection stands."""
        self._links[link_id] = connection
        self.process.post(lambda: connection.send(1, self.info))

    def _from_router(self, link_id: str, message: RouterMessage) -> None:
        now = self._world.clock.now
        if isinstance(message, Dispatch):
            self._do(self.machine.on_dispatch(now, link_id, message))
        else:
            self._do(self.machine.on_abort(now, link_id, message))

    def _link_broken(self, link_id: str) -> None:
        self._links.pop(link_id, None)
        self._do(self.machine.on_link_broken(self._world.clock.now, link_id))

    def _beat(self) -> None:
        self._tell()
        self.process.at(self._world.clock.now + HEARTBEAT_S, self._beat)

    def _tell(self) -> None:
        """A heartbeat on every link, and our entry of the registry."""
        clock = self._world.clock
        age_s = clock.now - self._step_started_at if self._step_started_at is not None else 0.0
        beat = Heartbeat(
            info=self.info,
            load=self.core.load(),
            step_count=self.num_steps,
            step_age_ms=int(age_s * 1000),
            peers=self.prefill.peers.rates(),
        )
        for connection in self._links.values():
            connection.send(1, beat)
        self._world.publish(self.info)
        self._feed(soon=True)

    def _feed(self, *, soon: bool = False) -> None:
        """Tell the routers what the prefix cache took in and gave up."""
        for link_id, news in self.cache_feed.news(self._world.clock.now, tuple(self._links), soon=soon):
            self._links[link_id].send(1, (news,))

    # ---- the controller

    def accept_switch(self, call_id: str, request: SwitchRequest, connection: Connection) -> None:
        """A controller asks for another role; the reply goes back on its connection if that still stands."""
        self._switches[call_id] = connection
        self._do(self.machine.on_switch(self._world.clock.now, call_id, request))

    # ---- Fetch, as source

    def accept_fetch(self, call: FetchOpen, connection: Connection) -> None:
        """A peer's call arrived."""
        self._served[call.call_id] = connection
        answer = self._world.faults.answer(self.config.worker_id, call)
        if answer is not None:
            self._do([SendFetch(call_id=call.call_id, reply=answer), EndCall(call_id=call.call_id)])
            return
        self._do(self.machine.on_fetch(self._world.clock.now, call))

    def _taken(self, taken: FetchTaken) -> None:
        self._do(self.machine.on_taken(self._world.clock.now, taken))

    def _call_broken(self, call_id: str) -> None:
        self._served.pop(call_id, None)
        self._do(self.machine.on_call_broken(self._world.clock.now, call_id))

    # ---- Fetch, as receiver

    def _open_fetch(self, effect: OpenFetch) -> None:
        call = effect.open
        source = self._world.workers[effect.source.worker_id]  # whoever has that address now
        here = End(
            process=self.process,
            on_message=partial(self._from_source, call.call_id),
            on_closed=partial(self._fetch_broken, call.call_id),
        )
        opened: list[Connection] = []

        def at_source(message: Any) -> None:
            if isinstance(message, FetchOpen):
                source.accept_fetch(message, opened[0])
            else:
                source._taken(message)

        there = End(process=source.process, on_message=at_source, on_closed=partial(source._call_broken, call.call_id))
        opened.append(self._world.network.connect(here, there))
        self._fetches[call.call_id] = opened[0]
        self._fences[call.call_id] = CallFence(call_id=call.call_id, source_incarnation=effect.source.incarnation)
        opened[0].send(0, call)

    def has_call(self, call_id: str) -> bool:
        """Whether a call that we made stands."""
        return call_id in self._fetches

    def serves(self, call_id: str) -> bool:
        """Whether a call that we serve stands."""
        return call_id in self._served

    def _from_source(self, call_id: str, reply: FetchReply) -> None:
        now = self._world.clock.now
        if isinstance(reply, Piece):
            reply = self._world.faults.piece(self.config.worker_id, reply)
        if isinstance(reply, FetchAccepted) and reply.local is not None:
            host, memory = self._world.memories[reply.local.path]
            if host != self.config.host:
                self._do(self.machine.on_local_unavailable(now, call_id))
                return
            self._source_memory[call_id] = memory
        self._do(self.machine.on_fetch_reply(now, call_id, reply))

    def _fetch_broken(self, call_id: str) -> None:
        self._fetches.pop(call_id, None)
        self._do(self.machine.on_fetch_broken(self._world.clock.now, call_id))

    def _start_copy(self, effect: StartCopy) -> None:
        piece, faults = effect.piece, self._world.faults
        asked = faults.copy_s(self.config.worker_id, piece)
        usual = self.config.copy_s + self.config.copy_s_per_block * len(piece.checksums)
        source, fence = self._source_memory.get(piece.call_id), self._fences.get(piece.call_id)
        faults.copy_started(self.incarnation, effect)
        delay_s = usual if asked is None else asked
        self.process.at(self._world.clock.now + delay_s, self._copied, effect, source, fence)

    def _copied(self, effect: StartCopy, source: ArrayMemory | None, fence: CallFence | None) -> None:
        piece, faults = effect.piece, self._world.faults
        blocks = self.core.scheduler.blocks
        spoil = faults.spoil_of(self.config.worker_id, piece, source)
        ok = fence is not None and land(self.memory, blocks, effect, fence, source, spoil)
        faults.copy_ended(self.incarnation, effect, ok)
        self._do(self.machine.on_copied(self._world.clock.now, effect.copy_id, ok))

    # ---- effects

    def _do(self, effects: Iterable[Effect]) -> None:
        """Perform effects in order, send what they queued for the routers, arm the timer."""
        told = self._world.on_effect
        for effect in effects:
            told(self, effect)
            self._perform(effect)
        if self._outbox:
            for link_id, entries in self._outbox.items():
                if link_id in self._links:
                    self._links[link_id].send(1, tuple(entries))
            self._outbox = {}
        at = self.machine.next_timer()
        if at is not None and at < self._wake_up_at:
            self._arm(at)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case ToEngine():
                self.core.submit(effect.command)
                self._kick()
            case SendEntry():
                self._outbox.setdefault(effect.link_id, []).append(effect.entry)
            case SendFetch():
                self._send_fetch(effect.call_id, effect.reply)
            case OpenFetch():
                self._open_fetch(effect)
            case SendTaken():
                if (fetch := self._fetches.get(effect.taken.call_id)) is not None:
                    fetch.send(0, effect.taken)
            case CloseFetch():
                self._source_memory.pop(effect.call_id, None)
                self._fences.pop(effect.call_id, None)
                if (fetch := self._fetches.pop(effect.call_id, None)) is not None:
                    fetch.close(0)
            case StartCopy():
                self._start_copy(effect)
            case EndCall():
                if (served := self._served.pop(effect.call_id, None)) is not None:
                    served.close(1)
            case Publish():
                self._tell()
            case SendSwitchReply():
                if (switch := self._switches.pop(effect.call_id, None)) is not None:
                    switch.send(1, effect.reply)

    def _send_fetch(self, call_id: str, reply: FetchReply) -> None:
        served = self._served.get(call_id)
        if served is None:
            return
        num_bytes = 0
        if isinstance(reply, FetchAccepted) and reply.transport == "grpc":
            self._remote_calls.add(call_id)
        if isinstance(reply, Piece) and call_id in self._remote_calls:
            reply = replace(reply, payload=payload(self.memory, reply), block_ids=())
            num_bytes = len(reply.payload)
        served.send(1, reply, num_bytes)

    def _arm(self, at: float) -> None:
        self._wake_up_at = at
        self.process.at(at, self._wake_up, at)

    def _wake_up(self, at: float) -> None:
        if self._wake_up_at == at:
            self._wake_up_at = float("inf")
        due = self.machine.next_timer()
        if due is not None and due <= self._world.clock.now:
            self._do(self.machine.on_timer(self._world.clock.now))
        elif due is not None and due < self._wake_up_at:
            self._arm(due)

    # ---- the rank

    def _kick(self) -> None:
        if not self._kicked and self._step_started_at is None:
            self._kicked = True
            self.rank.at(self._world.clock.now + RING_S, self._step)

    def _step(self) -> None:
        self._kicked = False
        if self._step_started_at is None and self.core.has_work:
            self._run_step()

    def _run_step(self) -> None:
        self._step_started_at = self._world.clock.now
        if self.hung:
            return
        self.core.last_step_cost_s = 0.0
        events = self.core.step(self._announce)
        jitter = 1.0 + self.config.step_jitter * (2.0 * self._jitter.random() - 1.0)
        done_at = self._world.clock.now + self.core.last_step_cost_s * jitter + RING_S
        self.rank.at(done_at, self._landed, events)

    def _announce(self, events: StepEvents) -> None:
        self._world.clock.at(self._world.clock.now + RING_S, self.process.post, self._hear, events)

    def _hear(self, events: StepEvents) -> None:
        now = self._world.clock.now
        self._do(self.machine.on_events(now, events))
        if events.stored or events.evicted:
            self.cache_feed.on_step(events.stored, events.evicted)
        if now >= self.cache_feed.due_at:
            self._feed()

    def _landed(self, events: StepEvents | None) -> None:
        if self.hung:
            return
        self._step_started_at = None
        self.num_steps += 1
        if events is not None:
            self.process.post(self._hear, events)
        if self.core.has_work:
            self._run_step()
