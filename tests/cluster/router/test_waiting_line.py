"""The router's line: priority, then arrival, and nobody is passed for ever."""

from __future__ import annotations

from cluster.router.effects import Submit
from cluster.router.tracked import Tracked, track
from cluster.router.waiting_line import MAX_OVERTAKEN, WaitingLine
from engine.request import SamplingParams


def request(name: str, priority: int = 0) -> Tracked:
    submit = Submit(
        request_id=name, prompt=b"\1\0\0\0", params=SamplingParams(), seeds=(0,), deadline=9.0, priority=priority
    )
    return track(submit, 0.0)


def order(line: WaitingLine) -> list[str]:
    return [one.request_id for one in line.in_order()]


def test_without_priorities_the_line_is_in_order_of_arrival() -> None:
    line = WaitingLine()
    for name in "cab":
        line.add(request(name))
    assert order(line) == ["c", "a", "b"] and len(line) == 3
    line.discard("a")
    line.discard("never there")
    assert order(line) == ["c", "b"]


def test_lower_priorities_stand_in_front() -> None:
    line = WaitingLine()
    for name, priority in (("a", 0), ("b", 3), ("c", -2), ("d", 3), ("e", 0)):
        line.add(request(name, priority))
    assert order(line) == ["c", "a", "e", "b", "d"]
    for one in line.in_order():  # what dispatch does: it may serve while it looks
        if one.request_id in ("c", "b"):
            line.serve(one)
    assert order(line) == ["a", "e", "d"]


def test_nobody_is_overtaken_more_often_than_the_bound() -> None:
    line = WaitingLine()
    line.add(request("patient", 7))
    for index in range(MAX_OVERTAKEN):
        better = request(f"better-{index}")
        line.add(better)
        assert line.in_order()[0] is better
        line.serve(better)
    line.add(request("another"))
    assert order(line) == ["patient", "another"]
