"""The dispatcher: prompt logprobs (no source is named, each position is believed once), and priorities in the line."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.router.dispatch import Dispatcher
from cluster.router.effects import DeliverScores, Ended, RouterEffect, Submit, ToWorker
from cluster.router.policies import POLICY_NAMES, policy_named
from cluster.types import Dispatch, PromptScores, Tokens, WorkerInfo
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs


def info(worker_id: str, max_num_seqs: int = 4) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=worker_id * 8,
        epoch=1,
        role="prefill" if worker_id.startswith("p") else "decode",
        state="ready",
        address=f"{worker_id}:1",
        identity="model",
        kv_fingerprint="layout",
        max_num_seqs=max_num_seqs,
    )


def dispatcher(*infos: WorkerInfo, policy: str = "least-loaded") -> Dispatcher:
    made = Dispatcher(policy_named(policy), Random(1))
    for one in infos:
        made.on_worker_up(0.0, one)
    return made


def submit(request_id: str = "r", **changes: Any) -> Submit:
    made = Submit(
        request_id=request_id,
        prompt=np.arange(3, 30, dtype="<i4").tobytes(),
        params=SamplingParams(max_tokens=8, prompt_logprobs=0),
        seeds=(1,),
        deadline=100.0,
    )
    return replace(made, **changes)


def dispatches(effects: list[RouterEffect]) -> list[Dispatch]:
    return [e.message for e in effects if isinstance(e, ToWorker) and isinstance(e.message, Dispatch)]


def scores(first: int, count: int, attempt: int = 1) -> PromptScores:
    one = TokenLogprobs(logprob=-1.0, top_ids=(), top_logprobs=())
    return PromptScores(request_id="r", attempt=attempt, first_position=first, logprobs=(one,) * count)


def delivered(effects: list[RouterEffect]) -> list[tuple[int, int]]:
    return [(e.scores.first_position, len(e.scores.logprobs)) for e in effects if isinstance(e, DeliverScores)]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_decode_worker_gets_no_source_for_a_prompt_whose_logits_are_wanted(policy: str) -> None:
    d = dispatcher(info("d1"), info("p1"), policy=policy)
    (sent,) = dispatches(d.on_submit(1.0, submit(priority=-2)))
    assert sent.sources == () and sent.params.prompt_logprobs == 0 and sent.priority == -2


def test_each_position_is_delivered_once_whatever_the_attempts() -> None:
    d = dispatcher(info("d1"), info("d2"))
    (sent,) = dispatches(d.on_submit(1.0, submit()))
    (worker,) = [one for one in ("d1", "d2") if sent.incarnation == one * 8]
    other = "d2" if worker == "d1" else "d1"
    assert delivered(d.on_entries(1.0, worker, (scores(1, 10), scores(11, 6)))) == [(1, 10), (11, 6)]
    d.on_worker_down(1.2, worker)
    d.on_timer(1.5)
    assert delivered(d.on_entries(1.6, worker, (scores(17, 10),))) == [], "a stale attempt"
    again = (scores(1, 10, attempt=2), scores(11, 16, attempt=2))
    assert delivered(d.on_entries(1.7, other, again)) == [(17, 10)]


def test_missing_positions_end_the_request() -> None:
    d = dispatcher(info("d1"))
    d.on_submit(1.0, submit())
    effects = d.on_entries(1.0, "d1", (scores(2, 3),))
    assert [(e.request_id, e.code) for e in effects if isinstance(e, Ended)] == [("r", "internal_error")]
    assert d.counters["gaps"] == 1


def test_whoever_waits_is_placed_by_priority() -> None:
    d = dispatcher(info("d1", max_num_seqs=4))
    plain = SamplingParams(max_tokens=8)
    for index in range(4):
        assert dispatches(d.on_submit(1.0, submit(f"first-{index}", params=plain)))
    for name, priority in (("low", 5), ("high", -1), ("middle", 0)):
        assert not dispatches(d.on_submit(1.0, submit(name, params=plain, priority=priority)))
    placed = []
    for index in range(3):
        end = Tokens(
            request_id=f"first-{index}",
            attempt=1,
            choice=0,
            position=0,
            token_ids=(5,),
            finish_reason=FinishReason.LENGTH,
            path="decode-only",
        )
        placed += [one.request_id for one in dispatches(d.on_entries(2.0, "d1", (end,)))]
    assert placed == ["high", "middle", "low"]
