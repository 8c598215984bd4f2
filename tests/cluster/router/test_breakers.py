"""Breakers of (decode worker, source) pairs, on virtual time."""

from __future__ import annotations

from cluster.router.breakers import MAX_OPEN_S, MAX_PAIRS, OPEN_S, TRIAL_S, Breakers


def failed(breakers: Breakers, now: float, decode: str = "D", source: str = "P") -> None:
    breakers.fail(now, decode, source, source_id=source.lower(), reason="silent")


def test_a_pair_that_failed_is_avoided_for_a_while() -> None:
    breakers = Breakers()
    assert breakers.state(0.0, "D", "P") == "closed" and breakers.avoided(0.0, "D") == frozenset()
    failed(breakers, 10.0)
    assert breakers.avoided(10.0 + OPEN_S - 0.01, "D") == {"p"}
    assert breakers.avoided(10.0 + OPEN_S, "D") == frozenset() and breakers.state(12.0, "D", "P") == "half-open"


def test_it_is_the_pair_that_failed_not_the_workers() -> None:
    breakers = Breakers()
    failed(breakers, 0.0)
    assert breakers.avoided(0.1, "other D") == frozenset()
    assert breakers.state(0.1, "D", "other P") == "closed"


def test_a_half_open_pair_gets_one_trial() -> None:
    breakers = Breakers()
    failed(breakers, 0.0)
    breakers.chosen(1.0, "D", "P")
    assert breakers.state(1.0, "D", "P") == "open", "it was not asked for, so it is no trial"
    breakers.chosen(OPEN_S, "D", "P")
    assert breakers.state(OPEN_S, "D", "P") == "trying" and breakers.avoided(OPEN_S, "D") == {"p"}
    breakers.succeed("D", "P")
    assert breakers.state(OPEN_S, "D", "P") == "closed" and len(breakers) == 0


def test_a_trial_that_nobody_answers_is_followed_by_another() -> None:
    breakers = Breakers()
    failed(breakers, 0.0)
    breakers.chosen(OPEN_S, "D", "P")
    assert breakers.state(OPEN_S + TRIAL_S, "D", "P") == "half-open"


def test_failures_in_a_row_are_avoided_for_longer_up_to_a_bound() -> None:
    breakers, now, waits = Breakers(), 0.0, []
    for _ in range(10):
        failed(breakers, now)
        (status,) = breakers.status()
        waits.append(status.open_until - now)
        now = status.open_until
    assert waits[:4] == [OPEN_S, 2 * OPEN_S, 4 * OPEN_S, 8 * OPEN_S] and waits[-1] == MAX_OPEN_S


def test_requests_that_fail_together_are_one_failure() -> None:
    breakers = Breakers()
    for i in range(20):
        failed(breakers, 0.01 * i)
    (status,) = breakers.status()
    assert status.num_failures == 1 and status.reason == "silent" and status.source_id == "p"


def test_a_new_incarnation_begins_anew() -> None:
    breakers = Breakers()
    failed(breakers, 0.0)
    failed(breakers, 0.0, decode="D2")
    breakers.forget("P")
    assert breakers.avoided(0.0, "D") == breakers.avoided(0.0, "D2") == frozenset()


def test_they_are_bounded() -> None:
    breakers = Breakers()
    for i in range(MAX_PAIRS + 10):
        failed(breakers, 0.0, source=f"P{i}")
    assert len(breakers) == MAX_PAIRS and breakers.state(0.0, "D", "P0") == "closed"
