"""Profiles: what they predict, and how real steps keep them fresh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.profile import Profile, StepTimes, alike, interpolate, profile_of, tokens_within
from engine.scheduler.step_cost import StepCost

COST = StepCost(fixed_ms=2.0, ms_per_token=0.1, ms_per_token_kilocontext=0.05)
PROFILE = profile_of(COST, max_step_ms=50.01, max_step_tokens=2048, max_num_seqs=32, kv_token_bytes=64)

tables = st.dictionaries(st.integers(1, 4096), st.floats(0, 1e4), min_size=1, max_size=6).map(
    lambda points: tuple(zip(sorted(points), sorted(points.values()), strict=True))
)


def batch(rows: list[tuple[int, int]]) -> ScheduledBatch:
    """Rows of (query tokens, tokens before them), decode rows first."""
    return ScheduledBatch(
        step=0,
        starts=(),
        new_blocks=(),
        rows=np.arange(len(rows), dtype=np.int32),
        query_lens=np.array([query_len for query_len, _ in rows], dtype=np.int32),
        num_computed=np.array([computed for _, computed in rows], dtype=np.int32),
        samples=np.ones(len(rows), dtype=np.bool_),
        num_decode_rows=sum(query_len == 1 for query_len, _ in rows),
    )


def test_tables_are_straight_lines_between_points_and_beyond_the_last() -> None:
    table = ((10, 5.0), (20, 15.0), (40, 20.0))
    assert [interpolate(table, x) for x in (0, 10, 15, 30, 48)] == [5.0, 5.0, 10.0, 17.5, 22.0]
    assert interpolate((), 7) == 0.0


@given(tables, st.floats(0, 2e4), st.integers(1, 8192))
def test_tokens_within_is_the_most_that_fits(table: tuple[tuple[int, float], ...], ms: float, at_most: int) -> None:
    count = tokens_within(table, ms, at_most)
    assert 0 <= count <= at_most
    assert count == 0 or interpolate(table, count) <= ms
    assert count == at_most or interpolate(table, count + 1) > ms


@pytest.mark.parametrize(("num_tokens", "cached"), [(1, 0), (100, 0), (480, 0), (300, 700)])
def test_a_prompt_of_one_step_takes_what_step_cost_says(num_tokens: int, cached: int) -> None:
    assert PROFILE.prefill_ms(num_tokens, cached) == pytest.approx(COST.predict([(num_tokens, cached)]))


def test_a_long_prompt_takes_a_step_for_each_chunk() -> None:
    chunk = PROFILE.chunk_tokens(PROFILE.max_step_ms)
    assert chunk == 480  # (50.01 - 2) / 0.1
    whole = sum(COST.predict([(480, 480 * i)]) for i in range(3)) + COST.predict([(60, 1440)])
    assert PROFILE.prefill_ms(1500, 0) == pytest.approx(whole)
    assert PROFILE.prefill_ms(0, 100) == 0.0


def test_a_decode_step_takes_what_step_cost_says() -> None:
    assert PROFILE.decode_step_ms(4, 4 * 1001) == pytest.approx(COST.predict([(1, 1000)] * 4))
    assert PROFILE.decode_step_ms(0, 0) == 0.0


def test_a_machine_that_stays_slower_is_believed_slowly() -> None:
    times = StepTimes(PROFILE)
    step = batch([(1, 100)] * 8)
    times.observe(step, 3 * sum(times.parts(step)))
    assert 1.0 < times.scales[1] < 1.05, "one slow step changes little"
    for _ in range(200):
        times.observe(step, 3 * sum(times.parts(step)))
    assert times.scales == (1.0, pytest.approx(3.0, rel=0.02))


def test_one_stuck_step_in_ten_changes_little() -> None:
    times = StepTimes(PROFILE)
    step = batch([(256, 0)])
    for i in range(300):
        times.observe(step, sum(times.parts(step)) * (1000.0 if i % 10 == 0 else 1.0))
    assert 1.0 <= times.scales[0] < 1.15 and times.scales[1] == 1.0


def test_a_mixed_step_teaches_only_what_it_is_made_of() -> None:
    times = StepTimes(PROFILE)
    times.observe(batch([(1, 10), (1, 10), (400, 0)]), 1000.0)
    assert times.scales[0] > 1.0 and times.scales[1] == 1.0
    before = times.scales
    times.observe(batch([(1, 10)] * 16 + [(4, 0)]), 1000.0)
    assert times.scales == before, "half and half teaches neither"


def test_nothing_is_learnt_without_a_profile() -> None:
    times = StepTimes(Profile())
    times.observe(batch([(1, 10)]), 5.0)
    assert times.scales == (1.0, 1.0) and not Profile().known


def test_steps_are_alike_by_what_they_compute() -> None:
    assert alike(batch([(1, 5), (1, 9)]), batch([(1, 6), (1, 90)]))
    assert not alike(batch([(1, 5)]), batch([(1, 5), (1, 9)]))
    assert not alike(batch([(2, 5)]), batch([(3, 5)]))
