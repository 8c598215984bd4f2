"""Measuring a profile: what is run, within which time, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.runner import profile as measuring
from engine.scheduler.batch import IntArray, ScheduledBatch, StepResult
from engine.scheduler.profile import Profile
from engine.scheduler.step_cost import StepCost

COST = StepCost(fixed_ms=1.0, ms_per_token=0.05, ms_per_token_kilocontext=0.01)


@dataclass
class Handle:
    runner: TimedRunner
    batch: ScheduledBatch

    def wait(self) -> StepResult:
        self.runner.now += self.runner.cost.predict_batch(self.batch) * self.runner.factor / 1000
        self.runner.batches.append(self.batch)
        return StepResult(step=0, token_ids=np.zeros(len(self.batch.rows), dtype=np.int32), logprobs={})


@dataclass
class TimedRunner:
    """Steps take what `cost` says, times `factor`, on a clock of its own."""

    cost: StepCost = COST
    factor: float = 1.0
    now: float = 0.0
    batches: list[ScheduledBatch] = field(default_factory=list)
    checksum_algorithm: str = "none"

    def launch(self, batch: ScheduledBatch) -> Handle:
        return Handle(self, batch)

    def checksum_blocks(self, block_ids: IntArray) -> list[int]:
        return [0] * len(block_ids)

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        return 0


def measure(runner: TimedRunner, *, max_model_len: int = 4096, max_num_seqs: int = 32) -> Profile:
    return measuring.measure_profile(
        runner,
        COST,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_step_ms=100.0,
        max_step_tokens=2048,
        kv_token_bytes=8,
        clock=lambda: runner.now,
    )


def test_what_is_measured_is_what_is_predicted_later() -> None:
    profile = measure(TimedRunner(factor=2.0))
    for rows, context in ((1, 100), (8, 4000), (32, 16000)):
        expected = 2 * COST.predict([(1, context // rows - 1)] * rows)
        assert profile.decode_step_ms(rows, context) == pytest.approx(expected, rel=0.02)
    for num_tokens in (16, 100, 512, 1000):
        assert profile.prefill_ms(num_tokens, 0) == pytest.approx(2 * COST.predict([(num_tokens, 0)]), rel=0.05)


def test_a_slow_machine_does_not_start_late_for_it() -> None:
    runner = TimedRunner(factor=400.0)
    profile = measure(runner)
    assert profile.known and profile.decode[-1][0] == 32 and profile.prefill[-1][0] == 512
    longest = max(COST.predict_batch(batch) for batch in runner.batches) * 0.4
    assert runner.now <= measuring.BUDGET_S + longest, "at most one step too many"
    assert profile.prefill_step_ms(512) > 100 * COST.predict([(512, 0)]), "what was not run is scaled by what was"


def test_a_small_engine_is_asked_for_nothing_that_it_cannot_run() -> None:
    runner = TimedRunner()
    profile = measure(runner, max_model_len=24, max_num_seqs=2)
    for batch in runner.batches:
        assert len(batch.rows) <= 2
        assert int((batch.query_lens + batch.num_computed).max()) <= 24
    assert [rows for rows, _ in profile.decode] == [1, 2]


def test_tables_rise() -> None:
    profile = measure(TimedRunner())
    for table in (profile.prefill, profile.decode):
        values = [ms for _, ms in table]
        assert values == sorted(values)
