"""The dispatcher: who gets what, what is believed, and how a request ends."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.router.dispatch import Dispatcher
from cluster.router.effects import Deliver, DropLink, Ended, Progress, RouterEffect, Submit, ToWorker
from cluster.router.policies import policy_named
from cluster.types import AbortRequest, Dispatch, Entry, Failed, Heartbeat, News, Tokens, WorkerInfo
from engine.config import Role
from engine.messages import Load
from engine.request import FinishReason, SamplingParams


def info(worker_id: str, **changes: Any) -> WorkerInfo:
    role: Role = "prefill" if worker_id.startswith("p") else "decode"
    made = WorkerInfo(
        worker_id=worker_id,
        incarnation=worker_id * 8,
        epoch=1,
        role=role,
        state="ready",
        address=f"{worker_id}:1",
        identity="model",
        kv_fingerprint="layout",
        max_num_seqs=4,
    )
    return replace(made, **changes)


def submit(request_id: str = "r", *, choices: int = 1, deadline: float = 100.0) -> Submit:
    return Submit(
        request_id=request_id,
        prompt=np.arange(3, 30, dtype="<i4").tobytes(),
        params=SamplingParams(max_tokens=8),
        seeds=tuple(range(choices)),
        deadline=deadline,
    )


def dispatcher(*workers: str, policy: str = "least-loaded", **options: Any) -> Dispatcher:
    made = Dispatcher(policy_named(policy), Random(1), **options)
    for worker_id in workers:
        made.on_worker_up(0.0, info(worker_id))
    return made


def to(effects: list[RouterEffect], kind: type = Dispatch) -> list[tuple[str, Any]]:
    return [(e.worker_id, e.message) for e in effects if isinstance(e, ToWorker) and isinstance(e.message, kind)]


def ends(effects: list[RouterEffect]) -> list[tuple[str, str | None]]:
    return [(e.request_id, e.code) for e in effects if isinstance(e, Ended)]


def tokens(position: int, *ids: int, attempt: int = 1, choice: int = 0, finish: bool = False, rid: str = "r") -> Tokens:
    return Tokens(
        request_id=rid,
        attempt=attempt,
        choice=choice,
        position=position,
        token_ids=ids,
        finish_reason=FinishReason.LENGTH if finish else None,
        path="decode-only" if position == 0 else None,
    )


def say(d: Dispatcher, *entries: Entry, worker: str = "d1", now: float = 1.0) -> list[RouterEffect]:
    return d.on_entries(now, worker, entries)


def test_a_request_goes_to_the_decode_worker_with_its_sources() -> None:
    d = dispatcher("d1", "p1", "p2")
    ((worker, dispatch),) = to(d.on_submit(1.0, submit()))
    assert worker == "d1" and (dispatch.incarnation, dispatch.epoch, dispatch.attempt) == ("d1" * 8, 1, 1)
    assert sorted(source.worker_id for source in dispatch.sources) == ["p1", "p2"]
    assert dispatch.remaining_ms == 99_000 and dispatch.choices[0].outputs == b""


@pytest.mark.parametrize(
    "changes",
    [{"state": "draining"}, {"state": "starting"}, {"identity": "other"}, {"kv_fingerprint": "other"}],
    ids=str,
)
def test_a_source_that_cannot_serve_is_not_named(changes: dict[str, Any]) -> None:
    d = dispatcher("d1")
    d.on_worker_up(0.0, info("p1", **changes))
    ((_, dispatch),) = to(d.on_submit(1.0, submit()))
    assert dispatch.sources == () and d.counters["no_prefill_worker"] == 1


def test_a_worker_that_is_not_ready_gets_nothing() -> None:
    d = dispatcher()
    d.on_worker_up(0.0, info("d1", state="draining"))
    assert to(d.on_submit(1.0, submit())) == []
    ((worker, _),) = to(d.on_heartbeat(1.5, Heartbeat(info=info("d1", epoch=2))))
    assert worker == "d1"


def test_workers_of_another_identity_are_left_out() -> None:
    d = dispatcher("d1")
    d.on_worker_up(0.0, info("d0", identity="other"))
    assert {to(d.on_submit(1.0, submit(f"r{i}")))[0][0] for i in range(4)} == {"d1"}


def test_tokens_are_delivered_once_and_in_order_and_the_last_choice_ends_it() -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit(choices=2))
    effects = say(d, tokens(0, 5), tokens(0, 7, 8, choice=1))
    assert [e.tokens.token_ids for e in effects if isinstance(e, Deliver)] == [(5,), (7, 8)]
    assert say(d, tokens(0, 5)) == [] and d.counters["duplicate_tokens"] == 1
    assert ends(say(d, tokens(1, 6, finish=True))) == []
    assert ends(say(d, tokens(2, 9, choice=1, finish=True))) == [("r", None)]
    assert d.status().num_running == 0 and d.next_timer() is not None  # the worker's silence


@pytest.mark.parametrize(
    "entry",
    [tokens(1, 6), tokens(3, 6), tokens(0, 6, choice=1)],
    ids=["skipped one", "skipped more", "unknown choice"],
)
def test_a_gap_is_a_failure_never_a_hole(entry: Tokens) -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit())
    effects = say(d, entry)
    assert ends(effects) == [("r", "internal_error")] and to(effects, AbortRequest)
    assert not [e for e in effects if isinstance(e, Deliver)]


def test_tokens_that_overlap_what_is_known_are_a_failure() -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit())
    say(d, tokens(0, 5))
    assert ends(say(d, tokens(0, 5, 6))) == [("r", "internal_error")]


def test_entries_of_another_attempt_or_worker_are_dropped() -> None:
    d = dispatcher("d1", "d2")
    ((worker, _),) = to(d.on_submit(0.0, submit()))
    other = {"d1": "d2", "d2": "d1"}[worker]
    assert say(d, tokens(0, 5, attempt=2), worker=worker) == []
    assert say(d, tokens(0, 5), Failed(request_id="r", attempt=1, code="busy"), worker=other) == []
    assert say(d, tokens(0, 5, rid="unknown"), worker=worker) == []
    assert d.counters["stale_entries"] == 4


def test_news_are_passed_on() -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit())
    effects = say(d, News(request_id="r", attempt=1, stage="prefilling"))
    assert effects == [Progress(request_id="r", stage="prefilling", worker_id="d1")]


@pytest.mark.parametrize(
    ("code", "ended"), [("kv_capacity_exceeded", "kv_capacity_exceeded"), ("odd", "internal_error")]
)
def test_a_failure_at_the_worker_ends_the_request(code: str, ended: str) -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit())
    assert ends(say(d, Failed(request_id="r", attempt=1, code=code))) == [("r", ended)]


def test_the_deadline_ends_and_aborts() -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit(deadline=1.5))
    effects = d.on_timer(1.5)
    assert ends(effects) == [("r", "deadline_exceeded")] and to(effects, AbortRequest)[0][1].attempt == 1


def test_a_deadline_that_has_passed_ends_at_once() -> None:
    d = dispatcher("d1")
    effects = d.on_submit(2.0, submit(deadline=2.0))
    assert ends(effects) == [("r", "deadline_exceeded")] and to(effects) == []


def test_a_cancel_aborts_and_says_nothing_more() -> None:
    d = dispatcher("d1")
    d.on_submit(0.0, submit())
    effects = d.on_cancel(0.5, "r")
    assert to(effects, AbortRequest) and ends(effects) == []
    assert say(d, tokens(0, 5, finish=True)) == [] and d.on_cancel(0.6, "r") == []


def test_requests_wait_in_order_while_every_decode_worker_is_full() -> None:
    d = dispatcher("d1", "p1")
    placed = [len(to(d.on_submit(0.0, submit(f"r{i}")))) for i in range(11)]
    assert placed == [1] * 8 + [0] * 3, "a batch of 4, and 4 whose prompts are computed meanwhile"
    ((_, dispatch),) = to(say(d, tokens(0, 5, finish=True, rid="r3")))
    assert dispatch.request_id == "r8"
    ((_, dispatch),) = to(d.on_cancel(1.0, "r0"))
    assert dispatch.request_id == "r9"


def test_where_nobody_prefills_for_others_requests_wait_for_a_row_where_they_can_still_go_elsewhere() -> None:
    d = dispatcher("d1")
    placed = [len(to(d.on_submit(0.0, submit(f"r{i}")))) for i in range(6)]
    assert placed == [1] * 4 + [0] * 2
    ((_, dispatch),) = to(say(d, tokens(0, 5, finish=True, rid="r3")))
    assert dispatch.request_id == "r4"
    assert [worker for worker, _ in to(d.on_worker_up(1.0, info("d2")))] == ["d2"]


def test_what_others_run_there_counts_too() -> None:
    d = dispatcher("d1", "p1")
    d.on_submit(0.0, submit("mine"))
    d.on_heartbeat(0.5, Heartbeat(info=info("d1"), load=Load(num_running=4, num_waiting=2, num_pulling=2)))
    assert to(d.on_submit(0.6, submit("next"))) == []
    ((_, dispatch),) = to(d.on_heartbeat(1.0, Heartbeat(info=info("d1"), load=Load(num_running=4))))
    assert dispatch.request_id == "next"


def test_a_full_queue_is_overloaded() -> None:
    d = dispatcher(max_waiting=2)
    results = [ends(d.on_submit(0.0, submit(f"r{i}"))) for i in range(3)]
    assert results == [[], [], [("r2", "overloaded")]]


def test_without_a_decode_worker_a_request_waits_a_while() -> None:
    d = dispatcher("p1")
    d.on_submit(0.0, submit())
    assert ends(d.on_timer(9.9)) == []
    assert ends(d.on_timer(10.0)) == [("r", "no_worker")]


def test_a_decode_worker_that_comes_up_gets_what_waits() -> None:
    d = dispatcher()
    d.on_submit(0.0, submit())
    ((worker, _),) = to(d.on_worker_up(3.0, info("d1")))
    assert worker == "d1"


def test_status_and_history_tell_what_happened() -> None:
    d = dispatcher("d1", "p1")
    d.on_submit(0.0, submit())
    status = d.status()
    assert (status.num_running, status.num_waiting) == (1, 0)
    views = {worker.info.worker_id: worker for worker in status.workers}
    assert views["d1"].num_sequences == 1 and views["p1"].queued_tokens == 27
    say(d, tokens(0, 5))
    assert {w.info.worker_id: w.queued_tokens for w in d.status().workers}["p1"] == 0
    say(d, tokens(1, 5, finish=True))
    events = [item.event for item in d.history("r")]
    assert events == ["submitted", "dispatched", "first token, decode-only", "finished"]
    assert d.history("unknown") == ()


def test_only_recent_histories_are_kept() -> None:
    d = dispatcher()
    for i in range(300):
        d.on_submit(0.0, submit(f"r{i}"))
        d.on_cancel(0.0, f"r{i}")
    assert d.history("r0") == () and d.history("r299") != ()


def test_no_link_is_dropped_while_all_is_well() -> None:
    d = dispatcher("d1", "p1")
    now = 0.0
    effects: list[RouterEffect] = []
    for step in range(1, 40):
        now = step * 0.5
        effects += d.on_heartbeat(now, Heartbeat(info=info("d1"), step_count=step))
        effects += d.on_heartbeat(now, Heartbeat(info=info("p1"), step_count=step))
        effects += d.on_timer(now)
    assert not [e for e in effects if isinstance(e, DropLink)]
