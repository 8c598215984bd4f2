"""A request whose prompt was pulled has blocks but no row until it runs: it keeps nobody out of the batch."""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.messages import Abort, Pause, Paused, PullClosed, Reserve, Reserved, StepEvents
from engine.request import SamplingParams
from tests.engine.scheduler.test_pauses import IN_FLIGHT, MODEL, PROMPT, add, build, ends, paused, run, text

SHORT = SamplingParams(temperature=0.0, max_tokens=8)


def pulled(core: EngineCore, name: str, prompt: list[int], params: SamplingParams = SHORT) -> list[StepEvents]:
    """Reserved, and closed without a piece: it computes its prompt itself when it runs."""
    events = run(core, Reserve(add=add(name, prompt, params)), num_steps=1)
    assert any(isinstance(reply, Reserved) for one in events for reply in one.replies), "a row is not needed for that"
    core.submit(PullClosed(request_id=name, num_computed_tokens=0))
    return events


def order(events: list[StepEvents]) -> list[str]:
    return [message.request_id for message in ends(events)]


@IN_FLIGHT
def test_prompts_are_pulled_while_the_batch_is_full_and_run_when_a_row_is_free(steps_in_flight: int) -> None:
    core = build(max_num_seqs=1, steps_in_flight=steps_in_flight)
    events = run(core, add("a", PROMPT[:20], SHORT), num_steps=2)
    for name in ("b", "c"):
        events += pulled(core, name, PROMPT[:40])
    events += run(core, num_steps=1)
    load = core.load()
    assert (load.num_running, load.num_waiting, load.num_pulling) == (1, 2, 0)
    events += run(core)
    assert order(events) == ["a", "b", "c"]
    assert text(events, "b") == text(events, "c") == MODEL.oracle(PROMPT[:40], SHORT)


def test_an_open_pull_is_counted_apart_and_wants_no_step() -> None:
    core = build(max_num_seqs=1)
    run(core, Reserve(add=add("a", PROMPT, SHORT)))
    load = core.load()
    assert (load.num_running, load.num_waiting, load.num_pulling, load.num_assigned) == (0, 0, 1, 1)
    assert not core.has_work


def test_who_waits_longer_gets_the_row_first_if_there_is_room_for_it() -> None:
    core = build(max_num_seqs=1)
    events = run(core, add("a", PROMPT[:20], SHORT), add("b", PROMPT[50:90], SHORT), num_steps=2)
    events += pulled(core, "c", PROMPT[:40])
    assert order(events + run(core)) == ["a", "b", "c"]


def test_blocks_that_landed_ones_hold_are_not_waited_for() -> None:
    core = build(num_blocks=9, max_num_seqs=1)
    events = run(core, add("a", PROMPT[:20], SHORT), num_steps=2)
    events += pulled(core, "c", PROMPT[:70])
    core.submit(add("b", PROMPT[:80], SHORT))
    events += run(core)
    assert order(events) == ["a", "c", "b"] and core.load().num_referenced_blocks == 0
    assert text(events, "b") == MODEL.oracle(PROMPT[:80], SHORT)


def test_the_newest_loses_its_blocks_first_although_it_does_not_run() -> None:
    long = SamplingParams(temperature=0.0, max_tokens=60)
    core = build(num_blocks=8, max_num_seqs=1)
    events = run(core, add("a", PROMPT[:20], long), num_steps=2)
    events += pulled(core, "b", PROMPT[20:84])
    events += run(core)
    assert order(events) == ["a", "b"] and core.load().num_preemptions == 1
    assert text(events, "a") == MODEL.oracle(PROMPT[:20], long)
    assert text(events, "b") == MODEL.oracle(PROMPT[20:84], SHORT)


def test_a_row_that_a_preemption_frees_is_taken_in_the_same_step() -> None:
    long = SamplingParams(temperature=0.0, max_tokens=60)
    core = build(num_blocks=8, max_num_seqs=1)
    run(core, Reserve(add=add("b", PROMPT[20:84], SHORT)))
    events = run(core, add("a", PROMPT[:20], long), num_steps=2)
    core.submit(PullClosed(request_id="b", num_computed_tokens=0))
    events += run(core)
    assert order(events) == ["b", "a"] and core.load().num_preemptions == 1, "otherwise nothing would ever run again"
    assert text(events, "a") == MODEL.oracle(PROMPT[:20], long)


@pytest.mark.parametrize("end", [Pause, Abort])
def test_one_that_never_ran_can_move_or_end(end: type[Pause] | type[Abort]) -> None:
    core = build(max_num_seqs=1)
    events = run(core, add("a", PROMPT[:20], SHORT), num_steps=2)
    events += pulled(core, "b", PROMPT[:40])
    events += run(core, end(request_id="b"))
    assert order(events) == ["a"] and text(events, "b") == []
    assert paused(events) == ([Paused(request_id="b", num_held_tokens=16)] if end is Pause else [])
    run(core, Abort(request_id="b"))
    assert core.load().num_referenced_blocks == 0
