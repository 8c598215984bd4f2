"""Deadlines, silence, and the observer who slept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.timers import TICK_S, Timers
from cluster.types import SILENCE_S


def test_deadlines_come_in_order_and_once() -> None:
    timers: Timers[str] = Timers()
    timers.set("late", 3.0)
    timers.set("early", 1.0)
    timers.set("moved", 0.5)
    timers.set("moved", 2.0)
    timers.set("cleared", 1.5)
    timers.clear("cleared")
    assert timers.next() == 1.0
    assert timers.due(2.5) == ["early", "moved"]
    assert timers.due(2.5) == [] and timers.next() == 3.0
    assert timers.due(3.0) == ["late"] and timers.next() is None


def test_a_timer_passes_at_the_time_that_it_was_set_to_last() -> None:
    timers: Timers[str] = Timers()
    timers.set("moved", 1.0)
    timers.set("moved", 5.0)
    timers.set("other", 2.0)
    assert timers.next() == 2.0 and timers.due(1.5) == []
    assert timers.due(3.0) == ["other"] and timers.next() == 5.0
    timers.set("moved", 4.0)
    assert timers.next() == 4.0 and timers.due(4.5) == ["moved"]
    assert timers.next() is None and timers.due(9.0) == []


def test_silence_passes_when_we_ran_all_the_time() -> None:
    timers: Timers[str] = Timers()
    timers.watch("peer", 0.0, SILENCE_S)
    now = 0.0
    due: list[str] = []
    while not due:
        at = timers.next()
        assert at is not None and at - now <= TICK_S
        now = at
        due = timers.due(now)
    assert due == ["peer"] and now == SILENCE_S


def test_hearing_a_peer_starts_its_silence_anew() -> None:
    timers: Timers[str] = Timers()
    timers.watch("peer", 0.0, SILENCE_S)
    for step in range(1, 20):
        timers.watch("peer", step * 0.5, SILENCE_S)
        assert timers.due(step * 0.5) == []


def test_after_our_own_lag_silence_starts_anew_and_deadlines_do_not() -> None:
    timers: Timers[str] = Timers()
    timers.watch("peer", 0.0, SILENCE_S)
    timers.set("deadline", 1.5)
    assert timers.due(5.0) == ["deadline"]
    assert timers.num_lags == 1 and "peer" in timers
    assert [timers.due(5.0 + 0.25 * i) for i in range(1, 8)] == [[]] * 7
    assert timers.due(5.0 + SILENCE_S) == ["peer"]


def test_a_lag_that_ends_before_the_deadline_is_noticed_too() -> None:
    """Heard at 0, asleep from 0.25 to 1.9: at 2.0 nothing can be known about the peer yet."""
    timers: Timers[str] = Timers()
    timers.watch("peer", 0.0, SILENCE_S)
    assert timers.due(0.25) == []
    assert timers.note(1.9)
    assert timers.due(2.1) == []


def test_without_silence_timers_a_gap_is_no_lag() -> None:
    timers: Timers[str] = Timers()
    timers.set("deadline", 100.0)
    assert timers.next() == 100.0
    assert not timers.note(50.0)
    timers.watch("peer", 60.0, SILENCE_S)
    assert not timers.note(60.5)


@given(st.lists(st.tuples(st.sampled_from(["set", "watch", "clear"]), st.integers(0, 9), st.floats(0, 10))))
def test_each_key_is_due_at_most_once_and_never_early(actions: list[tuple[str, int, float]]) -> None:
    timers: Timers[int] = Timers()
    expected: dict[int, float] = {}
    for action, key, at in actions:
        if action == "clear":
            timers.clear(key)
            expected.pop(key, None)
        else:
            timers.set(key, at)
            expected[key] = at
    for now in (0.0, 2.5, 5.0, 10.0):
        due = timers.due(now)
        assert sorted(due) == sorted(key for key, at in expected.items() if at <= now)
        expected = {key: at for key, at in expected.items() if at > now}
