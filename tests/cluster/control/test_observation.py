"""What the planner is shown: the last word of each worker, how long it has been what it is, and who is silent."""

from __future__ import annotations

import math

from msgspec.structs import replace

from cluster.control.observation import NOMINAL_GB_PER_S, ObservationWindow, WorkerSeen
from cluster.traffic import Traffic
from cluster.types import SILENCE_S, Heartbeat, PeerRate, WorkerInfo
from engine.messages import Load

INFO = WorkerInfo(worker_id="d-0", incarnation="a", epoch=1, role="decode", state="ready", address="")


def beat(window: ObservationWindow, now: float, info: WorkerInfo = INFO, **load: int) -> None:
    window.on_heartbeat(now, Heartbeat(info=info, load=Load(**load)))


def only(window: ObservationWindow, now: float) -> WorkerSeen:
    (seen,) = window.observe(now).workers
    return seen


def test_the_last_word_counts_and_a_change_of_role_or_state_is_timed() -> None:
    window = ObservationWindow()
    beat(window, 1.0, num_running=1)
    assert (only(window, 1.0).since_role_s, only(window, 1.0).since_state_s) == (math.inf, math.inf)
    beat(window, 2.0, replace(INFO, epoch=2, state="draining"), num_running=2)
    seen = only(window, 2.5)
    assert (seen.info.state, seen.load.num_running, seen.since_state_s, seen.since_role_s) == (
        "draining",
        2,
        0.5,
        math.inf,
    )
    beat(window, 3.0, replace(INFO, epoch=5, role="prefill"))
    assert (only(window, 4.0).since_role_s, only(window, 4.0).since_state_s) == (1.0, 1.0)


def test_a_word_of_an_earlier_epoch_that_comes_late_is_ignored_and_a_new_incarnation_begins_anew() -> None:
    window = ObservationWindow()
    beat(window, 1.0)
    beat(window, 2.0, replace(INFO, epoch=4, role="prefill"))
    beat(window, 2.1, INFO)
    assert only(window, 2.2).info.role == "prefill"
    beat(window, 3.0, replace(INFO, incarnation="b"))
    assert (only(window, 3.0).info.role, only(window, 3.0).since_role_s) == ("decode", math.inf)


def test_a_silent_or_lost_worker_is_not_shown() -> None:
    window = ObservationWindow()
    beat(window, 1.0)
    beat(window, 1.0, replace(INFO, worker_id="a-0"))
    assert [seen.info.worker_id for seen in window.observe(1.0 + SILENCE_S).workers] == ["a-0", "d-0"]
    assert window.observe(1.01 + SILENCE_S).workers == ()
    beat(window, 5.0)
    window.on_worker_down("d-0")
    window.on_worker_down("never-0")
    assert window.observe(5.0).workers == ()


def test_rows_are_smoothed_so_that_a_short_burst_is_not_taken_for_a_change() -> None:
    window = ObservationWindow()
    beat(window, 0.0, num_running=10)
    assert only(window, 0.0).mean_rows == 10.0
    beat(window, 0.5, num_running=100, num_waiting=10)
    assert 10.0 < only(window, 0.5).mean_rows < 25.0
    for index in range(2, 81):
        beat(window, index / 2, num_running=100, num_waiting=10)
    assert 109.0 < only(window, 40.0).mean_rows <= 110.0


def test_a_switch_that_failed_counts_as_a_change() -> None:
    window = ObservationWindow()
    beat(window, 1.0)
    window.on_failed_switch(1.5, "d-0")
    window.on_failed_switch(1.5, "never-0")
    assert only(window, 2.0).since_role_s == 0.5


def test_traffic_is_gathered_here_or_given_and_the_wishes_of_the_file_are_passed_on() -> None:
    window = ObservationWindow(wants_prefill=True, needs_prefill=True)
    window.traffic.on_request(1.0, 100)
    assert window.observe(2.0).traffic.num_requests == 1
    given = window.observe(2.0, Traffic(num_requests=5))
    assert (given.traffic.num_requests, given.wants_prefill, given.needs_prefill) == (5, True, True)


def test_the_rate_of_its_kv_is_that_of_the_peer_served_last() -> None:
    window = ObservationWindow()
    beat(window, 1.0)
    assert only(window, 1.0).gb_per_s == NOMINAL_GB_PER_S
    rate = PeerRate(peer_id="p", transport="grpc", gb_per_s=3.5, latency_ms=1.0)
    window.on_heartbeat(1.1, Heartbeat(info=INFO, peers=(rate,)))
    assert only(window, 1.1).gb_per_s == 3.5
