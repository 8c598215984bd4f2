"""Capacities are what Profile predicts, all workers at once; targets that nobody can meet are taken for attainable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.capacity import ATTAINABLE, HELD_PROMPTS, Capacity, Work, capacity_of
from cluster.control.observation import WorkerSeen
from cluster.worker.admission import PLACES_PER_ROW
from engine.messages import Load
from engine.scheduler.profile import Profile, Table
from tests.cluster.control.seen import profile, traffic, worker

WORK = Work(prompt_tokens=1000.0, cached_tokens=0.0, output_tokens=100.0, square_ratio=1.0)


def capacity(*some: WorkerSeen, work: Work = WORK, ttft_ms: float = 1e6, tpot_ms: float = 1e6) -> Capacity:
    found = capacity_of(some, work, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    assert found is not None
    return found


@st.composite
def tables(draw: st.DrawFn) -> Table:
    counts = draw(st.lists(st.integers(1, 4000), min_size=1, max_size=6, unique=True))
    times = draw(st.lists(st.floats(0.1, 900.0), min_size=len(counts), max_size=len(counts)))
    return tuple(zip(sorted(counts), sorted(times), strict=True))


profiles = st.builds(
    Profile,
    prefill=tables(),
    decode=tables(),
    prefill_ms_per_token_kilocontext=st.floats(0.0, 0.1),
    decode_ms_per_row_kilocontext=st.floats(0.0, 1.0),
    max_step_ms=st.floats(50.0, 500.0),
    max_step_tokens=st.integers(64, 4096),
)


@settings(max_examples=50)
@given(st.lists(profiles, min_size=1, max_size=4), st.integers(1, 20_000), st.integers(0, 5000), st.floats(0.5, 3.0))
def test_a_prompt_takes_what_its_profile_says(some: list[Profile], new: int, cached: int, scale: float) -> None:
    load = Load(prefill_scale=scale)
    seen = [worker(f"w-{i}", "prefill", profile=one, load=load) for i, one in enumerate(some)]
    work = replace(WORK, prompt_tokens=float(new + cached), cached_tokens=float(cached))
    expected = [scale * one.prefill_ms(new, cached) for one in some]
    # a chunk that ends exactly on a table's point may be a token longer or shorter by rounding
    assert capacity(*seen, work=work).prefill_ms == pytest.approx(expected, rel=0.02, abs=0.1)


@settings(max_examples=50)
@given(st.lists(profiles, min_size=1, max_size=4), st.floats(1.0, 500.0))
def test_the_rows_of_a_decode_worker_are_the_most_whose_step_is_within_the_target(
    some: list[Profile], tpot_ms: float
) -> None:
    seen = [worker(f"w-{i}", "decode", profile=one) for i, one in enumerate(some)]
    found = capacity(*seen, tpot_ms=tpot_ms)
    context = WORK.prompt_tokens + WORK.output_tokens / 2
    for one, per_s in zip(some, found.decode, strict=True):
        fitting = [n for n in range(1, 101) if one.decode_step_ms(n, n * context) <= found.tpot_ms + 1e-6]
        answers = [(n, WORK.output_tokens * one.decode_step_ms(n, n * context)) for n in fitting[-2:]]
        held_ms = HELD_PROMPTS * found.typical_prefill_ms
        places = PLACES_PER_ROW * 100
        rates = [1000 * min(n / answer_ms, places / (held_ms + answer_ms)) for n, answer_ms in answers]
        assert per_s == pytest.approx(rates[-1] if rates else 0.0, rel=1e-3) or any(
            per_s == pytest.approx(rate) for rate in rates
        )


def test_long_steps_are_not_allowed_to_hide_behind_a_target_that_nobody_meets() -> None:
    slow, fast = worker("s-0", "decode", profile=profile(prefill=4, decode=4)), worker("f-0", "decode")
    found = capacity(slow, fast, ttft_ms=1.0, tpot_ms=1.0)
    assert found.ttft_ms == pytest.approx(ATTAINABLE * found.prefill_ms[1])
    assert found.tpot_ms == pytest.approx(ATTAINABLE * 10.2)
    assert found.prefill[0] == found.decode[0] == 0.0  # this machine can't, the other one can
    assert found.prefill[1] > 0.0 and found.decode[1] > 0.0


def test_the_batch_and_the_kv_memory_bound_the_rows() -> None:
    roomy = worker("a-0", "decode", load=Load(num_blocks=100_000))
    tight = worker("b-0", "decode", load=Load(num_blocks=660))  # ten contexts of 1050 tokens
    found = capacity(roomy, tight)
    assert list(found.rows) == [100, 10]
    held_ms = (
        HELD_PROMPTS * found.typical_prefill_ms
    )  # memory is held while the prompt is computed elsewhere, rows aren't
    expected = [1000 * 100 / (100 * 30.0), 1000 * 10 / (held_ms + 100 * 12.0)]
    assert found.decode == pytest.approx(expected, rel=1e-2)


def test_the_longer_prompts_take_elsewhere_the_less_a_small_batch_decodes() -> None:
    decode, fast, slow = (worker(name, "decode", profile=profile(prefill=prefill)) for name, prefill in
                          (("d-0", 1), ("p-0", 1), ("p-1", 8)))  # fmt: skip
    brief = replace(WORK, output_tokens=5.0)  # more than half of its time is its prompt's
    assert capacity(decode, slow, work=brief).decode[0] < capacity(decode, fast, work=brief).decode[0]
    assert capacity(decode, slow).decode[0] == capacity(decode, fast).decode[0], "twice the batch has places"


def test_more_prefill_workers_may_be_busier() -> None:
    shares = capacity(worker("a-0", "prefill"), ttft_ms=500.0).usable_shares(64)
    assert np.all(np.diff(shares) >= 0.0) and shares[1] < 0.7 < 0.85 < shares[64] <= 0.95


def test_nothing_is_known_before_anything_was_measured_and_one_that_has_not_counts_as_one_that_has() -> None:
    blank = worker("a-0", "decode", profile=Profile())
    assert capacity_of((blank,), WORK, ttft_ms=1.0, tpot_ms=1.0) is None
    found = capacity(blank, worker("b-0", "decode"))
    assert found.decode[0] == found.decode[1] > 0.0


def test_work_is_what_the_traffic_brought() -> None:
    assert Work.of(replace(traffic(0.0, 0.0, 0.0), num_requests=0)) is None
    came = traffic(2.0, 1000.0, 50.0, cached_tokens_per_s=500.0, prompt_square_ratio=2.0)
    work = Work.of(came)
    assert work == Work(prompt_tokens=1000.0, cached_tokens=250.0, output_tokens=50.0, square_ratio=2.0)
    assert work.new_tokens == 750.0
