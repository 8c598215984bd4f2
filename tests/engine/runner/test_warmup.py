"""Warm-up: fits the cost model to what it measures, and leaves no trace in the KV of requests."""

from __future__ import annotations

import numpy as np
import pytest

from engine.runner import warmup
from engine.runner.model_runner import ModelRunner
from engine.scheduler.batch import IntArray, ScheduledBatch, StepResult
from engine.scheduler.step_cost import StepCost


class TimedRunner:
    """Steps take what `cost` predicts, on a clock that the test reads."""

    checksum_algorithm = "none"

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.now_s = 0.0
        self.largest = 0

    def launch(self, batch: ScheduledBatch) -> TimedRunner:
        self.largest = max(self.largest, int((batch.num_computed + batch.query_lens).max()))
        self.now_s += self.cost.predict_batch(batch) / 1000
        return self

    def wait(self) -> StepResult:
        return StepResult(step=0, token_ids=np.zeros(1, dtype=np.int32), logprobs={})

    def checksum_blocks(self, block_ids: IntArray) -> list[int]:
        return [0 for _ in block_ids]

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        return 0


@pytest.mark.parametrize("max_model_len", [4096, 1000, 40, 1])
def test_the_cost_model_is_found_again(max_model_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = StepCost(fixed_ms=7.0, ms_per_token=0.5, ms_per_token_kilocontext=0.25)
    runner = TimedRunner(cost)
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: runner.now_s)
    found = warmup.measure_step_cost(runner, max_model_len=max_model_len, max_batched_tokens=2048)
    assert runner.largest <= max_model_len
    for query_len, num_computed in ((1, 0), (max_model_len // 2, 0)):
        expected = cost.fixed_ms + cost.row_ms(query_len, num_computed)
        if query_len:
            assert found.fixed_ms + found.row_ms(query_len, num_computed) == pytest.approx(expected, rel=0.01)


def test_warmup_touches_the_null_block_only(runner: ModelRunner) -> None:
    seen: list[tuple[int, int]] = []
    warmup.measure_step_cost(
        runner, max_model_len=200, max_batched_tokens=64, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (len(seen), len(seen))
    assert not runner.kv.tensor[1:].any()
