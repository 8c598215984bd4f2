"""Requests that lost their decode worker or were given away: sources, releases, suspects, budgets."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.router.dispatch import Dispatcher
from cluster.router.effects import Deliver, Ended, RouterEffect, Submit, ToWorker
from cluster.router.policies import policy_named
from cluster.router.recovery import MAX_RECOVERING, PROBATION_TOKENS
from cluster.types import Dispatch, Heartbeat, Moved, Release, Tokens, WorkerInfo
from engine.request import FinishReason, SamplingParams

PROMPT = np.arange(3, 43, dtype="<i4").tobytes()


def info(worker_id: str, **changes: Any) -> WorkerInfo:
    role = "prefill" if worker_id.startswith("p") else "decode"
    made = WorkerInfo(
        worker_id=worker_id,
        incarnation=worker_id * 8,
        epoch=1,
        role=role,  # type: ignore[arg-type]
        state="ready",
        address=f"{worker_id}:1",
        max_num_seqs=16,
        numerics_class="cpu",
    )
    return replace(made, **changes)


class Router:
    """A dispatcher, its workers, and what it sent: the newest dispatch of each request, and every Release."""

    def __init__(self, *workers: str, requests: int = 1) -> None:
        self.d = Dispatcher(policy_named("least-loaded"), Random(3))
        self.at: dict[str, tuple[str, Dispatch]] = {}
        self.releases: list[tuple[str, Release]] = []
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, str | None] = {}
        for worker_id in workers:
            self.take(self.d.on_worker_up(0.0, info(worker_id)))
        for i in range(requests):
            submit = Submit(
                request_id=f"r{i}",
                prompt=PROMPT,
                params=SamplingParams(max_tokens=64),
                seeds=(i,),
                deadline=1000.0,
            )
            self.take(self.d.on_submit(0.0, submit))

    def take(self, effects: list[RouterEffect]) -> None:
        for effect in effects:
            if isinstance(effect, ToWorker) and isinstance(effect.message, Dispatch):
                self.at[effect.message.request_id] = (effect.worker_id, effect.message)
            elif isinstance(effect, ToWorker) and isinstance(effect.message, Release):
                self.releases.append((effect.worker_id, effect.message))
            elif isinstance(effect, Deliver):
                self.outputs.setdefault(effect.tokens.request_id, []).extend(effect.tokens.token_ids)
            elif isinstance(effect, Ended):
                self.ended[effect.request_id] = effect.code

    def says(self, now: float, num: int = 1, name: str = "r0", *, finish: bool = False) -> None:
        worker, dispatch = self.at[name]
        entry = Tokens(
            request_id=name,
            attempt=dispatch.attempt,
            choice=0,
            position=len(self.outputs.get(name, ())),
            token_ids=(7,) * num,
            finish_reason=FinishReason.LENGTH if finish else None,
        )
        self.take(self.d.on_entries(now, worker, (entry,)))

    def gives_away(self, now: float, name: str = "r0", held: int = 32) -> str:
        worker, dispatch = self.at[name]
        moved = Moved(request_id=name, attempt=dispatch.attempt, held_tokens=held)
        self.take(self.d.on_entries(now, worker, (moved,)))
        return worker

    def pass_time(self, now: float, until: float) -> None:
        while (at := self.d.next_timer()) is not None and at <= until:
            now = max(now, at)
            self.take(self.d.on_timer(now))
            for worker in self.d.status().workers:
                if worker.up:
                    self.take(self.d.on_heartbeat(now, Heartbeat(info=worker.info)))


def test_a_request_that_is_given_away_goes_on_at_once_with_the_old_worker_as_first_source() -> None:
    r = Router("p1", "d1", "d2")
    r.says(1.0, 5)
    old = r.gives_away(1.1)
    new, dispatch = r.at["r0"]
    assert new != old and dispatch.attempt == 2 and dispatch.moved
    assert len(dispatch.choices[0].outputs) == 5 * 4
    first = dispatch.sources[0]
    assert (first.worker_id, first.incarnation, first.max_compute_tokens) == (old, old * 8, 0)
    assert [source.worker_id for source in dispatch.sources[1:]] == ["p1"]
    assert r.releases == []


def test_the_old_worker_is_released_once_at_the_first_token_of_the_new_attempt() -> None:
    r = Router("d1", "d2")
    r.says(1.0, 5)
    old = r.gives_away(1.1)
    r.says(1.2)
    r.says(1.3, finish=True)
    assert r.releases == [(old, Release(request_id="r0", attempt=1))]
    assert r.ended == {"r0": None} and len(r.outputs["r0"]) == 7


def test_a_client_that_leaves_releases_what_is_held() -> None:
    r = Router("d1", "d2")
    r.says(1.0)
    old = r.gives_away(1.1)
    r.take(r.d.on_cancel(1.2, "r0"))
    assert r.releases == [(old, Release(request_id="r0", attempt=1))]


def test_given_away_twice_the_first_holder_is_released_then() -> None:
    r = Router("d1", "d2", "d3")
    r.says(1.0)
    first = r.gives_away(1.1)
    second = r.gives_away(1.2)
    assert r.releases == [(first, Release(request_id="r0", attempt=1))]
    r.says(1.3)
    assert r.releases[1:] == [(second, Release(request_id="r0", attempt=2))]


def test_a_holder_that_is_gone_is_neither_asked_nor_told() -> None:
    r = Router("d1", "d2")
    r.says(1.0)
    other = "d2" if r.at["r0"][0] == "d1" else "d1"
    r.take(r.d.on_worker_down(1.1, other))
    old = r.gives_away(1.2)
    r.take(r.d.on_worker_down(1.3, old))
    r.take(r.d.on_worker_up(1.4, info(other, incarnation="new")))
    r.pass_time(1.4, 2.0)
    worker, dispatch = r.at["r0"]
    assert worker == other and dispatch.sources == ()
    r.says(2.1)
    assert r.releases == []


def test_a_worker_that_held_nothing_is_no_source() -> None:
    r = Router("d1", "d2")
    r.gives_away(1.0, held=0)
    assert r.at["r0"][1].attempt == 2 and r.at["r0"][1].sources == ()


def test_tokens_of_the_attempt_that_was_given_away_are_stale() -> None:
    r = Router("d1", "d2")
    r.says(1.0)
    worker, dispatch = r.at["r0"]
    r.gives_away(1.1)
    late = Tokens(request_id="r0", attempt=dispatch.attempt, choice=0, position=1, token_ids=(9,))
    r.take(r.d.on_entries(1.2, worker, (late,)))
    assert r.outputs["r0"] == [7] and r.d.counters["stale_entries"] == 1


def test_suspects_run_one_at_a_time_with_nothing_new_beside_them() -> None:
    r = Router("d1", requests=3)
    for i in range(3):
        r.says(0.5, name=f"r{i}")
    r.take(r.d.on_worker_down(1.0, "d1"))
    fresh = Submit(request_id="new", prompt=PROMPT, params=SamplingParams(max_tokens=8), seeds=(1,), deadline=99.0)
    r.take(r.d.on_submit(1.0, fresh))
    r.take(r.d.on_worker_up(1.1, info("d1", incarnation="second")))
    for number in range(1, 4):
        r.pass_time(1.1, 1.1 + number)
        placed = [name for name, (_, dispatch) in r.at.items() if dispatch.incarnation == "second"]
        assert len(placed) == number and "new" not in placed
        r.says(1.1 + number, PROBATION_TOKENS, placed[-1])
    r.pass_time(4.2, 6.0)
    assert r.at["new"][1].incarnation == "second"


def test_those_that_lose_a_silent_worker_are_no_suspects_but_come_in_small_groups() -> None:
    r = Router("d1", requests=12)
    for i in range(12):
        r.says(0.1, name=f"r{i}")
    while r.d.fleet.workers["d1"].up:
        at = r.d.next_timer()
        assert at is not None
        r.take(r.d.on_timer(at))
    r.take(r.d.on_worker_up(3.0, info("d1", incarnation="second")))
    r.pass_time(3.0, 4.0)
    placed = [name for name, (_, dispatch) in r.at.items() if dispatch.incarnation == "second"]
    assert len(placed) == MAX_RECOVERING
    for name in placed:
        r.says(4.0, name=name)
    r.pass_time(4.0, 5.0)
    assert sum(dispatch.incarnation == "second" for _, dispatch in r.at.values()) == 2 * MAX_RECOVERING


@pytest.mark.parametrize("same", [True, False])
def test_a_text_is_continued_in_its_numerics_class_if_possible(same: bool) -> None:
    r = Router("d1", "d2")
    r.says(1.0)
    other_class = "cpu" if same else "cuda"
    r.take(r.d.on_worker_up(1.0, info("d3", numerics_class=other_class)))
    r.take(r.d.on_worker_down(1.0, "d2" if r.at["r0"][0] == "d1" else "d1"))
    r.gives_away(1.1)
    assert r.at["r0"][0] == "d3"
    assert r.d.counters["numerics_class_changed"] == (not same)
