"""The prefill machine: who may have which KV, pieces and news out, and exactly one EndServe for every Serve."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.types import (
    FetchAccepted,
    FetchBusy,
    FetchNews,
    FetchOfferedAll,
    FetchOpen,
    FetchRefused,
    FetchTaken,
    LocalMemory,
    Piece,
    WorkerInfo,
)
from cluster.worker import prefill
from cluster.worker.effects import Effect, EndCall, SendFetch, ToEngine
from cluster.worker.prefill import PrefillMachine
from engine.kv.layout import KVLayout
from engine.messages import EndServe, Load, Serve, ServeBusy, ServeDone, ServedPiece, ServeProgress, Serving, StepEvents

LAYOUT = KVLayout(num_blocks=64, num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype="uint8")
MEMORY = LocalMemory(path="/proc/1/fd/3", nonce=b"nonce", num_blocks=64)
INFO = WorkerInfo(
    worker_id="prefill-1",
    incarnation="p" * 32,
    epoch=1,
    role="prefill",
    state="ready",
    address="a:1",
    identity="fake",
    kv_fingerprint=LAYOUT.fingerprint(),
    max_model_len=512,
    vocab_size=256,
)
OPEN = FetchOpen(
    call_id="call",
    request_id="r",
    attempt=1,
    source_incarnation=INFO.incarnation,
    receiver_id="decode-1",
    receiver_incarnation="d" * 32,
    identity="fake",
    kv_fingerprint=LAYOUT.fingerprint(),
    tokens=bytes([5, 0, 0, 0]) * 105,
    start=0,
    end=104,
    max_compute_tokens=-1,
    remaining_ms=60_000,
)
SERVING = Serving(call_id="call", cached_tokens=0, end_tokens=104, queued_tokens=0)


def machine(memory: LocalMemory | None = MEMORY, **options: Any) -> PrefillMachine:
    return PrefillMachine(INFO, LAYOUT, memory, "xxh3_64", **options)


def events(*replies: Any, num_tokens: int = 0) -> StepEvents:
    return StepEvents(step=1, num_tokens=num_tokens, replies=replies, load=Load(num_served=1))


def replies(effects: list[Effect], kind: type) -> list[Any]:
    return [e.reply for e in effects if isinstance(e, SendFetch) and isinstance(e.reply, kind)]


def commands(effects: list[Effect]) -> list[type]:
    return [type(e.command) for e in effects if isinstance(e, ToEngine)]


def served(first_block: int, end_tokens: int, call_id: str = "call") -> ServedPiece:
    num_blocks = LAYOUT.blocks_for(end_tokens) - first_block
    return ServedPiece(
        call_id=call_id,
        first_block=first_block,
        block_ids=tuple(range(20 + first_block, 20 + first_block + num_blocks)),
        checksums=tuple(range(first_block, first_block + num_blocks)),
        end_tokens=end_tokens,
    )


def accepted_machine(**options: Any) -> PrefillMachine:
    m = machine(**options)
    m.on_fetch(0.0, OPEN)
    m.on_events(0.0, events(SERVING))
    return m


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "incarnation": ({"source_incarnation": "x"}, "incarnation"),
    "identity": ({"identity": "x"}, "identity"),
    "layout": ({"kv_fingerprint": "x"}, "kv_layout"),
    "unaligned": ({"start": 8}, "range"),
    "empty": ({"start": 112, "end": 104}, "range"),
    "past the tokens": ({"end": 106}, "range"),
    "malformed": ({"tokens": b"123"}, "range"),
    "past the context": ({"tokens": bytes(4) * 600, "end": 600}, "range"),
    "a token id": ({"tokens": bytes([5, 1, 0, 0]) * 105}, "tokens"),
    "transport": ({"transports": ()}, "transport"),
    "deadline": ({"remaining_ms": 0}, "deadline"),
}


@pytest.mark.parametrize(("changes", "code"), BAD.values(), ids=BAD.keys())
def test_what_makes_no_sense_is_refused_with_words(changes: dict[str, Any], code: str) -> None:
    m = machine()
    effects = m.on_fetch(0.0, replace(OPEN, **changes))
    (refused,) = replies(effects, FetchRefused)
    assert refused.code == code and refused.message
    assert isinstance(effects[-1], EndCall) and commands(effects) == [] and m.num_calls == 0


@pytest.mark.parametrize(("state", "serves"), [("ready", True), ("draining", True), ("starting", False)])
def test_a_worker_that_holds_kv_serves_it_also_while_it_drains(state: Any, serves: bool) -> None:
    m = machine()
    m.info = replace(INFO, state=state)
    assert (commands(m.on_fetch(0.0, OPEN)) == [Serve]) is serves


@pytest.mark.parametrize(
    ("memory", "asked", "agreed"),
    [
        (MEMORY, ("local", "grpc"), "local"),
        (MEMORY, ("grpc",), "grpc"),
        (MEMORY, ("grpc", "local"), "grpc"),
        (None, ("local", "grpc"), "grpc"),
    ],
)
def test_the_receivers_first_transport_that_we_speak_is_taken(memory: Any, asked: Any, agreed: str) -> None:
    m = machine(memory)
    m.on_fetch(0.0, replace(OPEN, transports=asked))
    (accepted,) = replies(m.on_events(0.1, events(SERVING)), FetchAccepted)
    assert accepted.transport == agreed and accepted.local == (MEMORY if agreed == "local" else None)


def test_the_acceptance_says_what_is_cached_and_how_long_it_waits() -> None:
    m = machine()
    m.on_fetch(0.0, OPEN)
    m.on_events(0.1, events(num_tokens=100))
    m.on_events(0.2, events(num_tokens=100))  # 1 ms per token
    queued = replace_serving(cached_tokens=32, queued_tokens=500)
    (accepted,) = replies(m.on_events(0.2, events(queued)), FetchAccepted)
    assert (accepted.cached_tokens, accepted.end_tokens, accepted.queue_ms) == (32, 104, 500)


def test_time_without_work_does_not_count_as_a_step() -> None:
    m = machine()
    m.on_fetch(0.0, OPEN)
    m.on_events(0.1, events(num_tokens=100))
    m.on_events(0.2, events(num_tokens=100))  # 1 ms per token
    m.on_events(0.3, StepEvents(step=3, num_tokens=100, load=Load()))  # the last work there was
    m.on_events(60.0, events(num_tokens=1))
    (accepted,) = replies(
        m.on_events(60.0, events(replace_serving(cached_tokens=32, queued_tokens=500))), FetchAccepted
    )
    assert accepted.queue_ms == 500


def replace_serving(*, cached_tokens: int, queued_tokens: int) -> Serving:
    return Serving(call_id="call", cached_tokens=cached_tokens, end_tokens=104, queued_tokens=queued_tokens)


@pytest.mark.parametrize(("never", "kind"), [(False, FetchBusy), (True, FetchRefused)])
def test_a_rank_without_room_turns_the_call_away(never: bool, kind: type) -> None:
    m = machine()
    m.on_fetch(0.0, OPEN)
    effects = m.on_events(0.1, events(ServeBusy(call_id="call", never=never)))
    assert replies(effects, kind) and isinstance(effects[-1], EndCall)
    assert m.num_calls == 0 and m.on_call_broken(0.2, "call") == []


def test_a_receiver_over_its_quota_is_busy_and_others_are_not() -> None:
    m = machine(max_peer_bytes=10 * LAYOUT.block_bytes)
    assert commands(m.on_fetch(0.0, OPEN)) == [Serve]
    assert replies(m.on_fetch(0.0, replace(OPEN, call_id="second")), FetchBusy)
    assert commands(m.on_fetch(0.0, replace(OPEN, call_id="third", receiver_id="decode-2"))) == [Serve]
    m.on_call_broken(0.1, "call")
    assert commands(m.on_fetch(0.2, replace(OPEN, call_id="fourth"))) == [Serve]


def test_one_call_larger_than_the_quota_is_still_served() -> None:
    assert commands(machine(max_peer_bytes=1).on_fetch(0.0, OPEN)) == [Serve]


def test_pieces_carry_their_fences() -> None:
    m = accepted_machine()
    effects = m.on_events(0.1, events(served(0, 48))) + m.on_events(0.2, events(served(3, 104)))
    first, second = replies(effects, Piece)
    assert (first.call_id, first.source_incarnation, first.index) == ("call", INFO.incarnation, 0)
    assert (first.first_block, first.end_tokens, first.checksums, first.block_ids) == (0, 48, (0, 1, 2), (20, 21, 22))
    assert (second.index, second.first_block, second.end_tokens, len(second.checksums)) == (1, 3, 104, 4)
    assert (first.shape, first.dtype, first.checksum_algorithm) == (LAYOUT.shape[1:], "uint8", "xxh3_64")


def test_big_pieces_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PIECE_BYTES", 3 * LAYOUT.block_bytes)
    m = accepted_machine()
    pieces = replies(m.on_events(0.1, events(served(0, 104))), Piece)
    assert [(p.index, p.first_block, p.end_tokens, p.checksums) for p in pieces] == [
        (0, 0, 48, (0, 1, 2)),
        (1, 3, 96, (3, 4, 5)),
        (2, 6, 104, (6,)),
    ]


def test_a_full_window_waits_for_taken_and_all_is_offered_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PIECE_BYTES", 2 * LAYOUT.block_bytes)
    monkeypatch.setattr(prefill, "WINDOW_BYTES", 4 * LAYOUT.block_bytes)
    m = accepted_machine()
    effects = m.on_events(0.1, events(served(0, 104), ServeDone(call_id="call")))
    assert [piece.index for piece in replies(effects, Piece)] == [0, 1] and not replies(effects, FetchOfferedAll)
    effects = m.on_taken(0.2, FetchTaken(call_id="call", piece_index=0))
    assert [piece.index for piece in replies(effects, Piece)] == [2]
    effects = m.on_taken(0.3, FetchTaken(call_id="call", piece_index=2))
    assert [piece.index for piece in replies(effects, Piece)] == [3]
    assert isinstance(effects[-1], SendFetch) and isinstance(effects[-1].reply, FetchOfferedAll)


def run_timers(m: PrefillMachine, until: float, *, stepping: bool = True) -> list[tuple[float, Effect]]:
    """Let time pass; the rank steps meanwhile unless it hangs."""
    found: list[tuple[float, Effect]] = []
    while (at := m.next_timer()) is not None and at <= until:
        found += [(at, effect) for effect in m.on_timer(at)]
        if stepping:
            found += [(at, effect) for effect in m.on_events(at, events())]
    return found


def test_news_come_every_half_second_also_before_the_acceptance_and_at_the_start() -> None:
    m = machine()
    m.on_fetch(0.0, OPEN)
    assert [at for at, effect in run_timers(m, 1.0) if isinstance(effect, SendFetch)] == [0.5, 1.0]
    m.on_events(1.1, events(replace_serving(cached_tokens=0, queued_tokens=80)))
    progress = ServeProgress(call_id="call", computed_tokens=0, queued_tokens=40)
    assert m.on_events(1.2, events(progress)) == [], "no more often than needed"
    progress = ServeProgress(call_id="call", computed_tokens=0, queued_tokens=0)
    assert replies(m.on_events(1.3, events(progress)), FetchNews) == [FetchNews(computed_tokens=0, queue_ms=0)]
    assert [at for at, effect in run_timers(m, 2.4) if isinstance(effect, SendFetch)] == [1.8, 2.3]


def test_a_receiver_that_takes_nothing_is_cut_off() -> None:
    m = accepted_machine()
    m.on_events(1.0, events(served(0, 48)))
    ends = [(at, e) for at, e in run_timers(m, 30.0) if isinstance(e, ToEngine | EndCall)]
    assert [at for at, _ in ends] == [11.0, 11.0] and isinstance(ends[1][1], EndCall)
    assert m.num_calls == 0 and m.counters["cut_off_taken"] == 1


def test_a_receiver_that_takes_keeps_its_call_and_one_that_never_closes_does_not() -> None:
    m = accepted_machine()
    m.on_events(1.0, events(served(0, 104), ServeDone(call_id="call")))
    run_timers(m, 8.0)
    m.on_taken(8.0, FetchTaken(call_id="call", piece_index=0))
    run_timers(m, 17.0)
    assert m.num_calls == 1
    run_timers(m, 18.5)
    assert m.num_calls == 0


def test_the_deadline_ends_a_call() -> None:
    m = machine()
    m.on_fetch(0.0, replace(OPEN, remaining_ms=1500))
    ends = [(at, e) for at, e in run_timers(m, 5.0) if isinstance(e, ToEngine | EndCall)]
    assert [at for at, _ in ends] == [1.5, 1.5] and m.num_calls == 0


def test_a_rank_that_hangs_costs_its_calls() -> None:
    m = accepted_machine()
    run_timers(m, 20.0, stepping=False)
    assert m.num_calls == 0 and m.counters["cut_off_engine"] == 1


def test_a_call_ends_exactly_once_whatever_ends_it() -> None:
    m = accepted_machine()
    assert commands(m.on_call_broken(0.1, "call")) == [EndServe]
    assert m.on_call_broken(0.2, "call") == [] and run_timers(m, 100.0) == []
    assert m.on_events(0.3, events(served(0, 48), ServeDone(call_id="call"))) == []
    assert m.on_taken(0.4, FetchTaken(call_id="call", piece_index=0)) == []


def test_a_call_that_breaks_before_the_rank_answered_is_ended_too() -> None:
    m = machine()
    m.on_fetch(0.0, OPEN)
    assert commands(m.on_call_broken(0.1, "call")) == [EndServe]
    assert m.on_events(0.2, events(SERVING)) == []


def test_a_duplicate_call_id_is_ignored() -> None:
    m = accepted_machine()
    assert m.on_fetch(0.1, OPEN) == [] and m.num_calls == 1
