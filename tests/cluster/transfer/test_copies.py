"""Copies end exactly once, also late; until then their blocks belong to nobody else (the quarantine rule)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.spec import FakeSpec
from cluster.transfer.connector import CallFence, Connector, ReceiverConnector, SourceConnector, TransferError
from cluster.transfer.copies import Copies
from cluster.transfer.grpc_connector import GrpcConnector
from cluster.transfer.local_connector import LocalConnector
from cluster.types import FetchAccepted, LocalMemory, Piece, Transport
from cluster.worker.rank import fake_config
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import build_fake_engine
from engine.kv.memory import KVMemory
from engine.messages import Abort, Add, Commit, NoSpace, PullClosed, Reserve, Reserved, Serve, ServedPiece
from engine.request import SamplingParams

FENCE = CallFence(call_id="call", source_incarnation="source")
CONFIG = fake_config(EngineConfig(model="fake"), FakeSpec(num_blocks=10, max_model_len=128))
TOKENS = np.arange(3, 103, dtype="<i4")  # 100 tokens, 7 blocks of 16


@dataclass
class Late:
    """A connector whose copies wait, in their thread, until the test lets them."""

    inner: Connector
    go: threading.Event

    def source(self) -> SourceConnector:
        return self.inner.source()

    def receiver(self, accepted: FetchAccepted, fence: CallFence) -> ReceiverConnector:
        return LateReceiver(self.inner.receiver(accepted, fence), self.go)

    def sweep(self) -> None:
        self.inner.sweep()

    def close(self) -> None:
        self.inner.close()


@dataclass
class LateReceiver:
    inner: ReceiverConnector
    go: threading.Event
    closed: bool = False

    def copy(self, piece: Piece, targets: tuple[int, ...]) -> None:
        assert self.go.wait(60)
        assert not self.closed, "closed under a running copy"
        self.inner.copy(piece, targets)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


class Engine:
    """A fake engine over shared memory, stepped by hand."""

    def __init__(self) -> None:
        self.memory = KVMemory.create(CONFIG.layout)
        self.core: EngineCore = build_fake_engine(CONFIG, memory=self.memory)

    def run(self, *commands: object) -> list[object]:
        for command in commands:
            self.core.submit(command)  # type: ignore[arg-type]
        replies: list[object] = []
        while self.core.has_work and (events := self.core.step()) is not None:
            replies += [*events.replies, *events.tokens]
        return replies


def reserve(request_id: str, seed: int = 0) -> Reserve:
    params = SamplingParams(max_tokens=4)
    return Reserve(add=Add(request_id=request_id, prompt=TOKENS.tobytes(), params=params, seed=seed))


def served_piece(source: Engine, connector: Connector) -> Piece:
    """The whole prompt's KV but for the last token, as one piece."""
    replies = source.run(Serve(call_id="call", tokens=TOKENS.tobytes(), start=0, end=99))
    served = [reply for reply in replies if isinstance(reply, ServedPiece)]
    layout = source.memory.layout
    piece = Piece(
        call_id="call",
        source_incarnation="source",
        index=0,
        first_block=0,
        end_tokens=99,
        num_layers=layout.num_layers,
        dtype=layout.dtype,
        shape=layout.shape[1:],
        checksum_algorithm="xxh3_64",
        checksums=tuple(checksum for reply in served for checksum in reply.checksums),
        block_ids=tuple(block for reply in served for block in reply.block_ids),
    )
    return connector.source().pack(piece)


def accepted(transport: Transport, memory: KVMemory) -> FetchAccepted:
    local = LocalMemory(path=memory.path, nonce=memory.nonce, num_blocks=memory.layout.num_blocks)
    return FetchAccepted(cached_tokens=0, end_tokens=99, queue_ms=0, transport=transport, local=local)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (what is awaited lies behind callbacks)
            await asyncio.sleep(0.005)


def connector_of(transport: Transport, memory: KVMemory) -> LocalConnector | GrpcConnector:
    return LocalConnector(memory) if transport == "local" else GrpcConnector(memory)


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_a_copy_that_outlives_its_abort_never_lands_in_a_reassigned_block(transport: Transport) -> None:
    async def run() -> None:
        source, target = Engine(), Engine()
        go = threading.Event()
        copied: list[tuple[int, bool]] = []
        late = Late(connector_of(transport, target.memory), go)
        copies = Copies({transport: late}, lambda copy_id, ok: copied.append((copy_id, ok)))
        copies.begin_call(accepted(transport, source.memory), FENCE)
        (reserved,) = target.run(reserve("first"))
        assert isinstance(reserved, Reserved)
        copies.start(1, served_piece(source, connector_of(transport, source.memory)), reserved.block_ids)

        # the request and its call end while the copy has not even begun to write
        target.run(Abort(request_id="first"))
        copies.end_call("call")
        assert target.core.load().num_quarantined_blocks == 7
        assert target.run(reserve("second", seed=1)) == [NoSpace(request_id="second")]
        assert copied == []

        go.set()
        await until(lambda: copied)
        assert copied == [(1, True)]
        assert target.core.load().num_quarantined_blocks == 7  # it is the pull's owner who says that it is over
        target.run(PullClosed(request_id="first", num_computed_tokens=0))
        assert target.core.load().num_quarantined_blocks == 0
        (again,) = target.run(reserve("second", seed=1))
        assert isinstance(again, Reserved)
        assert again.num_cached_tokens == 0  # what landed late was never believed
        await asyncio.sleep(0.05)
        assert copied == [(1, True)]
        copies.close()

    asyncio.run(run())


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_pulled_kv_gives_the_oracles_text(transport: Transport) -> None:
    async def run() -> None:
        source, target = Engine(), Engine()
        copied: list[tuple[int, bool]] = []
        copies = Copies(
            {transport: connector_of(transport, target.memory)}, lambda copy_id, ok: copied.append((copy_id, ok))
        )
        copies.begin_call(accepted(transport, source.memory), FENCE)
        (reserved,) = target.run(reserve("a"))
        assert isinstance(reserved, Reserved)
        piece = served_piece(source, connector_of(transport, source.memory))
        copies.start(1, piece, reserved.block_ids)
        await until(lambda: copied)
        assert copied == [(1, True)]
        commit = Commit(request_id="a", first_block=0, checksums=piece.checksums[:-1])  # never the partial one
        news = target.run(commit, PullClosed(request_id="a", num_computed_tokens=99))
        got = [token for tokens in news for token in tokens.token_ids]  # type: ignore[attr-defined]
        assert got == CONFIG.model.oracle(TOKENS.tolist(), SamplingParams(max_tokens=4), seed=0)
        copies.end_call("call")
        copies.close()

    asyncio.run(run())


def test_failures_and_unknown_calls_end_once_and_not_ok() -> None:
    async def run() -> None:
        source, target = Engine(), Engine()
        copied: list[tuple[int, bool]] = []
        copies = Copies({"grpc": GrpcConnector(target.memory)}, lambda copy_id, ok: copied.append((copy_id, ok)))
        with pytest.raises(TransferError):
            copies.begin_call(accepted("local", source.memory), FENCE)
        copies.begin_call(accepted("grpc", source.memory), FENCE)
        piece = served_piece(source, GrpcConnector(source.memory))
        copies.start(1, replace(piece, checksums=(0, *piece.checksums[1:])), (1, 2, 3, 4, 5, 6, 7))
        copies.end_call("call")
        copies.start(2, piece, (1, 2, 3, 4, 5, 6, 7))
        assert copied == []
        await until(lambda: len(copied) == 2)
        assert sorted(copied) == [(1, False), (2, False)]
        copies.close()

    asyncio.run(run())
