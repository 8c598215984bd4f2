"""Measures a worker's profile on its own runner: a few steps that touch nothing but the null block.

Bounded: a shape whose predicted time does not fit into what is left of the budget is not run, and its point is what
StepCost predicts. So a slow machine is measured less finely, and never starts late for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engine.request import SamplingParams
from engine.scheduler.batch import RowStart, Runner, ScheduledBatch
from engine.scheduler.profile import Profile, Table
from engine.scheduler.step_cost import StepCost

BUDGET_S = 1.0
_PREFILL_TOKENS = (16, 128, 512)
_DECODE_ROWS = (1, 4, 16)
_SHORT, _LONG = 16, 512  # keys that a decode row sees
_ENOUGH_MS = 30.0
_RUNS = 3


class _Stopwatch:
    """Runs shapes within the budget; the clock counts seconds."""

    def __init__(self, runner: Runner, cost: StepCost, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._cost = cost
        self._clock = clock
        self._ends_at = clock() + BUDGET_S
        self._factor = 1.0  # of the last shape that was run: what StepCost says is wrong by

    def ms(self, rows: list[tuple[int, int]]) -> float:
        """The shortest of up to _RUNS steps of rows (query tokens, keys before them); StepCost's word if late."""
        cost_ms = self._cost.predict(rows)
        predicted_ms = cost_ms * self._factor
        best = float("inf")
        batch = _batch(rows)
        for _ in range(_RUNS):
            started = self._clock()
            if started + min(best, predicted_ms) / 1000 > self._ends_at:
                break
            self._runner.launch(batch).wait()
            best = min(best, (self._clock() - started) * 1000)
            if best > _ENOUGH_MS:
                break
        if best == float("inf"):
            return predicted_ms
        self._factor = best / cost_ms if cost_ms > 0 else 1.0
        return best


def measure_profile(
    runner: Runner,
    cost: StepCost,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_step_ms: float,
    max_step_tokens: int,
    kv_token_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """The profile of a warm runner, within BUDGET_S and one step. `cost` is what warm-up has measured."""
    stopwatch = _Stopwatch(runner, cost, clock)
    longest = min(max_step_tokens, max_model_len - 1)
    decode_rows = sorted({min(rows, max_num_seqs) for rows in (*_DECODE_ROWS, max_num_seqs)})
    prefill_tokens = sorted({max(1, min(tokens, longest)) for tokens in _PREFILL_TOKENS})
    short, far = (max(0, min(keys, max_model_len - 2)) for keys in (_SHORT, _LONG))
    decode = {rows: stopwatch.ms([(1, short)] * rows) for rows in decode_rows}
    own_keys = cost.ms_per_token_kilocontext / 2000  # a prompt's tokens see each other: not part of the table
    prefill = {
        tokens: max(0.0, stopwatch.ms([(tokens, 0)]) - own_keys * tokens * (tokens + 1)) for tokens in prefill_tokens
    }
    most = decode_rows[-1]
    far_ms = stopwatch.ms([(1, far)] * most)
    keys = most * (far - short)
    slope = max(0.0, far_ms - decode[most]) / keys * 1000 if keys else cost.ms_per_token_kilocontext
    return Profile(
        prefill=_rising(prefill),
        prefill_ms_per_token_kilocontext=cost.ms_per_token_kilocontext,
        decode=_rising({rows: max(0.0, ms - slope * rows * short / 1000) for rows, ms in decode.items()}),
        decode_ms_per_row_kilocontext=slope,
        max_step_ms=max_step_ms,
        max_step_tokens=max_step_tokens,
        kv_token_bytes=kv_token_bytes,
    )


def _rising(points: dict[int, float]) -> Table:
    """More work never takes less time: a point below the one before it was measured in a lucky moment."""
    table: list[tuple[int, float]] = []
    for count, ms in sorted(points.items()):
        table.append((count, max(ms, table[-1][1] if table else 0.0)))
    return tuple(table)


def _batch(rows: list[tuple[int, int]]) -> ScheduledBatch:
    """Rows 0, 1, ... without a single block: everything is written to, and read from, the null block."""
    starts = tuple(
        RowStart(
            row=row,
            request_id=f"profile-{row}",
            token_ids=np.zeros(num_computed + query_len, dtype=np.int32),
            num_prompt_tokens=num_computed + query_len,
            params=SamplingParams(temperature=0.0),
            seed=0,
        )
        for row, (query_len, num_computed) in enumerate(rows)
    )
    return ScheduledBatch(
        step=0,
        starts=starts,
        new_blocks=(),
        rows=np.arange(len(rows), dtype=np.int32),
        query_lens=np.array([query_len for query_len, _ in rows], dtype=np.int32),
        num_computed=np.array([num_computed for _, num_computed in rows], dtype=np.int32),
        samples=np.ones(len(rows), dtype=np.bool_),
        num_decode_rows=sum(query_len == 1 for query_len, _ in rows),
    )
