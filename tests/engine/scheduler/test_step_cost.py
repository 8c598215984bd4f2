"""A step's predicted time, and the longest chunk that keeps it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler.step_cost import StepCost


def test_prediction_adds_rows_to_the_fixed_part() -> None:
    cost = StepCost(fixed_ms=2.0, ms_per_token=0.5, ms_per_token_kilocontext=1.0)
    # the query token of the first row sees 1000 keys, those of the second 1, 2, 3
    assert cost.predict([(1, 999), (3, 0)]) == pytest.approx(2.0 + 0.5 + 1.0 + 1.5 + 0.006)


milliseconds = st.integers(0, 10_000).map(lambda thousandths: thousandths / 1000)


@settings(deadline=None)
@given(milliseconds, milliseconds, st.floats(-1.0, 200.0), st.integers(0, 100_000), st.integers(1, 5000))
def test_the_longest_chunk_fits_and_one_more_token_does_not(
    per_token: float, per_context: float, budget_ms: float, num_computed: int, at_most: int
) -> None:
    cost = StepCost(fixed_ms=1.0, ms_per_token=per_token, ms_per_token_kilocontext=per_context)
    chunk = cost.longest_chunk(budget_ms, num_computed, at_most)
    assert 0 <= chunk <= at_most
    assert chunk == 0 or cost.row_ms(chunk, num_computed) <= budget_ms * (1 + 1e-9)
    assert chunk == at_most or cost.row_ms(chunk + 2, num_computed) > budget_ms
