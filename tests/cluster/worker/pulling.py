"""A request that pulls at a decode machine, and shorthands for what the world says to it."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from cluster.types import (
    Choice,
    Dispatch,
    FetchAccepted,
    FetchOpen,
    FetchReply,
    Piece,
    SourceRef,
    WorkerInfo,
)
from cluster.worker.decode import DecodeMachine
from cluster.worker.effects import Effect, OpenFetch, SendEntry, ToEngine
from engine.kv.layout import KVLayout
from engine.messages import (
    Load,
    Probe,
    Probed,
    Reserved,
    StepEvents,
)
from engine.request import SamplingParams

LAYOUT = KVLayout(num_blocks=64, num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype="uint8")
INFO = WorkerInfo(
    worker_id="decode-1",
    incarnation="d" * 32,
    epoch=1,
    role="decode",
    state="ready",
    address="a:1",
    identity="fake",
    kv_fingerprint=LAYOUT.fingerprint(),
    max_model_len=512,
    max_num_seqs=8,
)
NUM_TOKENS = 105  # n - 1 = 104: six whole blocks and half of the seventh
TABLE = tuple(range(10, 17))


def source(name: str = "p1") -> SourceRef:
    return SourceRef(worker_id=name, incarnation=name * 16, address=f"{name}:1")


class Pulling:
    """One request "r" at a machine, with shorthands for what the world says to it."""

    def __init__(self, *sources: str, cached: int = 0, choices: int = 1, holder: str = "") -> None:
        self.machine = DecodeMachine(INFO, LAYOUT, "xxh3_64")
        self.effects: list[Effect] = []
        self.sources = sources or ("p1",)
        self.choices = choices
        self.holder = holder  # a source that computes nothing
        self.dispatch()
        self.engine_id = self.last(Probe).request_id
        self.engine(Probed(request_id=self.engine_id, num_cached_tokens=cached))

    def dispatch(self, request_id: str = "r", now: float = 0.0) -> None:
        made = Dispatch(
            request_id=request_id,
            attempt=1,
            incarnation=INFO.incarnation,
            epoch=1,
            prompt=bytes([5, 0, 0, 0]) * NUM_TOKENS,
            choices=tuple(Choice(index=i, seed=i) for i in range(self.choices)),
            params=SamplingParams(max_tokens=8),
            remaining_ms=60_000,
            sources=tuple(
                replace(source(name), max_compute_tokens=0 if name == self.holder else -1) for name in self.sources
            ),
        )
        self.effects = self.machine.on_dispatch(now, "link", made)

    def engine(self, *replies: Any, now: float = 0.0, free: int = 0) -> None:
        load = Load(num_free_blocks=free)
        self.effects = self.machine.on_events(now, StepEvents(step=1, num_tokens=0, replies=replies, load=load))

    def says(self, reply: FetchReply, now: float = 0.0) -> None:
        self.effects = self.machine.on_fetch_reply(now, self.call.call_id, reply)

    def accepts(self, **changes: Any) -> None:
        reply = FetchAccepted(cached_tokens=0, end_tokens=104, queue_ms=0, transport="grpc")
        self.says(replace(reply, **changes))

    def reserved(self, cached: int = 0) -> None:
        self.engine(Reserved(request_id=self.engine_id, block_ids=TABLE, num_cached_tokens=cached))

    def piece(self, index: int, first_block: int, end_tokens: int, **changes: Any) -> Piece:
        num_blocks = LAYOUT.blocks_for(end_tokens) - first_block
        made = Piece(
            call_id=self.call.call_id,
            source_incarnation=self.call.source_incarnation,
            index=index,
            first_block=first_block,
            end_tokens=end_tokens,
            num_layers=1,
            dtype="uint8",
            shape=LAYOUT.shape[1:],
            checksum_algorithm="xxh3_64",
            checksums=tuple(100 + first_block + i for i in range(num_blocks)),
        )
        return replace(made, **changes)

    def copied(self, copy_id: int, ok: bool = True, now: float = 0.0) -> None:
        self.effects = self.machine.on_copied(now, copy_id, ok)

    @property
    def call(self) -> FetchOpen:
        opened = self.of(OpenFetch)
        if opened:
            self._call = opened[-1].open
        return self._call  # type: ignore[no-any-return]

    def of(self, kind: type) -> list[Any]:
        """Effects, commands or entries of a kind among the last ones."""
        found = []
        for effect in self.effects:
            inner: object = effect.command if isinstance(effect, ToEngine) else effect
            inner = inner.entry if isinstance(inner, SendEntry) else inner
            if isinstance(inner, kind):
                found.append(inner)
        return found

    def last(self, kind: type) -> Any:
        return self.of(kind)[-1]

    def to_copying(self, *names: str) -> Pulling:
        """Two pieces under way: blocks 0-2 (copy 1) and 3-6 (copy 2)."""
        assert self.call
        self.accepts()
        self.reserved()
        self.says(self.piece(0, 0, 48))
        self.says(self.piece(1, 3, 104))
        return self
