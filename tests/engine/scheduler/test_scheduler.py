"""What the scheduler puts into a step, and when rows and blocks come back."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import EngineConfig, Role
from engine.core import EngineCore
from engine.fake_engine import FakeConfig, build_fake_engine
from engine.messages import Abort, Add, NewTokens, Serve
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import ScheduledBatch, StepResult
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_cost import StepCost


def build(
    *,
    num_blocks: int = 64,
    num_seqs: int = 4,
    in_flight: int = 0,
    max_tokens: int = 256,
    max_ms: float = 1e6,
    role: Role = "decode",
    max_len: int = 512,
) -> EngineCore:
    engine = EngineConfig(
        model="fake",
        role=role,
        max_model_len=max_len,
        max_num_seqs=num_seqs,
        max_batched_tokens=max_tokens,
        max_step_ms=max_ms,
        steps_in_flight=1 if in_flight else 0,
    )
    return build_fake_engine(FakeConfig(engine=engine, num_blocks=num_blocks, speed=StepCost(ms_per_token=1.0)))


def add(name: str, length: int, limit: int = 8, first_token: int = 3) -> Add:
    prompt = np.arange(length, dtype="<i4") % 200 + first_token
    return Add(
        request_id=name,
        prompt=prompt.astype("<i4").tobytes(),
        params=SamplingParams(temperature=0.0, max_tokens=limit),
        seed=0,
    )


def schedule(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def land(core: EngineCore, batch: ScheduledBatch, token: int = 9) -> list[NewTokens]:
    """Land a step whose samples are all `token`, without running it."""
    token_ids = np.where(batch.samples, token, -1).astype(np.int32)
    result = StepResult(step=batch.step, token_ids=token_ids, logprobs={})
    return core.scheduler.update(result, core.runner).tokens


def test_decode_rows_come_first_and_chunks_end_at_block_boundaries() -> None:
    core = build(max_tokens=40)
    core.scheduler.add(add("a", 10))
    land(core, schedule(core.scheduler))
    core.scheduler.add(add("b", 100, first_token=9))
    batch = schedule(core.scheduler)
    assert batch.num_decode_rows == 1
    assert batch.query_lens.tolist() == [1, 32] and batch.samples.tolist() == [True, False]
    land(core, batch)
    assert schedule(core.scheduler).num_computed.tolist() == [11, 32]


def test_a_chunk_is_bounded_by_predicted_time_but_always_advances() -> None:
    core = build(max_ms=40.0)
    core.scheduler.add(add("a", 100))
    assert schedule(core.scheduler).query_lens.tolist() == [32]
    slow = build(max_ms=2.0)
    slow.scheduler.add(add("a", 100))
    assert schedule(slow.scheduler).query_lens.tolist() == [16]


def test_a_row_starts_once_and_gets_only_new_blocks_afterwards() -> None:
    core = build(num_seqs=2, max_tokens=32)
    core.scheduler.add(add("a", 32))
    first = schedule(core.scheduler)
    assert [start.request_id for start in first.starts] == ["a"] and len(first.new_blocks[0].block_ids) == 2
    land(core, first)
    second = schedule(core.scheduler)
    assert not second.starts and second.new_blocks[0].first == 2 and len(second.new_blocks[0].block_ids) == 1
    land(core, second)
    assert not schedule(core.scheduler).new_blocks


def test_with_one_step_in_flight_the_next_token_is_scheduled_before_the_last_is_known() -> None:
    core = build(in_flight=1)
    core.scheduler.add(add("a", 10, limit=3))
    batches = [schedule(core.scheduler), schedule(core.scheduler)]
    assert [batch.num_computed.tolist() for batch in batches] == [[0], [10]]
    land(core, batches[0])
    batches.append(schedule(core.scheduler))
    land(core, batches[1])
    assert core.scheduler.schedule() is None, "three tokens were counted: nothing may overshoot the length"
    assert land(core, batches[2])[0].finish_reason is FinishReason.LENGTH


def test_blocks_of_an_aborted_request_wait_for_the_step_in_flight() -> None:
    core = build(in_flight=1)
    core.scheduler.add(add("a", 40))
    batch = schedule(core.scheduler)
    core.scheduler.abort(Abort(request_id="a"))
    assert core.scheduler.blocks.num_referenced == 3
    assert land(core, batch) == []
    assert core.scheduler.blocks.num_referenced == 0


def test_blocks_of_a_stopped_request_wait_for_its_overshooting_step() -> None:
    core = build(in_flight=1)
    core.scheduler.add(add("a", 10))
    first, second = schedule(core.scheduler), schedule(core.scheduler)
    (last,) = land(core, first, token=2)
    assert (last.finish_reason, last.stop_token) == (FinishReason.STOP, 2)
    assert core.scheduler.blocks.num_referenced == 1
    assert land(core, second) == []
    assert core.scheduler.blocks.num_referenced == 0


def two_in_a_full_pool(in_flight: int) -> tuple[EngineCore, ScheduledBatch]:
    """Requests old and new, 2 blocks each and none free, in the step that fills both second blocks."""
    core = build(num_blocks=6, in_flight=in_flight)
    core.scheduler.add(add("old", 31, limit=20))
    core.scheduler.add(add("new", 31, limit=20, first_token=9))
    batch = schedule(core.scheduler)
    core.scheduler.blocks.allocate(1)  # the headroom that admission left
    while batch.num_computed.tolist() != [31, 31]:
        land(core, batch)
        batch = schedule(core.scheduler)
    return core, batch


def test_the_newest_is_preempted_and_keeps_what_it_had() -> None:
    core, batch = two_in_a_full_pool(in_flight=0)
    core.scheduler.add(add("later", 60, first_token=30))
    land(core, batch)
    batch = schedule(core.scheduler)
    assert batch.rows.tolist() == [0] and core.load().num_preemptions == 1
    core.scheduler.abort(Abort(request_id="old"))
    land(core, batch)
    again = schedule(core.scheduler)
    assert again.starts[0].request_id == "new", "a preempted request waits in front"
    assert len(again.starts[0].token_ids) == 33


def test_a_preemption_waits_for_the_step_in_flight_before_it_takes_more() -> None:
    core, batch = two_in_a_full_pool(in_flight=1)
    assert core.scheduler.schedule() is None and core.load().num_preemptions == 1
    (kept,) = land(core, batch)
    assert kept.request_id == "old", "what was in flight of the preempted one is dropped, and sampled again"
    assert schedule(core.scheduler).rows.tolist() == [0] and core.load().num_preemptions == 1


def test_admission_waits_for_room_and_keeps_the_order() -> None:
    core = build(num_blocks=6)
    core.scheduler.add(add("a", 60, limit=2))
    core.scheduler.add(add("b", 60, limit=2, first_token=9))
    core.scheduler.add(add("c", 5, limit=2, first_token=30))
    batch = schedule(core.scheduler)
    assert [start.request_id for start in batch.starts] == ["a"]
    land(core, batch)
    land(core, schedule(core.scheduler))
    assert [start.request_id for start in schedule(core.scheduler).starts] == ["b"]


@pytest.mark.parametrize(
    ("length", "num_blocks", "code"),
    [(512, 64, "context_length_exceeded"), (100, 4, "kv_capacity_exceeded")],
)
def test_a_prompt_that_can_never_fit_ends_at_once(length: int, num_blocks: int, code: str) -> None:
    core = build(num_blocks=num_blocks)
    (last,) = core.scheduler.add(add("a", length))
    assert (last.finish_reason, last.error) == (FinishReason.ABORT, code)
    assert not core.scheduler.has_unfinished


@pytest.mark.parametrize(("role", "first"), [("prefill", "call"), ("decode", "own")])
def test_the_role_decides_who_prefills_first(role: Role, first: str) -> None:
    core = build(role=role, max_tokens=64)
    core.scheduler.add(add("own", 64))
    tokens = add("call", 64, first_token=9).prompt
    core.scheduler.serve(Serve(call_id="call", tokens=tokens, start=0, end=64))
    assert [start.request_id for start in schedule(core.scheduler).starts] == [first]


def test_shared_prefix_is_computed_once_and_the_last_token_never_writes_into_it() -> None:
    core = build()
    core.scheduler.add(add("a", 32, limit=1))
    land(core, schedule(core.scheduler))
    core.scheduler.add(add("b", 32, limit=1))
    batch = schedule(core.scheduler)
    assert batch.num_computed.tolist() == [16] and batch.query_lens.tolist() == [16]
