"""Predicted milliseconds, worked out by hand: steps of 2 ms and 0.1 ms a token, KV at 1 us a token and 1 ms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.router.predict import (
    DecodeCosts,
    Prediction,
    Predictor,
    SourceCosts,
    ms_per_prefill_token,
    prefill_work_ms,
)
from cluster.router.views import RequestView, WorkerView
from engine.scheduler.profile import Profile
from tests.cluster.router.views_for_tests import rate, request, worker


def remote(asked: RequestView, decode: WorkerView, source: WorkerView) -> Prediction:
    predictor = Predictor(asked)
    return predictor.remote(decode, DecodeCosts(asked, decode), SourceCosts(asked, source))


def alone(asked: RequestView, decode: WorkerView) -> Prediction:
    return Predictor(asked).alone(decode, DecodeCosts(asked, decode))


def test_an_idle_pair() -> None:
    predicted = remote(request(1001), worker("d1"), worker("p1", rates=rate("d1")))
    assert predicted.compute_ms == pytest.approx(102.0)  # 1000 tokens: D runs the last one
    assert predicted.transfer_ms == pytest.approx(1.0 + 1.0)
    assert predicted.steps_ms == pytest.approx(2.1)  # one step of one row
    assert predicted.ttft_ms == pytest.approx(102.0 + 2.0 + 2.1) and predicted.tpot_ms == pytest.approx(2.1)


def test_what_is_cached_is_not_computed() -> None:
    predicted = remote(request(1001), worker("d1"), worker("p1", cached_tokens=800, rates=rate("d1")))
    assert predicted.compute_ms == pytest.approx(22.0)
    everything = remote(request(1001), worker("d1"), worker("p1", cached_tokens=1000, rates=rate("d1")))
    assert everything.compute_ms == 0.0 and everything.transfer_ms == pytest.approx(2.0)


def test_what_the_decode_worker_holds_is_not_moved() -> None:
    predicted = remote(request(1001), worker("d1", cached_tokens=900), worker("p1", rates=rate("d1")))
    assert predicted.transfer_ms == pytest.approx(1.0 + 0.1)


def test_queued_prefill_goes_first() -> None:
    predicted = remote(request(1001), worker("d1"), worker("p1", backlog_ms=70.0, rates=rate("d1")))
    assert predicted.queue_ms == 70.0 and predicted.ttft_ms == pytest.approx(176.1)


def test_a_slow_link_counts_what_does_not_overlap() -> None:
    long = replace(request(1001), num_tokens=8193)  # two full steps of 4096
    fast = remote(long, worker("d1"), worker("p1", rates=rate("d1")))
    assert fast.transfer_ms == pytest.approx(1.0 + 4.096), "only the last step's tokens are left"
    slow = remote(long, worker("d1"), worker("p1", rates=rate("d1", gb_per_s=0.001)))
    assert slow.transfer_ms == pytest.approx(1.0 + 8192.0 - slow.compute_ms)


def test_an_unknown_peer_is_taken_for_the_one_that_was_served_last() -> None:
    source = worker("p1", rates={**rate("a", 1.0), **rate("c", 9.0), **rate("b", 4.0)})
    assert remote(request(1001), worker("d1"), source).transfer_ms == pytest.approx(1.0 + 0.25)


def test_running_rows_make_steps_longer() -> None:
    predicted = remote(request(1001), worker("d1", num_sequences=4), worker("p1", rates=rate("d1")))
    assert predicted.tpot_ms == pytest.approx(2.5) and predicted.steps_ms == pytest.approx(2.4 + 2.5)


def test_a_full_batch_is_waited_for() -> None:
    asked = request(1001, num_outputs=40)
    free, full = (alone(asked, worker("d1", num_sequences=rows)) for rows in (7, 8))
    assert free.wait_ms == 0.0 and full.wait_ms == pytest.approx(40 * full.tpot_ms / 8)
    assert alone(asked, worker("d1", num_sequences=9)).wait_ms == pytest.approx(2 * full.wait_ms)


def test_a_row_is_waited_for_while_the_prompt_is_computed_elsewhere_but_memory_is_needed_before() -> None:
    asked, full = request(1001, num_outputs=400), worker("d1", num_sequences=8)
    row_ms = alone(asked, full).wait_ms
    quick, slow = (worker("p1", backlog_ms=backlog_ms, rates=rate("d1")) for backlog_ms in (0.0, row_ms))
    assert remote(asked, full, quick).wait_ms == pytest.approx(row_ms - 102.0 - 2.0)
    assert remote(asked, full, slow).wait_ms == 0.0
    tight = worker("d1", num_sequences=8, num_free_blocks=64)
    assert remote(asked, tight, slow).wait_ms == pytest.approx(400 * remote(asked, tight, slow).tpot_ms / 8)


def test_a_full_pool_is_waited_for() -> None:
    asked = request(1001, num_outputs=40)  # 65 blocks of 16
    room, full = (alone(asked, worker("d1", num_sequences=4, num_free_blocks=free)) for free in (66, 64))
    assert room.wait_ms == 0.0 and full.wait_ms == pytest.approx(40 * full.tpot_ms / 4)
    assert alone(asked, worker("d1", num_free_blocks=64)).wait_ms == 0.0, "nobody is there to wait for"
    assert alone(asked, worker("d1", num_sequences=4, num_free_blocks=64, cached_tokens=800)).wait_ms == 0.0


def test_alone_the_rows_ride_along_and_are_held_up() -> None:
    idle, busy = (alone(request(1001), worker("d1", num_sequences=rows)) for rows in (0, 4))
    assert idle.ttft_ms == pytest.approx(2.0 + 100.1) and idle.cost_ms == pytest.approx(idle.ttft_ms + 49 * 2.1)
    assert busy.ttft_ms > idle.ttft_ms
    assert busy.cost_ms - busy.ttft_ms - 49 * busy.tpot_ms == pytest.approx(4 * 102.1 + 4 * 50 * 0.1)


def test_scales_are_what_is_real_now() -> None:
    predicted = remote(
        request(1001), worker("d1", scales=(1.0, 2.0)), worker("p1", scales=(3.0, 1.0), rates=rate("d1"))
    )
    assert predicted.compute_ms == pytest.approx(306.0) and predicted.tpot_ms == pytest.approx(4.2)


def test_overheads_are_added_by_kind() -> None:
    asked = replace(request(1001), overheads={"remote": 5.0, "alone": -1.0})
    assert remote(asked, worker("d1"), worker("p1", rates=rate("d1"))).ttft_ms == pytest.approx(111.1)
    assert alone(asked, worker("d1")).ttft_ms == pytest.approx(101.1)


def test_the_work_that_a_backlog_grows_by() -> None:
    assert prefill_work_ms(worker("p1", cached_tokens=500), 1000) == pytest.approx(52.0)
    assert prefill_work_ms(worker("p1", cached_tokens=5000), 1000) == 0.0
    assert ms_per_prefill_token(worker("p1").info.profile, 2.0) == pytest.approx(2 * (2.0 + 409.6) / 4096)
    assert ms_per_prefill_token(Profile(), 1.0) > 0.0


def test_a_worker_that_measured_nothing_can_be_compared() -> None:
    unknown = replace(worker("d1"), info=replace(worker("d1").info, profile=Profile(), max_num_seqs=0))
    assert 0.0 < alone(request(1001), unknown).ttft_ms < 10_000.0


@given(
    st.integers(1, 8000),
    st.integers(0, 8000),
    st.integers(0, 8000),
    st.integers(0, 20),
    st.integers(1, 4),
    st.floats(0, 1e4),
    st.floats(1.0, 10.0),
)
def test_more_work_never_takes_less_time(
    num_tokens: int, cached: int, also: int, rows: int, choices: int, backlog_ms: float, factor: float
) -> None:
    asked = request(num_tokens, num_choices=choices)
    decode = worker("d1", num_sequences=rows)
    source = worker("p1", cached_tokens=cached, rates=rate("d1"))
    base = remote(asked, decode, source)
    assert base.ttft_ms > 0.0 and base.cost_ms >= base.ttft_ms
    assert remote(asked, decode, replace(source, backlog_ms=backlog_ms)).ttft_ms >= base.ttft_ms - 1e-9
    assert remote(asked, decode, replace(source, scales=(factor, 1.0))).ttft_ms >= base.ttft_ms - 1e-9
    assert remote(asked, decode, replace(source, cached_tokens=max(0, cached - also))).compute_ms >= base.compute_ms
    assert alone(asked, replace(decode, num_sequences=rows + 1)).cost_ms >= alone(asked, decode).cost_ms - 1e-9
