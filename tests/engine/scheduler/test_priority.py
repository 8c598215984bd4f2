"""The order of admission and preemption by priority, its bound, and prompts whose logprobs are wanted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import FakeConfig, FakeModel, build_fake_engine
from engine.messages import Add, NoSpace, PromptLogprobs, Reserve
from engine.request import SamplingParams
from engine.scheduler.prefill import MAX_SCORED_PER_STEP
from engine.scheduler.request_book import MAX_OVERTAKEN
from engine.scheduler.step_cost import StepCost


def build(*, num_blocks: int = 64, num_seqs: int = 1, max_len: int = 512) -> EngineCore:
    engine = EngineConfig(model="fake", max_model_len=max_len, max_num_seqs=num_seqs, max_step_ms=1e6)
    return build_fake_engine(FakeConfig(engine=engine, num_blocks=num_blocks, speed=StepCost()))


def add(name: str, priority: int = 0, *, length: int = 8, limit: int = 1, scored: int | None = None) -> Add:
    # prompts of their own, so that nothing is cached
    prompt = np.random.default_rng(len(name) + ord(name[0])).integers(3, 250, length).astype("<i4")
    params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True, prompt_logprobs=scored)
    return Add(request_id=name, prompt=prompt.tobytes(), params=params, seed=0, priority=priority)


def run(core: EngineCore) -> list[str]:
    """Ids in the order in which they ended."""
    ended = []
    while core.has_work:
        events = core.step()
        ended += [news.request_id for news in events.tokens if news.finish_reason] if events else []
    return ended


def test_lower_priorities_go_first_and_equals_in_order_of_arrival() -> None:
    core = build()
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", 5), ("f", -1)):
        core.submit(add(name, priority))
    assert run(core) == ["c", "f", "a", "d", "b", "e"]


def test_nobody_is_overtaken_more_often_than_the_bound() -> None:
    core = build()
    core.submit(add("first", 0, limit=3))
    core.step()
    core.submit(add("patient", 1))
    ended: list[str] = []
    for index in range(3 * MAX_OVERTAKEN):  # a better one is always waiting
        core.submit(add(f"better-{index}", 0))
        events = core.step()
        ended += [news.request_id for news in events.tokens if news.finish_reason] if events else []
    assert ended.index("patient") == MAX_OVERTAKEN + 1
    ended += run(core)
    assert len(ended) == 3 * MAX_OVERTAKEN + 2


def test_the_worst_is_preempted_first_and_then_the_newest() -> None:
    core = build(num_blocks=1 + 6, num_seqs=3)
    preempted: list[str] = []
    book = core.scheduler._book
    take_seat = book.preempt

    def preempt(request: object) -> None:
        preempted.append(request.request_id)  # type: ignore[attr-defined]
        take_seat(request)  # type: ignore[arg-type]

    book.preempt = preempt  # type: ignore[method-assign]
    # one block each at admission, three blocks each at the end
    for name, priority in (("low", 9), ("old", 0), ("new", 0)):
        core.submit(add(name, priority, length=10, limit=36))
    ended = run(core)
    assert preempted[0] == "low" and set(preempted) <= {"low", "new"}
    assert ended[0] == "old" and ended[-1] == "low"


def test_a_pull_does_not_take_blocks_from_under_a_better_one_that_waits() -> None:
    core = build(num_seqs=2, num_blocks=1 + 8)
    core.submit(add("runs", 0, length=60, limit=30))
    core.step()
    core.submit(add("waits", 0, length=80))
    core.step()
    core.submit(Reserve(add=add("worse", 1, length=16)))
    events = core.step()
    assert events is not None and NoSpace(request_id="worse") in events.replies
    core.submit(Reserve(add=add("equal", 0, length=16)))
    events = core.step()
    assert events is not None and any(getattr(reply, "block_ids", ()) for reply in events.replies)


@pytest.mark.parametrize("cached", [False, True])
def test_prompt_logprobs_come_in_bounded_pieces_before_the_first_token(cached: bool) -> None:
    core = build(num_blocks=200, max_len=2048)
    wanted = add("p", length=2 * MAX_SCORED_PER_STEP + 100, scored=1)
    if cached:
        core.submit(msgspec.structs.replace(wanted, request_id="before", params=SamplingParams(max_tokens=1)))
        run(core)
    core.submit(wanted)
    scores: list[float] = []
    num_pieces = 0
    while core.has_work:
        events = core.step()
        assert events is not None
        for reply in events.replies:
            assert isinstance(reply, PromptLogprobs) and reply.first_position == len(scores) + 1
            assert len(reply.logprobs) <= MAX_SCORED_PER_STEP
            scores += [entry.logprob for entry in reply.logprobs]
            num_pieces += 1
        assert not events.tokens or len(scores) == 2 * MAX_SCORED_PER_STEP + 99
    assert num_pieces == 3
    assert scores == FakeModel().prompt_oracle(np.frombuffer(wanted.prompt, dtype="<i4").tolist())


def test_a_prompt_of_one_token_has_nothing_to_score_and_a_pull_for_logprobs_is_refused() -> None:
    core = build()
    core.submit(add("one", length=1, scored=0))
    assert run(core) == ["one"]
    core.submit(Reserve(add=add("pull", length=40, scored=0)))
    events = core.step()
    assert events is not None and events.replies == (NoSpace(request_id="pull", never=True),)
