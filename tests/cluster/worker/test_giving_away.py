"""Which requests move and which finish where they are, when a decode worker gives its work away."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from cluster.types import Choice, Dispatch
from cluster.worker.decode_request import DecodeRequest
from cluster.worker.giving_away import MAX_FINISH_MS, MOVE_MS, Fate, fate
from engine.messages import Add, Load
from engine.request import SamplingParams
from engine.scheduler.profile import Profile

PROFILE = Profile(prefill=((1, 1.0),), decode=((1, 10.0), (8, 10.0)), kv_token_bytes=1000)


def request(*, max_tokens: int, num_outputs: int, num_prompt: int = 100, **changes: Any) -> DecodeRequest:
    moved = changes.pop("moved", False)
    prompt = np.arange(3, 3 + num_prompt, dtype="<i4").tobytes()
    params = SamplingParams(max_tokens=max_tokens)
    dispatch = Dispatch(
        request_id="r",
        attempt=1,
        incarnation="i",
        epoch=1,
        prompt=prompt,
        choices=(Choice(index=0, seed=1),),
        params=params,
        remaining_ms=1000,
        moved=moved,
    )
    made = DecodeRequest(
        link_id="l",
        dispatch=dispatch,
        deadline=9.0,
        adds=(Add(request_id="d:1", prompt=prompt, params=params, seed=1),),
        sources=deque(),
        num_outputs=num_outputs,
        running={"d:1": 0},
        answered={0},
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (request(max_tokens=50, num_outputs=48), "finish"),  # 20 ms are less than a move
        (request(max_tokens=50, num_outputs=40), "move"),
        (request(max_tokens=50, num_outputs=40, num_prompt=100_000), "finish"),  # 100 MB are not
        (request(max_tokens=500, num_outputs=40, num_prompt=5_000_000), "move"),  # but a role doesn't wait for ever
        (request(max_tokens=50, num_outputs=0, running={}), "move"),  # it pulls: nothing is invested here
        (request(max_tokens=50, num_outputs=0, moved=True, answered=set()), "wait"),
        (request(max_tokens=50, num_outputs=0, moved=True, answered=set(), running={}), "wait"),
        (request(max_tokens=50, num_outputs=1, moved=True), "move"),  # its first token has come
    ],
)
def test_the_cheaper_of_finishing_and_moving(made: DecodeRequest, expected: Fate) -> None:
    assert fate(made, PROFILE, Load(num_running=4)) == expected


def test_a_slow_worker_moves_what_a_fast_one_finishes() -> None:
    made = request(max_tokens=50, num_outputs=48)
    assert fate(made, PROFILE, Load(num_running=4, decode_scale=3.0)) == "move"
    assert 2 * 10.0 < MOVE_MS < 3 * 2 * 10.0 < MAX_FINISH_MS
