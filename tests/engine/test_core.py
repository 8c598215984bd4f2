"""EngineCore: commands at step boundaries, one StepEvents per step, failures that stay with their request."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import FakeConfig, FakeModel, build_fake_engine
from engine.messages import (
    Abort,
    Add,
    Commit,
    EndServe,
    NewTokens,
    NoSpace,
    Pause,
    Paused,
    Probe,
    Probed,
    PullClosed,
    Reserve,
    Reserved,
    RoleSet,
    Serve,
    ServeBusy,
    ServeDone,
    ServedPiece,
    ServeProgress,
    Serving,
    SetRole,
    Shutdown,
    StepEvents,
)
from engine.request import FinishReason, SamplingParams

MODEL = FakeModel()
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def build(num_blocks: int = 64, **engine: int | float | str) -> EngineCore:
    options = EngineConfig(model="fake", max_model_len=512, **{"max_batched_tokens": 64, **engine})  # type: ignore[arg-type]
    return build_fake_engine(FakeConfig(engine=options, num_blocks=num_blocks))


def prompt(length: int, first: int = 3) -> list[int]:
    return [first + i % 200 for i in range(length)]


def raw(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def add(name: str, length: int, params: SamplingParams = GREEDY, outputs: tuple[int, ...] = ()) -> Add:
    return Add(request_id=name, prompt=raw(prompt(length)), params=params, seed=0, outputs=raw(list(outputs)))


def run(core: EngineCore, *commands: object) -> tuple[list[object], list[NewTokens]]:
    """Submit, step until there is no work; all replies and tokens."""
    for command in commands:
        core.submit(command)  # type: ignore[arg-type]
    replies: list[object] = []
    tokens: list[NewTokens] = []
    while core.has_work:
        events = core.step()
        assert events is not None
        replies += events.replies
        tokens += events.tokens
    return replies, tokens


def text(tokens: list[NewTokens], name: str) -> list[int]:
    return [token for message in tokens if message.request_id == name for token in message.token_ids]


def test_nothing_to_do_is_none() -> None:
    core = build()
    assert not core.has_work and core.step() is None


@pytest.mark.parametrize("steps_in_flight", [0, 1])
def test_each_step_gives_one_message_with_all_its_requests(steps_in_flight: int) -> None:
    core = build(steps_in_flight=steps_in_flight)
    for name in ("a", "b"):
        core.submit(add(name, 5))
    sizes = []
    while core.has_work:
        events = core.step()
        assert events is not None
        sizes.append(len(events.tokens))
    assert [size for size in sizes if size] == [2, 2, 2, 2]


def test_an_abort_overtakes_and_undoes_what_was_submitted_before_it() -> None:
    replies, tokens = run(build(), add("a", 5), Reserve(add=add("b", 5)), Abort(request_id="a"), Abort(request_id="b"))
    assert not replies and not tokens


def test_an_id_may_be_used_again_after_its_abort() -> None:
    _, tokens = run(build(), add("a", 5), Abort(request_id="a"), add("a", 6))
    assert text(tokens, "a") == MODEL.oracle(prompt(6), GREEDY)


def test_outputs_of_an_earlier_attempt_are_continued_and_counted() -> None:
    whole = MODEL.oracle(prompt(20), GREEDY)
    _, tokens = run(build(), add("a", 20, outputs=tuple(whole[:3])))
    assert [(message.first_position, message.token_ids) for message in tokens] == [(3, (whole[3],))]
    _, ended = run(build(), add("a", 20, outputs=tuple(whole)))
    assert [(message.finish_reason, message.token_ids) for message in ended] == [(FinishReason.LENGTH, ())]


def test_without_max_tokens_a_request_runs_to_the_end_of_the_context() -> None:
    _, tokens = run(build(), add("a", 500, SamplingParams(max_tokens=None)))
    assert len(text(tokens, "a")) == 12 and tokens[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "bad",
    [
        Add(request_id="bad", prompt=b"", params=GREEDY, seed=0),
        Add(request_id="bad", prompt=b"123", params=GREEDY, seed=0),
        Add(request_id="bad", prompt=raw([256]), params=GREEDY, seed=0),
        Add(request_id="bad", prompt=raw([-1]), params=GREEDY, seed=0),
    ],
)
def test_a_malformed_request_ends_alone(bad: Add) -> None:
    _, tokens = run(build(), add("good", 5), bad)
    assert text(tokens, "good") == MODEL.oracle(prompt(5), GREEDY)
    (end,) = [message for message in tokens if message.request_id == "bad"]
    assert (end.finish_reason, end.error) == (FinishReason.ABORT, "invalid_value")


def test_a_second_request_with_a_used_id_ends_both_once() -> None:
    _, tokens = run(build(), add("a", 5), add("a", 6))
    assert [message.finish_reason for message in tokens] == [FinishReason.ABORT]


def test_probe_says_what_is_cached_without_pinning() -> None:
    core = build()
    run(core, add("a", 40))
    replies, _ = run(core, Probe(request_id="p", tokens=raw(prompt(33))), Probe(request_id="q", tokens=raw(prompt(32))))
    assert replies == [Probed(request_id="p", num_cached_tokens=32), Probed(request_id="q", num_cached_tokens=16)]
    assert core.load().num_referenced_blocks == 0
    salted, _ = run(core, Probe(request_id="s", tokens=raw(prompt(33)), cache_salt=b"x"))
    assert salted == [Probed(request_id="s", num_cached_tokens=0)]


def pull(source: EngineCore, target: EngineCore, piece: ServedPiece, blocks: tuple[int, ...]) -> None:
    for i, block_id in enumerate(piece.block_ids):
        to = target.runner.memory.block(blocks[piece.first_block + i])  # type: ignore[attr-defined]
        to[:] = source.runner.memory.block(block_id)  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [17, 32, 33, 100])
def test_a_pulled_prompt_gives_its_first_token_in_the_very_next_step(length: int) -> None:
    source, target = build(), build()
    (reserved,), _ = run(target, Reserve(add=add("a", length)))
    assert isinstance(reserved, Reserved) and reserved.num_cached_tokens == 0
    replies, _ = run(source, Serve(call_id="c", tokens=raw(prompt(length)), start=0, end=length - 1))
    assert replies[0] == Serving(call_id="c", cached_tokens=0, end_tokens=length - 1, queued_tokens=0)
    assert replies[-1] == ServeDone(call_id="c")
    for piece in [reply for reply in replies if isinstance(reply, ServedPiece)]:
        pull(source, target, piece, reserved.block_ids)
        num_whole = piece.end_tokens // 16 - piece.first_block
        target.submit(Commit(request_id="a", first_block=piece.first_block, checksums=piece.checksums[:num_whole]))
    for i in range(3):
        target.submit(Add(request_id=f"w{i}", prompt=raw(prompt(200, 20 + i)), params=GREEDY, seed=0))
    target.submit(PullClosed(request_id="a", num_computed_tokens=length - 1))
    events = target.step()
    assert events is not None and [message.request_id for message in events.tokens] == ["a"]
    _, tokens = run(target)
    assert list(events.tokens[0].token_ids) + text(tokens, "a") == MODEL.oracle(prompt(length), GREEDY)
    source.submit(EndServe(call_id="c"))
    source.step()
    assert source.load().num_referenced_blocks == 0


@pytest.mark.parametrize("held", [0, 20, 48, 99])
def test_a_broken_pull_is_completed_by_computing(held: int) -> None:
    source, target = build(role="prefill"), build(role="prefill")
    (reserved,), _ = run(target, Reserve(add=add("a", 101)))
    assert isinstance(reserved, Reserved)
    replies, _ = run(source, Serve(call_id="c", tokens=raw(prompt(101)), start=0, end=100))
    for piece in [reply for reply in replies if isinstance(reply, ServedPiece)]:
        pull(source, target, piece, reserved.block_ids)
    target.submit(PullClosed(request_id="a", num_computed_tokens=held))
    events = target.step()
    assert events is not None and 0 < events.num_tokens <= min(101 - held, 64)
    _, tokens = run(target)
    assert list(events.tokens[0].token_ids if events.tokens else []) + text(tokens, "a") == MODEL.oracle(
        prompt(101), GREEDY
    )


def test_blocks_committed_beyond_the_valid_prefix_are_kept_in_the_cache_and_not_written_again() -> None:
    source, target = build(), build()
    (reserved,), _ = run(target, Reserve(add=add("a", 70)))
    assert isinstance(reserved, Reserved)
    replies, _ = run(source, Serve(call_id="c", tokens=raw(prompt(70)), start=0, end=64))
    for piece in [reply for reply in replies if isinstance(reply, ServedPiece)]:
        pull(source, target, piece, reserved.block_ids)
        target.submit(Commit(request_id="a", first_block=piece.first_block, checksums=piece.checksums))
    target.submit(PullClosed(request_id="a", num_computed_tokens=24))
    events = target.step()
    assert events is not None and events.num_tokens == 70 - 16, "the block that holds token 24 is shared by now"
    _, tokens = run(target)
    assert list(events.tokens[0].token_ids) + text(tokens, "a") == MODEL.oracle(prompt(70), GREEDY)


def test_an_aborted_pull_keeps_its_blocks_in_quarantine_until_it_closes() -> None:
    core = build(num_blocks=5)
    run(core, Reserve(add=add("a", 60)))
    run(core, Abort(request_id="a"))
    assert (core.load().num_quarantined_blocks, core.load().num_free_blocks) == (4, 0)
    assert run(core, Reserve(add=add("b", 10)))[0] == [NoSpace(request_id="b")]
    run(
        core, PullClosed(request_id="a", num_computed_tokens=0), PullClosed(request_id="unknown", num_computed_tokens=7)
    )
    assert (core.load().num_quarantined_blocks, core.load().num_free_blocks) == (0, 4)


def test_a_pull_that_can_never_fit_says_so() -> None:
    core = build(num_blocks=5)
    assert run(core, Reserve(add=add("a", 65)))[0] == [NoSpace(request_id="a", never=True)]
    assert run(core, Reserve(add=add("a", 511)))[0] == [NoSpace(request_id="a", never=True)]


@pytest.mark.parametrize(
    "wrong", [Commit(request_id="a", first_block=2, checksums=(1,)), PullClosed(request_id="a", num_computed_tokens=40)]
)
def test_an_impossible_message_about_a_pull_ends_that_request_only(wrong: Commit | PullClosed) -> None:
    core = build()
    run(core, Reserve(add=add("a", 40)))
    _, tokens = run(core, add("b", 5), wrong, PullClosed(request_id="a", num_computed_tokens=0))
    assert text(tokens, "b") == MODEL.oracle(prompt(5), GREEDY)
    (end,) = [message for message in tokens if message.request_id == "a"]
    assert (end.finish_reason, end.error) == (FinishReason.ABORT, "invalid_value")
    assert core.load().num_referenced_blocks == core.load().num_quarantined_blocks == 0


def test_served_calls_are_bounded_by_number_and_by_blocks() -> None:
    core = build(num_blocks=21, max_num_served=2, served_block_fraction=0.5)
    serve = [Serve(call_id=f"c{i}", tokens=raw(prompt(64, 3 + i)), start=0, end=64) for i in range(3)]
    replies, _ = run(core, *serve)
    assert ServeBusy(call_id="c2") in replies and not any(reply == ServeBusy(call_id="c1") for reply in replies)
    big = Serve(call_id="big", tokens=raw(prompt(161)), start=0, end=161)
    assert run(core, big)[0] == [ServeBusy(call_id="big", never=True)]
    run(core, EndServe(call_id="c0"))
    assert isinstance(run(core, serve[2])[0][0], Serving)


def test_a_queued_call_hears_that_it_queues_and_then_that_it_runs() -> None:
    core = build(max_batched_tokens=32)
    serve = [Serve(call_id=f"c{i}", tokens=raw(prompt(64, 3 + i)), start=0, end=64) for i in range(2)]
    replies, _ = run(core, *serve)
    news = [reply for reply in replies if isinstance(reply, Serving | ServeProgress) and reply.call_id == "c1"]
    assert [reply.queued_tokens for reply in news] == [64, 32, 0, 0]
    first_piece = next(i for i, r in enumerate(replies) if isinstance(r, ServedPiece) and r.call_id == "c1")
    assert first_piece > replies.index(news[2])


def test_cached_blocks_are_served_without_computing() -> None:
    core = build()
    run(core, add("a", 40))
    call = Serve(call_id="c", tokens=raw(prompt(40)), start=16, end=39, max_compute_tokens=0)
    replies, _ = run(core, call)
    assert replies[0] == Serving(call_id="c", cached_tokens=32, end_tokens=32, queued_tokens=0)
    assert isinstance(replies[1], ServedPiece) and (replies[1].first_block, replies[1].end_tokens) == (1, 32)
    assert replies[2:] == [ServeDone(call_id="c")]


@pytest.mark.parametrize(("start", "end"), [(8, 20), (32, 20), (0, 41), (-16, 20)])
def test_a_served_range_that_makes_no_sense_is_refused(start: int, end: int) -> None:
    replies, _ = run(build(), Serve(call_id="c", tokens=raw(prompt(40)), start=start, end=end))
    assert replies == [ServeBusy(call_id="c", never=True)]


def test_shutdown_is_reported_to_the_loop() -> None:
    core = build()
    run(core, Shutdown())
    assert core.shutdown_asked


def test_the_core_and_the_fake_load_no_torch() -> None:
    code = "import sys, engine.fake_engine; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_role_is_set_and_answered_though_there_is_nothing_to_compute() -> None:
    core = build(role="decode")
    replies, _ = run(core, SetRole(role="prefill"))
    assert replies == [RoleSet(role="prefill")] and core.scheduler.role == "prefill"


def test_a_new_role_orders_the_very_next_step() -> None:
    core = build(role="decode", max_batched_tokens=32)
    serve = Serve(call_id="c", tokens=raw(prompt(200, 9)), start=0, end=200)
    for command in (add("a", 100), serve, SetRole(role="prefill")):
        core.submit(command)
    events = core.step()
    assert events is not None and any(isinstance(reply, ServedPiece) for reply in events.replies)


@pytest.mark.parametrize("steps_in_flight", [0, 1])
@pytest.mark.parametrize("has_next", [True, False])
def test_what_is_known_before_a_step_is_told_before_it(steps_in_flight: int, has_next: bool) -> None:
    core = build(steps_in_flight=steps_in_flight, max_num_seqs=1)
    core.submit(add("a", 20, SamplingParams(temperature=0.0, max_tokens=2)))
    for _ in range(2 if steps_in_flight else 1):
        core.step()
    if has_next:
        core.submit(add("b", 20))
    core.submit(add("c", 20))
    for command in (Pause(request_id="c"), SetRole(role="prefill")):
        core.submit(command)
    if not has_next and not steps_in_flight:
        core.submit(Abort(request_id="a"))
    early: list[object] = []
    events = core.step(lambda one: early.extend(one.replies))
    assert events is not None
    answers = [Paused(request_id="c", num_held_tokens=0), RoleSet(role="prefill")]
    is_idle = not has_next and not steps_in_flight
    assert (list(events.replies) if is_idle else early) == answers


def test_paused_waits_for_the_step_in_flight_and_the_role_does_not() -> None:
    core = build(steps_in_flight=1)
    for command in (add("a", 20, SamplingParams(max_tokens=9)), add("b", 20, SamplingParams(max_tokens=9))):
        core.submit(command)
    core.step()
    early: list[StepEvents] = []
    for command in (Pause(request_id="a"), SetRole(role="prefill")):
        core.submit(command)
    events = core.step(early.append)
    assert events is not None and [reply for one in early for reply in one.replies] == [RoleSet(role="prefill")]
    assert events.replies == (Paused(request_id="a", num_held_tokens=16),)
    assert {message.request_id for message in events.tokens} == {"a", "b"}
