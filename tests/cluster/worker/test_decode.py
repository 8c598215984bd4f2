"""The decode machine without a pull: fences, room, tokens, ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.types import AbortRequest, Choice, Dispatch, Failed, News, PromptScores, SourceRef, Tokens, WorkerInfo
from cluster.worker.admission import decode_capacity
from cluster.worker.decode import DecodeMachine
from cluster.worker.effects import Effect, SendEntry, ToEngine
from engine.kv.layout import KVLayout
from engine.messages import Abort, Add, NewTokens, Probe, Probed, PromptLogprobs, PullClosed, Reserved, StepEvents
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs

LAYOUT = KVLayout(num_blocks=64, num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype="uint8")
INFO = WorkerInfo(
    worker_id="decode-1",
    incarnation="d" * 32,
    epoch=3,
    role="decode",
    state="ready",
    address="127.0.0.1:1",
    identity="fake",
    kv_fingerprint=LAYOUT.fingerprint(),
    max_model_len=512,
    max_num_seqs=4,
    vocab_size=256,
)
SOURCE = SourceRef(worker_id="prefill-1", incarnation="p" * 32, address="127.0.0.1:2")


def machine() -> DecodeMachine:
    return DecodeMachine(INFO, LAYOUT, "xxh3_64")


def dispatch(request_id: str = "r", num_tokens: int = 10, **changes: Any) -> Dispatch:
    made = Dispatch(
        request_id=request_id,
        attempt=1,
        incarnation=INFO.incarnation,
        epoch=INFO.epoch,
        prompt=np.arange(3, 3 + num_tokens, dtype="<i4").tobytes(),
        choices=(Choice(index=0, seed=7),),
        params=SamplingParams(max_tokens=8),
        remaining_ms=60_000,
    )
    return replace(made, **changes)


def commands(effects: list[Effect], kind: type) -> list[Any]:
    return [e.command for e in effects if isinstance(e, ToEngine) and isinstance(e.command, kind)]


def entries(effects: list[Effect], kind: type) -> list[Any]:
    return [e.entry for e in effects if isinstance(e, SendEntry) and isinstance(e.entry, kind)]


def new_tokens(request_id: str, position: int, *ids: int, **changes: Any) -> StepEvents:
    tokens = NewTokens(request_id=request_id, first_position=position, token_ids=ids, **changes)
    return StepEvents(step=1, num_tokens=1, tokens=(tokens,))


def start(m: DecodeMachine, **changes: Any) -> str:
    """Run a request without sources; returns its engine id."""
    (add,) = commands(m.on_dispatch(0.0, "link", dispatch(**changes)), Add)
    return str(add.request_id)


@pytest.mark.parametrize("changes", [{"incarnation": "x"}, {"epoch": 2}, {"epoch": 4}])
def test_another_incarnation_or_epoch_is_refused(changes: dict[str, Any]) -> None:
    m = machine()
    (failed,) = entries(m.on_dispatch(0.0, "link", dispatch(**changes)), Failed)
    assert failed.code == "refused" and m.num_live == 0


@pytest.mark.parametrize("state", ["starting", "draining", "switching", "failed"])
def test_a_worker_that_is_not_ready_refuses(state: Any) -> None:
    m = machine()
    m.info = replace(INFO, state=state)
    (failed,) = entries(m.on_dispatch(0.0, "link", dispatch()), Failed)
    assert failed.code == "refused"


def test_a_duplicate_and_an_older_attempt_are_dropped() -> None:
    m = machine()
    start(m, attempt=2)
    assert m.on_dispatch(0.1, "link", dispatch(attempt=2)) == []
    assert m.on_dispatch(0.1, "link", dispatch(attempt=1)) == []
    assert m.num_live == 1


@pytest.mark.parametrize("changes", [{"state": "draining"}, {"epoch": 4}])
def test_a_duplicate_after_a_change_of_roles_began_does_not_end_what_runs(changes: dict[str, Any]) -> None:
    m = machine()
    start(m, attempt=2)
    m.info = replace(INFO, **changes)
    assert m.on_dispatch(0.1, "link", dispatch(attempt=2)) == []
    assert m.num_live == 1


def test_a_newer_attempt_replaces_the_older_one() -> None:
    m = machine()
    old = start(m)
    effects = m.on_dispatch(0.1, "link", dispatch(attempt=2))
    assert [abort.request_id for abort in commands(effects, Abort)] == [old]
    assert commands(effects, Add)[0].request_id != old and m.num_live == 1


def test_an_abort_that_overtook_its_prompt_keeps_it_out() -> None:
    m = machine()
    assert m.on_abort(0.0, "link", AbortRequest(request_id="r", attempt=1)) == []
    assert m.on_dispatch(0.1, "link", dispatch()) == []
    assert m.on_dispatch(0.1, "link", dispatch(attempt=2)) != []


def test_an_abort_of_an_older_attempt_or_another_link_does_nothing() -> None:
    m = machine()
    start(m, attempt=2)
    assert m.on_abort(0.1, "link", AbortRequest(request_id="r", attempt=1)) == []
    assert m.on_abort(0.1, "other", AbortRequest(request_id="r", attempt=2)) == []
    assert m.num_live == 1


def test_a_worker_takes_more_than_a_batch_and_is_busy_at_once_when_that_is_full() -> None:
    m = machine()
    capacity = decode_capacity(INFO)
    assert capacity > INFO.max_num_seqs
    started = [len(commands(m.on_dispatch(0.0, "link", dispatch(f"r{i}")), Add)) for i in range(capacity)]
    assert started == [1] * capacity, "the rank decides who has a row"
    (failed,) = entries(m.on_dispatch(0.0, "link", dispatch("one-more")), Failed)
    assert failed.code == "busy"
    m.on_abort(0.1, "link", AbortRequest(request_id="r0", attempt=1))
    assert len(commands(m.on_dispatch(0.2, "link", dispatch("one-more", attempt=2)), Add)) == 1


def test_more_choices_than_rows_run_when_nothing_else_does() -> None:
    m = machine()
    choices = tuple(Choice(index=i, seed=i) for i in range(8))
    assert len(commands(m.on_dispatch(0.0, "link", dispatch(choices=choices)), Add)) == 8


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt": b""}, "invalid_value"),
        ({"prompt": b"123"}, "invalid_value"),
        ({"prompt": np.array([5, 256], dtype="<i4").tobytes()}, "invalid_value"),
        ({"prompt": np.array([5, -1], dtype="<i4").tobytes()}, "invalid_value"),
        ({"choices": ()}, "invalid_value"),
        ({"choices": (Choice(index=0, seed=1), Choice(index=0, seed=2))}, "invalid_value"),
        ({"prompt": np.full(512, 5, dtype="<i4").tobytes()}, "context_length_exceeded"),
    ],
)
def test_what_would_take_the_rank_down_is_turned_away(changes: dict[str, Any], code: str) -> None:
    m = machine()
    (failed,) = entries(m.on_dispatch(0.0, "link", dispatch(**changes)), Failed)
    assert failed.code == code and m.num_live == 0


def test_without_sources_nothing_is_probed() -> None:
    effects = machine().on_dispatch(0.0, "link", dispatch(num_tokens=200))
    assert commands(effects, Probe) == [] and len(commands(effects, Add)) == 1


def test_with_at_most_one_block_missing_no_source_is_called() -> None:
    m = machine()
    (probe,) = commands(m.on_dispatch(0.0, "link", dispatch(num_tokens=49, sources=(SOURCE,))), Probe)
    answer = Probed(request_id=probe.request_id, num_cached_tokens=32)
    effects = m.on_events(0.1, StepEvents(step=1, num_tokens=0, replies=(answer,)))
    assert [add.request_id for add in commands(effects, Add)] == [probe.request_id] and len(effects) == 1


def test_tokens_go_up_with_position_and_the_path_comes_once() -> None:
    m = machine()
    engine_id = start(m)
    (first,) = entries(m.on_events(0.1, new_tokens(engine_id, 0, 11, num_cached_tokens=5)), Tokens)
    assert (first.position, first.token_ids, first.path, first.num_cached_tokens) == (0, (11,), "decode-only", 5)
    effects = m.on_events(0.2, new_tokens(engine_id, 1, 12, finish_reason=FinishReason.STOP, stop_token=12))
    (last,) = entries(effects, Tokens)
    assert (last.position, last.path, last.finish_reason, last.stop_token) == (1, None, FinishReason.STOP, 12)
    assert m.num_live == 0 and m.next_timer() is None


def test_the_last_choice_ends_the_request() -> None:
    m = machine()
    choices = (Choice(index=0, seed=1), Choice(index=1, seed=2))
    adds = commands(m.on_dispatch(0.0, "link", dispatch(choices=choices)), Add)
    assert [(add.choice, add.seed) for add in adds] == [(0, 1), (1, 2)]
    m.on_events(0.1, new_tokens(adds[1].request_id, 0, 9, finish_reason=FinishReason.LENGTH))
    assert m.num_live == 2 and len(m.status()) == 1
    m.on_events(0.2, new_tokens(adds[0].request_id, 0, 9, finish_reason=FinishReason.LENGTH))
    assert m.num_live == 0 and m.status() == ()


def test_a_continuation_goes_to_the_rank_with_its_outputs() -> None:
    m = machine()
    outputs = np.array([50, 51], dtype="<i4").tobytes()
    (add,) = commands(m.on_dispatch(0.0, "link", dispatch(choices=(Choice(index=2, seed=4, outputs=outputs),))), Add)
    assert (add.outputs, add.choice, add.seed) == (outputs, 2, 4)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"error": "kv_capacity_exceeded"}, "kv_capacity_exceeded"),
        ({"error": "strange"}, "internal_error"),
        ({"finish_reason": FinishReason.ABORT}, "internal_error"),
    ],
)
def test_an_error_of_the_engine_ends_every_choice(changes: dict[str, Any], code: str) -> None:
    m = machine()
    choices = (Choice(index=0, seed=1), Choice(index=1, seed=2))
    adds = commands(m.on_dispatch(0.0, "link", dispatch(choices=choices)), Add)
    effects = m.on_events(0.1, new_tokens(adds[0].request_id, 0, **changes))
    assert entries(effects, Failed)[0].code == code
    assert adds[1].request_id in {abort.request_id for abort in commands(effects, Abort)} and m.num_live == 0


def test_tokens_of_a_request_that_is_gone_are_aborted_again() -> None:
    m = machine()
    engine_id = start(m)
    m.on_link_broken(0.1, "link")
    effects = m.on_events(0.2, new_tokens(engine_id, 0, 11))
    assert [abort.request_id for abort in commands(effects, Abort)] == [engine_id] and entries(effects, Tokens) == []
    assert m.on_events(0.3, new_tokens(engine_id, 1, 12, finish_reason=FinishReason.LENGTH)) == []


def test_a_reservation_that_comes_after_the_abort_is_closed() -> None:
    m = machine()
    late = Reserved(request_id="d:gone:1:1:0", block_ids=(1, 2), num_cached_tokens=0)
    effects = m.on_events(0.0, StepEvents(step=1, num_tokens=0, replies=(late,)))
    assert [type(e.command) for e in effects if isinstance(e, ToEngine)] == [Abort, PullClosed]


def test_events_of_others_are_left_alone() -> None:
    m = machine()
    other = Reserved(request_id="canary", block_ids=(1, 2), num_cached_tokens=0)
    assert m.on_events(0.0, StepEvents(step=1, num_tokens=0, replies=(other,))) == []
    assert m.on_events(0.0, new_tokens("canary", 0, 1)) == []


def test_a_broken_link_drops_its_requests_only() -> None:
    m = machine()
    mine = start(m, request_id="mine")
    (other,) = commands(m.on_dispatch(0.0, "other", dispatch("other")), Add)
    effects = m.on_link_broken(0.1, "link")
    assert [abort.request_id for abort in commands(effects, Abort)] == [mine] and entries(effects, Failed) == []
    assert [status.request_id for status in m.status()] == ["other"] and other.request_id != mine


def test_the_deadline_ends_a_request() -> None:
    m = machine()
    engine_id = start(m, remaining_ms=1000)
    assert m.on_timer(0.9) != [] and m.num_live == 1  # news
    effects = m.on_timer(1.0)
    assert [abort.request_id for abort in commands(effects, Abort)] == [engine_id]
    assert entries(effects, Failed)[0].code == "deadline_exceeded" and m.num_live == 0


def test_news_come_every_half_second_until_the_first_token() -> None:
    m = machine()
    engine_id = start(m)
    times = []
    for _ in range(4):
        at = m.next_timer()
        assert at is not None
        times += [at] * len(entries(m.on_timer(at), News))
    assert times == [0.5, 1.0, 1.5, 2.0]
    m.on_events(2.1, new_tokens(engine_id, 0, 11))
    assert m.next_timer() == 60.0


def test_prompt_logprobs_come_up_first_and_only_the_first_choice_asks_the_rank_for_them() -> None:
    decode = machine()
    asked = dispatch(
        choices=tuple(Choice(index=i, seed=i) for i in range(3)),
        params=SamplingParams(max_tokens=8, prompt_logprobs=1),
        priority=-4,
    )
    (first,) = commands(decode.on_dispatch(0.0, "l", asked), Add)
    assert (first.params.prompt_logprobs, first.priority) == (1, -4)
    one = TokenLogprobs(logprob=-1.0, top_ids=(5,), top_logprobs=(-1.0,))
    news = PromptLogprobs(request_id=first.request_id, first_position=1, logprobs=(one,) * 9)
    (scores,) = entries(decode.on_events(0.1, StepEvents(step=1, num_tokens=10, replies=(news,))), PromptScores)
    assert (scores.request_id, scores.attempt, scores.first_position) == ("r", 1, 1) and scores.logprobs == (one,) * 9
    tokens = NewTokens(request_id=first.request_id, first_position=0, token_ids=(7,))
    effects = decode.on_events(0.2, StepEvents(step=2, num_tokens=1, tokens=(tokens,)))
    others = commands(effects, Add)
    assert [add.choice for add in others] == [1, 2]
    assert {add.params.prompt_logprobs for add in others} == {None}
    assert isinstance(effects[0], SendEntry), "the first choice's token goes up before the others begin"
    aborted = decode.on_abort(0.3, "l", AbortRequest(request_id="r", attempt=1))
    assert len(commands(aborted, Abort)) == 3
    assert decode.on_events(0.4, StepEvents(step=3, num_tokens=1, replies=(news,))) == []
