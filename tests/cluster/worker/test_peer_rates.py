"""How fast peers are reached: a line through real pieces that odd ones don't bend."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.types import PeerRate
from cluster.worker.peer_rates import LEARNT_FROM, MAX_PEERS, PeerRates, fit


def learnt(*pieces: tuple[int, float]) -> PeerRate:
    rates = PeerRates()
    for num_bytes, ms in pieces:
        rates.observe("d1", "grpc", num_bytes, ms)
    (rate,) = rates.rates()
    return rate


def test_latency_and_rate_come_apart() -> None:
    rate = learnt(*((size, 2.0 + size / 1e6) for size in (1_000_000, 2_000_000, 8_000_000)))
    assert rate.gb_per_s == pytest.approx(1.0) and rate.latency_ms == pytest.approx(2.0)


def test_a_receiver_that_once_had_no_room_changes_nothing() -> None:
    line = [(size * 1_000_000, 2.0 + size) for size in range(1, 12)]
    rate = learnt(*line[:6], (3_000_000, 4000.0), *line[6:])
    assert rate.gb_per_s == pytest.approx(1.0, rel=0.1) and rate.latency_ms == pytest.approx(2.0, rel=0.2)


def test_pieces_of_one_size_are_all_rate() -> None:
    rate = learnt((1_000_000, 4.0), (1_000_000, 4.0), (1_100_000, 4.4))
    assert rate.gb_per_s == pytest.approx(0.25) and rate.latency_ms == pytest.approx(0.0, abs=1e-6)


def test_only_the_last_pieces_count() -> None:
    old = [(1_000_000 * (1 + i % 3), 500.0) for i in range(LEARNT_FROM)]
    new = [(1_000_000 * (1 + i % 3), 1.0 + i % 3) for i in range(LEARNT_FROM)]
    assert learnt(*old, *new).gb_per_s == pytest.approx(1.0)


def test_transports_are_apart_and_peers_are_bounded() -> None:
    rates = PeerRates()
    for i in range(MAX_PEERS + 5):
        rates.observe(f"d{i}", "local", 1000, 1.0)
    rates.observe("d60", "grpc", 1000, 9.0)
    known = {(rate.peer_id, rate.transport) for rate in rates.rates()}
    assert len(known) == MAX_PEERS and {("d60", "local"), ("d60", "grpc")} <= known and ("d0", "local") not in known


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0.001, 1e6)), min_size=1, max_size=LEARNT_FROM))
def test_any_pieces_give_a_usable_rate(pieces: list[tuple[int, float]]) -> None:
    rate = fit("d1", "local", pieces)
    assert 0.0 < rate.gb_per_s < float("inf") and 0.0 <= rate.latency_ms < float("inf")
