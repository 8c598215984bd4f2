"""The dispatcher when workers refuse, are busy, die, fall silent or hang."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.router.dispatch import MAX_RETRY_S, Dispatcher
from cluster.router.effects import DropLink, Ended, RouterEffect, Submit, ToWorker
from cluster.router.fleet import HUNG_STEP_S
from cluster.router.policies import policy_named
from cluster.router.recovery import VERDICT_S
from cluster.types import Dispatch, Failed, Heartbeat, Tokens, WorkerInfo
from engine.request import FinishReason, SamplingParams


def info(worker_id: str, **changes: Any) -> WorkerInfo:
    made = WorkerInfo(
        worker_id=worker_id,
        incarnation=worker_id * 8,
        epoch=1,
        role="decode",
        state="ready",
        address=f"{worker_id}:1",
        max_num_seqs=4,
    )
    return replace(made, **changes)


class Told:
    """A dispatcher with workers d1.. and one request "r"; remembers where it is and whether it ended."""

    def __init__(self, *workers: str, deadline: float = 1000.0, choices: int = 1) -> None:
        self.d = Dispatcher(policy_named("least-loaded"), Random(3))
        self.dispatch: Dispatch | None = None
        self.worker = ""
        self.ended: list[str | None] = []
        self.dropped: list[str] = []
        for worker_id in workers:
            self.take(self.d.on_worker_up(0.0, info(worker_id)))
        request = Submit(
            request_id="r",
            prompt=np.arange(3, 30, dtype="<i4").tobytes(),
            params=SamplingParams(max_tokens=8),
            seeds=tuple(range(choices)),
            deadline=deadline,
        )
        self.take(self.d.on_submit(0.0, request))

    def take(self, effects: list[RouterEffect]) -> None:
        for effect in effects:
            if isinstance(effect, ToWorker) and isinstance(effect.message, Dispatch):
                self.worker, self.dispatch = effect.worker_id, effect.message
            elif isinstance(effect, Ended):
                self.ended.append(effect.code)
            elif isinstance(effect, DropLink):
                self.dropped.append(effect.worker_id)

    @property
    def attempt(self) -> int:
        return self.dispatch.attempt if self.dispatch else 0

    def fails(self, code: str, now: float) -> None:
        entry = Failed(request_id="r", attempt=self.attempt, code=code)
        self.take(self.d.on_entries(now, self.worker, (entry,)))

    def answers(self, now: float, position: int = 0, *, finish: bool = False) -> None:
        reason = FinishReason.LENGTH if finish else None
        entry = Tokens(
            request_id="r", attempt=self.attempt, choice=0, position=position, token_ids=(9,), finish_reason=reason
        )
        self.take(self.d.on_entries(now, self.worker, (entry,)))

    def wait(self, until: float) -> float:
        """Run timers up to a time, with every worker's heartbeats, or until the next dispatch. Returns the time."""
        attempt = self.attempt
        while (at := self.d.next_timer()) is not None and at <= until and self.attempt == attempt and not self.ended:
            self.take(self.d.on_timer(at))
            for worker in self.d.status().workers:
                if worker.up:
                    self.take(self.d.on_heartbeat(at, Heartbeat(info=worker.info)))
            now = at
        return now


@pytest.mark.parametrize("code", ["busy", "refused"])
def test_a_worker_that_turns_it_away_is_followed_by_another(code: str) -> None:
    t = Told("d1", "d2")
    first = t.worker
    t.fails(code, 1.0)
    at = t.wait(2.0)
    assert t.worker != first and t.attempt == 2 and 1.0 < at <= 1.0 + 0.03


def test_the_only_worker_is_asked_again_with_growing_pauses() -> None:
    t = Told("d1")
    pauses, now = [], 0.0
    for _ in range(12):
        t.fails("busy", now)
        later = t.wait(now + 10)
        pauses.append(later - now)
        now = later
    assert t.attempt == 13 and not t.ended
    assert pauses[0] < 0.05 and max(pauses) <= MAX_RETRY_S * 1.5 and min(pauses[-4:]) >= MAX_RETRY_S * 0.5
    assert len(set(pauses[-4:])) > 1, "jittered"


def test_a_request_that_is_always_turned_away_ends_at_its_deadline() -> None:
    t = Told("d1", deadline=5.0)
    now = 0.0
    while not t.ended:
        t.fails("busy", now)
        now = t.wait(10.0)
    assert t.ended == ["deadline_exceeded"] and now == 5.0


def test_a_worker_lost_before_any_token_costs_an_attempt() -> None:
    t = Told("d1", "d2")
    first = t.worker
    t.take(t.d.on_worker_down(1.0, first))
    t.wait(2.0)
    assert t.worker != first and t.attempt == 2 and not t.ended
    t.answers(3.0, finish=True)
    assert t.ended == [None]


def test_a_worker_lost_after_a_token_is_taken_over_at_the_next_position() -> None:
    t = Told("d1", "d2")
    first = t.worker
    t.answers(1.0)
    t.take(t.d.on_worker_down(1.0, first))
    t.wait(2.0)
    assert t.dispatch is not None and (t.worker != first, t.attempt) == (True, 2)
    assert len(t.dispatch.choices[0].outputs) == 4, "the token that was accepted"
    t.answers(3.0, position=1, finish=True)
    assert t.ended == [None]


def test_a_request_under_which_two_workers_crash_ends_after_a_while() -> None:
    t = Told("d1", "d2", "d3")
    now = 1.0
    for _ in range(2):
        t.take(t.d.on_worker_down(now, t.worker))
        t.take(t.d.on_worker_up(now, info(t.worker, incarnation=f"{now}")))
        now = t.wait(now + 1.0)
    assert t.attempt == 2 and not t.ended, "it runs nowhere now"
    while not t.ended:
        now = t.wait(100.0)
    assert t.ended == ["decode_worker_lost"] and t.attempt == 2 and now <= 2.0 + VERDICT_S


def test_a_link_that_breaks_and_comes_back_is_no_crash() -> None:
    t = Told("d1", "d2")
    now = 1.0
    for _ in range(6):
        lost = t.worker
        t.take(t.d.on_worker_down(now, lost))
        t.take(t.d.on_worker_up(now + 0.3, info(lost)))
        now = t.wait(now + 10) + 0.5
        t.d.on_heartbeat(now, Heartbeat(info=info("d1")))
        t.d.on_heartbeat(now, Heartbeat(info=info("d2")))
    assert t.attempt == 7 and not t.ended


def test_a_new_incarnation_takes_the_place_of_the_old_one() -> None:
    t = Told("d1")
    t.take(t.d.on_worker_up(1.0, info("d1", incarnation="new")))
    t.wait(2.0)
    assert t.dispatch is not None and (t.dispatch.incarnation, t.attempt) == ("new", 2)
    t.take(t.d.on_heartbeat(2.0, Heartbeat(info=info("d1", state="failed"))))
    assert t.d.status().workers[0].info.state == "ready", "a heartbeat of the old incarnation is late news"


def test_a_silent_worker_is_dropped_after_2_s() -> None:
    t = Told("d1")
    now = 0.0
    while not t.dropped:
        at = t.d.next_timer()
        assert at is not None
        now = at
        t.take(t.d.on_timer(now))
    assert t.dropped == ["d1"] and now == 2.0
    assert t.d.on_worker_down(2.1, "d1") == []
    t.take(t.d.on_worker_up(2.5, info("d1")))
    t.wait(4.0)
    assert t.attempt == 2


def test_any_message_is_a_sign_of_life() -> None:
    t = Told("d1")
    for step in range(1, 10):
        t.answers(step * 0.9, position=step - 1)
        t.take(t.d.on_timer(step * 0.9))
    assert t.dropped == []


def beat(step: int, age_s: float) -> Heartbeat:
    return Heartbeat(info=info("d1"), step_count=step, step_age_ms=int(age_s * 1000))


def test_an_engine_that_stands_still_is_dropped_and_used_again_when_it_moves() -> None:
    t = Told("d1")
    for age_s in (9.0, HUNG_STEP_S, HUNG_STEP_S + 0.5):
        t.take(t.d.on_heartbeat(age_s, beat(7, age_s)))
    assert t.dropped == ["d1"]
    t.take(t.d.on_worker_up(11.0, info("d1")))
    t.take(t.d.on_heartbeat(11.5, beat(7, 11.5)))
    t.take(t.d.on_timer(11.6))
    assert t.attempt == 1, "its steps still do not move"
    t.take(t.d.on_heartbeat(12.0, beat(8, 0.1)))
    assert t.attempt == 2


def test_one_old_step_after_a_stop_is_not_hung() -> None:
    t = Told("d1")
    t.take(t.d.on_heartbeat(1.0, beat(7, 0.2)))
    t.take(t.d.on_heartbeat(20.0, beat(7, 19.0)))
    t.take(t.d.on_heartbeat(20.5, beat(8, 0.1)))
    assert t.dropped == []


def test_a_long_idle_engine_is_not_hung() -> None:
    t = Told("d1")
    for step in range(1, 100):
        t.take(t.d.on_heartbeat(step * 0.5, beat(7, 0.0)))
    assert t.dropped == []


def test_many_that_lose_their_worker_come_back_before_new_ones_and_spread_out() -> None:
    d = Dispatcher(policy_named("least-loaded"), Random(3))
    d.on_worker_up(0.0, info("d1", max_num_seqs=8))
    request = Submit(request_id="", prompt=bytes(8), params=SamplingParams(max_tokens=8), seeds=(1,), deadline=1000.0)
    for i in range(4):
        d.on_submit(0.0, replace(request, request_id=f"old{i}"))
    d.on_worker_down(1.0, "d1")
    d.on_submit(1.0, replace(request, request_id="new"))
    times: dict[str, float] = {}
    effects = d.on_worker_up(1.2, info("d1", incarnation="new", max_num_seqs=8))
    now = 1.2
    while len(times) < 5 and now < 3:
        waiting = list(effects)
        while waiting:
            effect = waiting.pop(0)
            if isinstance(effect, ToWorker) and isinstance(effect.message, Dispatch):
                name = effect.message.request_id
                times[name] = now
                made = Tokens(request_id=name, attempt=effect.message.attempt, choice=0, position=0, token_ids=(9,) * 4)
                waiting += d.on_entries(now, "d1", (made,))  # each has shown by now that it does not crash its worker
        now = d.next_timer() or 3.0
        effects = d.on_timer(now)
    assert list(times)[-1] == "new" and len(times) == 5
