"""A prefill and a decode worker in one process and one thread: real engines, machines and connectors, no sockets."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from msgspec.structs import replace

from cluster.transfer.connector import CallFence, ReceiverConnector, TransferError
from cluster.transfer.grpc_connector import GrpcConnector
from cluster.transfer.local_connector import LocalConnector
from cluster.types import (
    Choice,
    Dispatch,
    Failed,
    FetchAccepted,
    LocalMemory,
    Piece,
    SourceRef,
    Tokens,
    Transport,
    WorkerInfo,
)
from cluster.worker.decode import DecodeMachine
from cluster.worker.effects import (
    CloseFetch,
    Effect,
    EndCall,
    OpenFetch,
    SendEntry,
    SendFetch,
    SendTaken,
    StartCopy,
    ToEngine,
)
from cluster.worker.prefill import PrefillMachine
from engine.config import Role
from engine.core import EngineCore
from engine.engine import BuiltEngine
from engine.kv.memory import KVMemory
from engine.request import SamplingParams


def worker_info(built: BuiltEngine, role: Role, max_num_seqs: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id=role,
        incarnation=role * 4,
        epoch=1,
        role=role,
        state="ready",
        address=role,
        identity=built.identity,
        kv_fingerprint=built.layout.fingerprint(),
        numerics_class=built.numerics_class,
        block_size=built.layout.block_size,
        max_model_len=built.max_model_len,
        max_num_seqs=max_num_seqs,
        vocab_size=built.model_config.vocab_size,
    )


class PDPair:
    """Runs requests through both workers; `tokens[request_id]` fills as they come."""

    def __init__(
        self, prefill: BuiltEngine, decode: BuiltEngine, cores: tuple[EngineCore, EngineCore], transport: Transport
    ) -> None:
        assert prefill.memory is not None and decode.memory is not None
        self.prefill_core, self.decode_core = cores
        infos = worker_info(prefill, "prefill", 32), worker_info(decode, "decode", 32)
        memory = LocalMemory(path=prefill.memory.path, nonce=prefill.memory.nonce, num_blocks=prefill.layout.num_blocks)
        self.prefill = PrefillMachine(infos[0], prefill.layout, memory, prefill.checksum_algorithm)
        self.decode = DecodeMachine(infos[1], decode.layout)
        self.source = SourceRef(worker_id="prefill", incarnation=infos[0].incarnation, address="prefill")
        make: Callable[[KVMemory], LocalConnector | GrpcConnector]
        make = LocalConnector if transport == "local" else GrpcConnector
        self._sending, self._receiving = make(prefill.memory), make(decode.memory)
        self._transport = transport
        self._receivers: dict[str, ReceiverConnector] = {}
        self._now = 0.0
        self._effects: deque[Effect] = deque()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.paths: dict[str, str] = {}
        self.failures: list[Failed] = []

    def submit(self, request_id: str, prompt: bytes, params: SamplingParams, seed: int) -> None:
        """Dispatch one request to the decode worker, with the prefill worker as its source."""
        dispatch = Dispatch(
            request_id=request_id,
            attempt=0,
            incarnation=self.decode.info.incarnation,
            epoch=1,
            prompt=prompt,
            choices=(Choice(index=0, seed=seed),),
            params=params,
            remaining_ms=3_600_000,
            sources=(self.source,),
        )
        self._do(self.decode.on_dispatch(self._now, "router", dispatch))

    def run(self) -> None:
        """Step both engines until neither has anything to do."""
        while self.prefill_core.has_work or self.decode_core.has_work:
            self._now += 0.01
            for core in (self.prefill_core, self.decode_core):
                events = core.step()
                if events is not None:
                    machine = self.prefill if core is self.prefill_core else self.decode
                    self._do(machine.on_events(self._now, events))

    def close(self) -> None:
        for connector in (self._sending, self._receiving):
            connector.close()

    def _do(self, effects: list[Effect]) -> None:
        self._effects.extend(effects)
        while self._effects:
            self._effects.extend(self._perform(self._effects.popleft()))

    def _perform(self, effect: Effect) -> list[Effect]:
        now = self._now
        match effect:
            case ToEngine(command=command):
                served = type(command).__name__ in ("Serve", "EndServe")
                (self.prefill_core if served else self.decode_core).submit(command)
            case OpenFetch(open=opened):
                return self.prefill.on_fetch(now, replace(opened, transports=(self._transport,)))
            case SendTaken(taken=taken):
                return self.prefill.on_taken(now, taken)
            case CloseFetch(call_id=call_id):
                self._receivers.pop(call_id).close()
                return self.prefill.on_call_broken(now, call_id)
            case SendFetch(call_id=call_id, reply=reply):
                if isinstance(reply, FetchAccepted):
                    fence = CallFence(call_id=call_id, source_incarnation=self.source.incarnation)
                    self._receivers[call_id] = self._receiving.receiver(reply, fence)
                if isinstance(reply, Piece):
                    reply = self._sending.source().pack(reply)
                return self.decode.on_fetch_reply(now, call_id, reply)
            case StartCopy(copy_id=copy_id, piece=piece, target_block_ids=targets):
                return self._copy(copy_id, piece, targets)
            case SendEntry(entry=Tokens() as entry):
                self.tokens[entry.request_id] += entry.token_ids
                if entry.path is not None:
                    self.paths[entry.request_id] = entry.path
            case SendEntry(entry=Failed() as failed):
                self.failures.append(failed)
            case EndCall(call_id=call_id):
                return self.decode.on_fetch_broken(now, call_id)
        return []

    def _copy(self, copy_id: int, piece: Piece, targets: tuple[int, ...]) -> list[Effect]:
        try:
            self._receivers[piece.call_id].copy(piece, targets)
        except TransferError:
            return self.decode.on_copied(self._now, copy_id, False)
        return self.decode.on_copied(self._now, copy_id, True)
