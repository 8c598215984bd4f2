"""The backlog of one worker: ours by request, others' by heartbeats, worked off at one ms in a ms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.backlog import Backlog, Work


def backlog(*works: float) -> Backlog:
    made = Backlog()
    for number, ms in enumerate(works):
        made.add(0.0, f"r{number}", Work(num_tokens=10, ms=ms))
    return made


def test_the_first_works_off_and_the_rest_wait() -> None:
    made = backlog(100.0, 50.0)
    assert made.num_tokens == 20
    assert [made.ms(now) for now in (0.0, 0.06, 0.2)] == [
        pytest.approx(150.0),
        pytest.approx(90.0),
        pytest.approx(50.0),
    ]


def test_the_next_one_starts_when_the_first_is_done() -> None:
    made = backlog(100.0, 50.0)
    made.remove(0.3, "r0")  # late: its error stays its own
    assert made.ms(0.3) == pytest.approx(50.0) and made.ms(0.32) == pytest.approx(30.0)
    made.remove(0.4, "r1")
    assert made.ms(0.4) == 0.0 and made.num_tokens == 0


def test_an_abort_in_the_middle_takes_its_own_part() -> None:
    made = backlog(100.0, 50.0, 25.0)
    made.remove(0.05, "r1")
    assert made.ms(0.05) == pytest.approx(75.0)


def test_what_a_heartbeat_shows_beyond_ours_is_others() -> None:
    made = backlog(100.0)
    made.hear(0.0, queued_tokens=40, ms_per_token=2.0)
    assert made.num_tokens == 40 and made.ms(0.0) == pytest.approx(160.0)
    assert made.ms(0.03) == pytest.approx(130.0) and made.ms(10.0) == 0.0
    made.hear(1.0, queued_tokens=5, ms_per_token=2.0)
    assert made.num_tokens == 10


def test_a_broken_link_leaves_only_others() -> None:
    made = backlog(100.0)
    made.hear(0.0, queued_tokens=15, ms_per_token=1.0)
    made.clear()
    assert made.num_tokens == 5 and made.ms(0.0) == pytest.approx(5.0)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 500), st.floats(0, 1), st.booleans()), max_size=40))
def test_it_is_never_negative_and_ends_empty(ops: list[tuple[int, float, float, bool]]) -> None:
    made, now = Backlog(), 0.0
    for number, ms, pause, add in ops:
        now += pause
        if add:
            made.add(now, f"r{number}", Work(num_tokens=7, ms=ms))
        else:
            made.remove(now, f"r{number}")
        assert made.ms(now) >= 0.0 and made.num_tokens >= 0
    for number in range(5):
        made.remove(now, f"r{number}")
    assert made.ms(now) == 0.0 and made.num_tokens == 0
