"""When a process that ended is started again."""

from __future__ import annotations

from cluster.control.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_FAILED_STARTS, STEADY_S, Restarts


def run_and_end(restarts: Restarts, now: float, seconds: float) -> float | None:
    restarts.on_started("w", now)
    return restarts.on_ended("w", now + seconds)


def test_pauses_grow_to_a_bound_and_begin_anew_after_a_steady_run() -> None:
    restarts = Restarts()
    restarts.on_started("w", 0)
    restarts.on_ready("w")
    pauses = [run_and_end(restarts, 10.0 * n, 1.0) for n in range(10)]
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert run_and_end(restarts, 200.0, STEADY_S) == FIRST_PAUSE_S


def test_a_process_that_never_was_ready_is_given_up() -> None:
    restarts = Restarts()
    pauses = [run_and_end(restarts, float(n), 0.1) for n in range(MAX_FAILED_STARTS)]
    assert pauses[-1] is None
    assert None not in pauses[:-1]


def test_a_process_is_due_once_until_it_is_started() -> None:
    restarts = Restarts()
    pause = run_and_end(restarts, 0.0, 1.0)
    assert pause is not None
    assert restarts.waits("w")
    assert restarts.due(1.0) == []
    assert restarts.due(1.0 + pause) == ["w"]
    restarts.on_started("w", 1.0 + pause)
    assert restarts.due(100.0) == []
    assert not restarts.waits("w")
