"""Warms a runner up and measures what a step costs, with steps that touch nothing but the null block."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engine.request import SamplingParams
from engine.scheduler.batch import RowStart, Runner, ScheduledBatch
from engine.scheduler.step_cost import StepCost

_CHUNK = 128
_CONTEXT = 1024
_ENOUGH_MS = 100.0


def measure_step_cost(
    runner: Runner, *, max_model_len: int, max_batched_tokens: int, progress: Callable[[int, int], None] | None = None
) -> StepCost:
    """Fit StepCost to one decode step and two prefill chunks (without and with context). `progress(done, total)`."""
    chunk = max(min(_CHUNK, max_batched_tokens, max_model_len // 2), 1)
    context = max(min(_CONTEXT, max_model_len - chunk), 0)
    # (query tokens, tokens before them); the first is run once more, unmeasured, to load code and touch weights.
    shapes = [(1, 0), (1, 0), (chunk, 0), (chunk, context)]
    times_ms: list[float] = []
    for done, (query_len, num_computed) in enumerate(shapes):
        times_ms.append(_measure(runner, query_len, num_computed))
        if progress is not None:
            progress(done + 1, len(shapes))
    _, decode_ms, chunk_ms, context_ms = times_ms
    per_kilocontext = max(context_ms - chunk_ms, 0.0) / (chunk * context / 1000) if context else 0.0
    own_context_ms = per_kilocontext * chunk * (chunk + 1) / 2000
    per_token = max(chunk_ms - own_context_ms - decode_ms, 0.0) / max(chunk - 1, 1)
    return StepCost(
        fixed_ms=max(decode_ms - per_token, 0.0),
        ms_per_token=per_token,
        ms_per_token_kilocontext=per_kilocontext,
    )


def _measure(runner: Runner, query_len: int, num_computed: int) -> float:
    """The shortest of up to three runs, in milliseconds; slow ones are believed at once."""
    batch = _batch(query_len, num_computed)
    best = float("inf")
    for _ in range(3):
        start_s = time.perf_counter()
        runner.launch(batch).wait()
        best = min(best, (time.perf_counter() - start_s) * 1000)
        if best > _ENOUGH_MS:
            break
    return best


def _batch(query_len: int, num_computed: int) -> ScheduledBatch:
    """Row 0 without a single block: everything is written to, and read from, the null block."""
    start = RowStart(
        row=0,
        request_id="warmup",
        token_ids=np.zeros(num_computed + query_len, dtype=np.int32),
        num_prompt_tokens=num_computed + query_len,
        params=SamplingParams(temperature=0.0),
        seed=0,
    )
    return ScheduledBatch(
        step=0,
        starts=(start,),
        new_blocks=(),
        rows=np.zeros(1, dtype=np.int32),
        query_lens=np.array([query_len], dtype=np.int32),
        num_computed=np.array([num_computed], dtype=np.int32),
        samples=np.ones(1, dtype=np.bool_),
        num_decode_rows=int(query_len == 1),
    )
