"""The window of traffic: rates, means and quantiles of the last seconds, and how several routers' add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.traffic import MAX_SAMPLES, Traffic, TrafficWindow, added, quantile


def filled(seconds: int, *, prompt: int = 100, each: int = 2) -> TrafficWindow:
    """`each` requests per second for so long, from second 1000 on, each answered at once with 11 tokens."""
    window = TrafficWindow(20.0)
    for second in range(seconds):
        for _ in range(each):
            now = 1000.0 + second
            window.on_request(now, prompt)
            window.on_first_token(now, 50.0 + second, 40)
            window.on_begin()
            window.on_tokens(now, 11)
            window.on_end(now, 11, 10.0)
    return window


def test_rates_and_means_are_those_of_the_window() -> None:
    traffic = filled(100).traffic(1099.9)
    assert traffic.window_s == 20.0
    assert traffic.num_requests == 40 and traffic.requests_per_s == 2.0
    assert (traffic.mean_prompt_tokens, traffic.mean_output_tokens) == (100.0, 11.0)
    assert (traffic.prompt_tokens_per_s, traffic.output_tokens_per_s) == (200.0, 22.0)
    assert traffic.cached_share == pytest.approx(0.4)
    assert (traffic.ttft_p50_ms, traffic.ttft_p90_ms) == (139.0, 147.0)
    assert (traffic.tpot_p50_ms, traffic.tpot_p90_ms) == (10.0, 10.0)


def test_a_young_window_is_as_long_as_it_has_lasted_and_an_old_one_forgets() -> None:
    assert filled(4).traffic(1004.0).requests_per_s == 2.0
    gone = filled(4).traffic(1100.0, num_queued=7)
    assert (gone.num_requests, gone.mean_output_tokens, gone.ttft_p90_ms, gone.num_queued) == (0, None, None, 7)
    assert TrafficWindow().traffic(5.0) == Traffic()


def test_answers_that_have_become_longer_show_before_they_end() -> None:
    window = filled(20)  # two answers a second, of 11 tokens
    seen = []
    for second in range(1020, 1035):
        for _ in range(2):
            window.on_begin()
        window.on_tokens(float(second), 2 * 60 * (second - 1019))  # all of them go on, at 60 tokens/s
        seen.append(window.traffic(second + 0.9).mean_output_tokens or 0.0)
    assert seen == sorted(seen) and seen[0] > 11.0
    assert seen[9] == pytest.approx((10 * 2 * 11 + 2 * 60 * 55) / 20), "what came out over what ended"
    assert seen[-1] == pytest.approx(2 * 60 * 8), "twice what those have that run: 60 to 900 tokens"
    for second in range(1035, 1050):
        for _ in range(2):
            window.on_end(float(second), 900, None)
    assert window.traffic(1050.0).mean_output_tokens == pytest.approx(900.0)


def test_unequal_prompts_show_in_the_ratio_of_squares() -> None:
    window = TrafficWindow()
    for tokens in (100, 300):
        window.on_request(0.0, tokens)
    assert window.traffic(1.0).prompt_square_ratio == pytest.approx((100**2 + 300**2) / 2 / 200**2)


def test_latencies_are_bounded_in_number() -> None:
    window = TrafficWindow()
    for index in range(3 * MAX_SAMPLES):
        window.on_first_token(1.0, float(index))
    assert window.traffic(1.0).ttft_p50_ms == 2.5 * MAX_SAMPLES - 1


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_a_value_that_the_share_does_not_exceed(values: list[float], share: float) -> None:
    values.sort()
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


def test_several_routers_are_as_one_that_saw_everything() -> None:
    one, other = filled(20, prompt=100).traffic(1019.5), filled(20, prompt=400, each=6).traffic(1019.5)
    both = added([one, Traffic(), other])
    assert both.requests_per_s == pytest.approx(one.requests_per_s + other.requests_per_s)
    assert both.mean_prompt_tokens == pytest.approx((100 * 2 + 400 * 6) / 8)
    assert both.prompt_square_ratio == pytest.approx(8 * (2 * 100**2 + 6 * 400**2) / (200 + 2400) ** 2)
    assert both.mean_output_tokens == pytest.approx(11.0)
    assert added([one]) == one and added([]) == Traffic()
