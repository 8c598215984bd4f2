"""The exact fake: its text is the oracle's, and any KV that is not what it should be changes it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import FakeConfig, FakeModel, FakeRunner, build_fake_engine
from engine.kv.memory import KVMemory
from engine.messages import Add, NewTokens
from engine.request import FinishReason, SamplingParams
from engine.scheduler.step_cost import StepCost

PROMPT = [3 + i * 7 % 250 for i in range(70)]


def config(
    model: FakeModel | None = None,
    *,
    block_size: int = 16,
    num_layers: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 8,
) -> FakeConfig:
    engine = EngineConfig(model="fake", max_model_len=256, block_size=block_size, max_batched_tokens=48)
    return FakeConfig(
        engine=engine,
        model=model or FakeModel(),
        num_blocks=32,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def submit(core: EngineCore, params: SamplingParams, seed: int = 5, choice: int = 0) -> None:
    prompt = np.array(PROMPT, dtype="<i4").tobytes()
    core.submit(Add(request_id="a", prompt=prompt, params=params, seed=seed, choice=choice))


def finish(core: EngineCore) -> list[NewTokens]:
    messages: list[NewTokens] = []
    while core.has_work:
        events = core.step()
        assert events is not None
        messages += events.tokens
    return messages


def text(messages: list[NewTokens]) -> list[int]:
    return [token for message in messages for token in message.token_ids]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "shape", [{}, {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16}, {"block_size": 32, "head_dim": 24}]
)
def test_the_text_is_the_oracles_whatever_the_layout(temperature: float, shape: dict[str, int]) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=30)
    made = config(None, **shape)
    core = build_fake_engine(made)
    submit(core, params)
    words = made.layout.token_bytes // 8
    assert text(finish(core)) == made.model.oracle(PROMPT, params, seed=5, token_words=words)


def test_block_size_does_not_matter() -> None:
    params = SamplingParams(max_tokens=30)
    texts = []
    for block_size in (16, 64):
        core = build_fake_engine(config(block_size=block_size))
        submit(core, params)
        texts.append(text(finish(core)))
    assert texts[0] == texts[1]


def test_seed_and_choice_matter_only_when_sampling() -> None:
    model = FakeModel()
    sampled = SamplingParams(temperature=1.0, max_tokens=20)
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    assert len({tuple(model.oracle(PROMPT, sampled, seed=s, choice=c)) for s in (1, 2) for c in (0, 1)}) == 4
    assert model.oracle(PROMPT, greedy, seed=1) == model.oracle(PROMPT, greedy, seed=2, choice=1)


@pytest.mark.parametrize("kind", ["lost", "flipped bit", "swapped", "stale block"])
def test_any_wrong_kv_changes_the_text(kind: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    core = build_fake_engine(config())
    submit(core, params)
    for _ in range(4):
        core.step()
    kv = core.runner.memory.bytes6  # type: ignore[attr-defined]
    if kind == "lost":
        kv[2] = 0
    elif kind == "flipped bit":
        kv[2, 0, 1, 0, 5, 7] ^= 1
    elif kind == "swapped":
        kv[[1, 2]] = kv[[2, 1]]
    else:
        kv[2] = kv[1]
    want = FakeModel().oracle(PROMPT, params)
    assert text(finish(core)) != want[-len(want) :]


def test_min_tokens_holds_stops_back_and_stops_end_the_text() -> None:
    model = FakeModel(stop_probability=0.3)
    for seed in range(20):
        params = SamplingParams(max_tokens=40, min_tokens=6)
        core = build_fake_engine(config(model))
        submit(core, params, seed)
        messages = finish(core)
        assert text(messages) == model.oracle(PROMPT, params, seed=seed)
        is_stop = messages[-1].finish_reason is FinishReason.STOP
        assert is_stop == (text(messages)[-1] == model.eos_token_id) and len(text(messages)) > 6


def test_ignored_eos_goes_on() -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    core = build_fake_engine(config(FakeModel(stop_probability=0.5)))
    submit(core, params)
    messages = finish(core)
    assert len(text(messages)) == 40 and text(messages).count(2) > 5


def test_stop_token_ids_end_the_text_after_min_tokens() -> None:
    model = FakeModel(vocabulary=(5, 6, 7))
    params = SamplingParams(max_tokens=40, min_tokens=10, stop_token_ids=(6,))
    core = build_fake_engine(config(model))
    submit(core, params)
    messages = finish(core)
    assert text(messages) == model.oracle(PROMPT, params, seed=5)
    assert messages[-1].stop_token == 6 and text(messages).index(6) == len(text(messages)) - 1 >= 10


def test_logprobs_are_given_when_asked() -> None:
    core = build_fake_engine(config())
    submit(core, SamplingParams(max_tokens=3, logprobs=2))
    for message in finish(core):
        (logprob,) = message.logprobs
        assert logprob.top_ids[0] == message.token_ids[0] and len(logprob.top_ids) == 2
        assert logprob.logprob == logprob.top_logprobs[0] > logprob.top_logprobs[1]


def test_a_shared_memory_pool_serves_as_well() -> None:
    made = config()
    memory = KVMemory.create(made.layout)
    core = build_fake_engine(made, memory=memory)
    params = SamplingParams(max_tokens=10)
    submit(core, params)
    assert text(finish(core)) == made.model.oracle(PROMPT, params, seed=5)


def test_a_step_takes_the_settable_time() -> None:
    slept: list[float] = []
    speed = StepCost(fixed_ms=10.0, ms_per_token=1.0)
    engine = EngineConfig(model="fake", max_model_len=256, max_batched_tokens=48)
    core = build_fake_engine(FakeConfig(engine=engine, num_blocks=32, speed=speed), sleep=slept.append)
    submit(core, SamplingParams(max_tokens=2))
    core.step()
    assert core.last_step_cost_s == pytest.approx(0.058)
    finish(core)
    assert slept == pytest.approx([0.058, 0.032, 0.011])


def test_wrong_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="the config says"):
        build_fake_engine(config(), memory=KVMemory.create(config(head_dim=16).layout))
    with pytest.raises(ValueError, match="multiple of 8"):
        build_fake_engine(config(head_dim=4))
    with pytest.raises(ValueError, match="must not hold eos"):
        FakeModel(vocabulary=range(9))


def test_checksums_are_over_the_bytes_a_receiver_reads() -> None:
    core = build_fake_engine(config())
    submit(core, SamplingParams(max_tokens=2))
    finish(core)
    runner = core.runner
    assert isinstance(runner, FakeRunner)
    one, two = runner.checksum_blocks(np.array([1, 2], dtype=np.int32))
    assert one != two and runner.checksum_partial(1, 16) == one != runner.checksum_partial(1, 15)
