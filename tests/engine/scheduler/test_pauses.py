"""A paused request: what is in flight still counts, what a peer can read stays pinned, nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import FakeConfig, FakeModel, build_fake_engine
from engine.messages import (
    Abort,
    Add,
    Command,
    EndServe,
    NewTokens,
    Pause,
    Paused,
    PullClosed,
    Reserve,
    Serve,
    ServedPiece,
    Serving,
    SetRole,
    StepEvents,
)
from engine.request import SamplingParams

MODEL = FakeModel()
BLOCK = 16
PROMPT = [3 + i % 200 for i in range(100)]
LONG = SamplingParams(temperature=0.0, max_tokens=60)
IN_FLIGHT = pytest.mark.parametrize("steps_in_flight", [0, 1])


def build(num_blocks: int = 64, **engine: int | float | str | bool) -> EngineCore:
    options = EngineConfig(model="fake", max_model_len=512, **{"max_batched_tokens": 64, **engine})  # type: ignore[arg-type]
    return build_fake_engine(FakeConfig(engine=options, num_blocks=num_blocks))


def raw(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def add(name: str, prompt: list[int], params: SamplingParams = LONG, outputs: list[int] | None = None) -> Add:
    return Add(request_id=name, prompt=raw(prompt), params=params, seed=0, outputs=raw(outputs or []))


def run(core: EngineCore, *commands: Command, num_steps: int = 1000) -> list[StepEvents]:
    for command in commands:
        core.submit(command)
    events = []
    while core.has_work and len(events) < num_steps:
        one = core.step()
        assert one is not None
        events.append(one)
    return events


def text(events: list[StepEvents], name: str) -> list[int]:
    return [
        token for one in events for message in one.tokens if message.request_id == name for token in message.token_ids
    ]


def ends(events: list[StepEvents]) -> list[NewTokens]:
    return [message for one in events for message in one.tokens if message.finish_reason is not None]


def paused(events: list[StepEvents]) -> list[Paused]:
    return [reply for one in events for reply in one.replies if isinstance(reply, Paused)]


@IN_FLIGHT
@pytest.mark.parametrize("num_steps", [1, 3, 16, 25])
def test_a_peer_is_served_every_whole_block_of_a_paused_request_without_computing(
    steps_in_flight: int, num_steps: int
) -> None:
    core = build(steps_in_flight=steps_in_flight)
    got = text(run(core, add("a", PROMPT), num_steps=num_steps), "a")
    events = run(core, Pause(request_id="a"))
    got += text(events, "a")
    (told,) = paused(events)
    assert got == MODEL.oracle(PROMPT, LONG)[: len(got)]
    known = PROMPT + got
    if got:
        assert told.num_held_tokens == (len(known) - 1) // BLOCK * BLOCK
    call = Serve(call_id="c", tokens=raw(known), start=0, end=len(known) - 1, max_compute_tokens=0)
    replies = [reply for one in run(core, call) for reply in one.replies]
    assert replies[0] == Serving(
        call_id="c", cached_tokens=told.num_held_tokens, end_tokens=told.num_held_tokens, queued_tokens=0
    )
    assert [reply.end_tokens for reply in replies if isinstance(reply, ServedPiece)] == [told.num_held_tokens]
    run(core, EndServe(call_id="c"), Abort(request_id="a"))
    assert core.load().num_referenced_blocks == 0


@IN_FLIGHT
def test_what_is_in_flight_lands_and_its_token_comes_no_later_than_paused(steps_in_flight: int) -> None:
    core = build(steps_in_flight=steps_in_flight)
    run(core, add("a", PROMPT[:20]), add("b", PROMPT[50:70]), num_steps=5)
    num_before = core.load().generation_tokens
    events = run(core, Pause(request_id="a"), num_steps=2)
    at = next(i for i, one in enumerate(events) if paused([one]))
    assert len(text(events[: at + 1], "a")) == steps_in_flight == len(text(events, "a"))
    assert core.load().generation_tokens == num_before + 2 + steps_in_flight
    assert (core.load().num_running, core.load().num_paused) == (1, 1)
    assert text(run(core), "a") == []


@IN_FLIGHT
def test_a_request_that_ends_in_the_step_in_flight_is_not_paused(steps_in_flight: int) -> None:
    core = build(steps_in_flight=steps_in_flight)
    short = SamplingParams(temperature=0.0, max_tokens=3)
    run(core, add("a", PROMPT[:20], short), num_steps=3)
    events = run(core, Pause(request_id="a"))
    assert len(ends(events)) == steps_in_flight and not paused(events)
    assert (core.load().num_paused, core.load().num_referenced_blocks) == (0, 0)


def test_a_waiting_request_holds_nothing_and_is_never_admitted() -> None:
    core = build(max_num_seqs=1)
    events = run(core, add("a", PROMPT[:20]), add("b", PROMPT), Pause(request_id="b"))
    assert paused(events) == [Paused(request_id="b", num_held_tokens=0)]
    assert len(text(events, "a")) == 60 and text(events, "b") == []
    assert (core.load().num_waiting, core.load().num_paused) == (0, 1)
    run(core, Abort(request_id="b"))
    assert core.load().num_paused == 0


def test_a_preempted_request_holds_nothing() -> None:
    core = build(num_blocks=11)
    events = run(core, add("a", PROMPT[:60]), add("b", PROMPT[30:90]), num_steps=30)
    assert core.load().num_preemptions and core.load().num_waiting
    events += run(core, Pause(request_id="b"))
    assert paused(events) == [Paused(request_id="b", num_held_tokens=0)]
    assert text(events, "a") == MODEL.oracle(PROMPT[:60], LONG)
    assert core.load().num_referenced_blocks == 0


def test_paused_requests_want_no_step_and_give_up_their_rows() -> None:
    core = build(max_num_seqs=1)
    run(core, add("a", PROMPT[:40]), num_steps=2)
    run(core, Pause(request_id="a"))
    assert not core.has_work and not core.scheduler.has_unfinished
    assert core.load().num_referenced_blocks == 2, "the partial last block is nobody's any more"
    assert text(run(core, add("b", PROMPT[:20])), "b") == MODEL.oracle(PROMPT[:20], LONG)


def test_the_pinned_blocks_are_neither_evicted_nor_preempted() -> None:
    core = build(num_blocks=14)
    run(core, add("a", PROMPT[:64]), num_steps=3)
    (told,) = paused(run(core, Pause(request_id="a")))
    events = run(core, *(add(f"b{i}", PROMPT[5 * i : 5 * i + 30]) for i in range(8)))
    assert len(ends(events)) == 8 and core.load().num_preemptions > 0
    call = Serve(call_id="c", tokens=raw(PROMPT[:64]), start=0, end=64, max_compute_tokens=0)
    assert run(core, call)[0].replies[0] == Serving(call_id="c", cached_tokens=64, end_tokens=64, queued_tokens=0)
    assert told.num_held_tokens == 64 and core.load().num_paused == 1


@IN_FLIGHT
@pytest.mark.parametrize("at_once", [True, False])
def test_an_abort_frees_a_paused_request_exactly_once(steps_in_flight: int, at_once: bool) -> None:
    core = build(steps_in_flight=steps_in_flight)
    run(core, add("a", PROMPT), add("b", PROMPT[9:]), num_steps=7)
    core.submit(Pause(request_id="a"))
    if not at_once:
        core.step()
    run(core, Abort(request_id="a"), Abort(request_id="a"), Abort(request_id="b"))
    load = core.load()
    assert (load.num_paused, load.num_referenced_blocks, load.num_free_blocks) == (0, 0, load.num_blocks)


@IN_FLIGHT
def test_an_abort_with_the_step_still_in_flight_leaves_its_blocks_until_it_lands(steps_in_flight: int) -> None:
    core = build(steps_in_flight=steps_in_flight)
    run(core, add("a", PROMPT), num_steps=4)
    core.scheduler.pause(Pause(request_id="a"))
    core.scheduler.abort(Abort(request_id="a"))
    assert (core.load().num_referenced_blocks > 0) == bool(steps_in_flight)
    events = run(core)
    assert not paused(events) and not any(one.tokens for one in events)
    assert core.load().num_referenced_blocks == 0


@IN_FLIGHT
def test_a_request_goes_on_as_another_attempt_with_the_undisturbed_text(steps_in_flight: int) -> None:
    core = build(steps_in_flight=steps_in_flight)
    penal = SamplingParams(temperature=0.9, max_tokens=40, presence_penalty=0.5)
    got = text(run(core, add("a", PROMPT, penal), num_steps=9), "a")
    got += text(run(core, Pause(request_id="a")), "a")
    events = run(core, add("a2", PROMPT, penal, got), num_steps=1)
    num_cached = core.load().prefix_cache_hits
    got += text(events + run(core), "a2")
    assert got == MODEL.oracle(PROMPT, penal) and num_cached >= 96


def test_pauses_that_mean_nothing_are_ignored() -> None:
    core = build()
    run(core, Reserve(add=add("pull", PROMPT)))
    assert not paused(run(core, Pause(request_id="unknown"), Pause(request_id="pull")))
    events = run(core, PullClosed(request_id="pull", num_computed_tokens=0), num_steps=3)
    events += run(core, Pause(request_id="pull"), Pause(request_id="pull"))
    events += run(core, Pause(request_id="pull"))
    assert len(paused(events)) == 1
    assert text(events, "pull") == MODEL.oracle(PROMPT, LONG)[:2]


def test_without_a_prefix_cache_nothing_is_held() -> None:
    core = build(enable_prefix_caching=False)
    run(core, add("a", PROMPT), num_steps=4)
    assert paused(run(core, Pause(request_id="a"))) == [Paused(request_id="a", num_held_tokens=0)]
    assert core.load().num_referenced_blocks == 0


def test_of_two_equal_requests_each_pins_the_cached_blocks() -> None:
    core = build(max_batched_tokens=256)
    run(core, add("a", PROMPT), add("b", PROMPT), num_steps=3)
    events = run(core, Pause(request_id="a"), Pause(request_id="b"))
    assert [told.num_held_tokens for told in paused(events)] == [96, 96]
    assert core.load().num_referenced_blocks == 6
    run(core, Abort(request_id="a"))
    assert core.load().num_referenced_blocks == 6
    run(core, Abort(request_id="b"), SetRole(role="prefill"))
    assert core.load().num_referenced_blocks == 0
