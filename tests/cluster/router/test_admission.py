"""Admission: bounds hold whatever comes, and everything that entered leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.admission import MAX_RETRY_S, MIN_RETRY_S, Admission


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    admission = Admission(max_queue=2, max_running=1)
    assert admission.admit(0.0, "a") is None
    assert admission.admit(0.0, "b") is None
    refused = admission.admit(0.0, "c")
    assert refused is not None
    assert refused.retry_after_s == MAX_RETRY_S  # nothing was served yet: no rate to go by


def test_what_a_worker_took_up_no_longer_fills_the_queue() -> None:
    admission = Admission(max_queue=1, max_running=2)
    assert admission.admit(0.0, "a") is None
    admission.begun("a")
    assert (admission.num_queued, admission.num_running) == (0, 1)
    assert admission.admit(0.0, "b") is None


def test_retry_after_follows_the_recent_rate() -> None:
    admission = Admission(max_queue=100, max_running=100)
    for index in range(10):  # one a second
        assert admission.admit(float(index), f"old-{index}") is None
        admission.leave(float(index), f"old-{index}")
    for index in range(20):
        assert admission.admit(9.0, f"new-{index}") is None
    assert 15 < admission.retry_after_s(9.0) < 25
    assert admission.retry_after_s(100.0) == MAX_RETRY_S  # the rate is too old to count


def test_a_request_of_many_prompts_takes_as_many_places() -> None:
    admission = Admission(max_queue=4, max_running=4)
    assert admission.admit(0.0, "a", weight=3) is None
    assert admission.admit(0.0, "b", weight=2) is not None
    assert admission.admit(0.0, "c", weight=1) is None
    admission.leave(1.0, "a")
    assert admission.num_queued == 1


STEPS = st.lists(
    st.tuples(st.sampled_from(["admit", "begun", "leave"]), st.integers(0, 9), st.integers(1, 3)), max_size=80
)


@given(steps=STEPS, max_queue=st.integers(1, 6), max_running=st.integers(1, 6))
def test_counts_stay_within_their_bounds_and_return_to_zero(
    steps: list[tuple[str, int, int]], max_queue: int, max_running: int
) -> None:
    admission, inside = Admission(max_queue=max_queue, max_running=max_running), set[str]()
    for now, (step, number, weight) in enumerate(steps):
        name = str(number)
        if step == "admit" and name not in inside:
            if admission.admit(now, name, weight) is None:
                inside.add(name)
        elif step == "begun":
            admission.begun(name)
        elif step == "leave" and name in inside:
            admission.leave(now, name)
            inside.remove(name)
        assert 0 <= admission.num_queued <= max_queue
        assert 0 <= admission.num_running <= max_running
        assert MIN_RETRY_S <= admission.retry_after_s(now) <= MAX_RETRY_S
    for name in inside:
        admission.leave(100.0, name)
    assert (admission.num_queued, admission.num_running) == (0, 0)
