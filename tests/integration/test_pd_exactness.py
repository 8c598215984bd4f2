"""Prefill and decode on two workers give exactly what one engine gives: tokens, and the logits of the first sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cluster.types import Transport
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine import BuiltEngine, build_engine
from engine.kv.block_manager import BlockManager
from engine.messages import Add
from engine.request import SamplingParams
from engine.runner.model_runner import ModelRunner
from engine.scheduler.batch import ScheduledBatch, StepHandle, StepResult
from engine.scheduler.scheduler import Scheduler
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.integration.pd_pair import PDPair

VOCAB_SIZE = 320
NUM_PROMPTS = 200
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=12, ignore_eos=True)
Logits = npt.NDArray[np.float32]


class FirstLogits:
    """A Runner that keeps the logits from which each request's first token was sampled."""

    def __init__(self, inner: ModelRunner) -> None:
        self._inner = inner
        self.checksum_algorithm = inner.checksum_algorithm
        self.checksum_blocks = inner.checksum_blocks
        self.checksum_partial = inner.checksum_partial
        self.by_prompt: dict[bytes, Logits] = {}
        self._rows: dict[int, bytes] = {}

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        for start in batch.starts:
            self._rows[start.row] = start.token_ids[: start.num_prompt_tokens].tobytes()
        self._batch, self._handle = batch, self._inner.launch(batch)
        return self

    def wait(self) -> StepResult:
        result = self._handle.wait()
        if result.logits is not None:
            sampled = np.flatnonzero(self._batch.samples).tolist()
            for logits, index in zip(result.logits, sampled, strict=True):
                self.by_prompt.setdefault(self._rows[int(self._batch.rows[index])], logits)
        return result


def fresh_core(built: BuiltEngine, config: EngineConfig) -> tuple[EngineCore, FirstLogits]:
    """An empty scheduler and block manager over a built engine."""
    runner = FirstLogits(built.runner)
    blocks = BlockManager(num_blocks=built.layout.num_blocks, block_size=built.layout.block_size)
    limits = built.core.scheduler.limits
    scheduler = Scheduler(config, limits=limits, blocks=blocks, step_cost=built.core.step_cost)
    return EngineCore(scheduler=scheduler, runner=runner), runner


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BuiltEngine]]:
    path: Path = make_random_checkpoint(
        tmp_path_factory.mktemp("model"), model_type="ernie4_5_moe", dtype=request.param, vocab_size=VOCAB_SIZE
    )
    config = EngineConfig(model=str(path), device="cpu", max_model_len=1024, kv_cache_bytes=64 << 20)
    before = torch.get_num_threads()
    built = [build_engine(config, capture_logits=True) for _ in range(3)]
    yield built
    torch.set_num_threads(before)
    for engine in built:
        assert engine.memory is not None
        engine.memory.close()


def prompts() -> list[bytes]:
    """Lengths around block boundaries and up to several chunks; some share prefixes."""
    random = np.random.default_rng(7)
    base = random.integers(3, VOCAB_SIZE, 400, dtype=np.int32)
    lengths = [1, 2, 15, 16, 17, 18, 32, 33, 48, 49, *random.integers(3, 300, NUM_PROMPTS - 10).tolist()]
    made = []
    for i, length in enumerate(lengths):
        own = random.integers(3, VOCAB_SIZE, length, dtype=np.int32)
        made.append(np.concatenate([base[: (i % 5) * 16], own])[-700:].astype("<i4").tobytes())
    return made


def params(i: int) -> SamplingParams:
    return SAMPLED if i % 2 else GREEDY


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_two_workers_give_what_one_engine_gives(engines: list[BuiltEngine], transport: Transport) -> None:
    config = EngineConfig(model="", max_model_len=1024, max_batched_tokens=128)
    single, single_logits = fresh_core(engines[0], config)
    prefill, _ = fresh_core(engines[1], config)
    decode, decode_logits = fresh_core(engines[2], config)
    pair = PDPair(engines[1], engines[2], (prefill, decode), transport)
    expected: dict[str, list[int]] = {}
    for first in range(0, NUM_PROMPTS, 16):
        batch = list(enumerate(prompts()))[first : first + 16]
        for i, prompt in batch:
            single.submit(Add(request_id=str(i), prompt=prompt, params=params(i), seed=i))
            pair.submit(str(i), prompt, params(i), seed=i)
        while single.has_work:
            events = single.step()
            for news in events.tokens if events else ():
                expected.setdefault(news.request_id, []).extend(news.token_ids)
        pair.run()
    pair.close()
    assert pair.failures == []
    assert pair.tokens == expected
    assert len(expected) == NUM_PROMPTS
    # short prompts and prefix hits leave nothing worth fetching; the rest must really have come from the other worker
    assert sum(path == "prefill-decode" for path in pair.paths.values()) > NUM_PROMPTS // 2
    assert single_logits.by_prompt.keys() == decode_logits.by_prompt.keys()
    for prompt, logits in single_logits.by_prompt.items():
        assert np.array_equal(logits, decode_logits.by_prompt[prompt])
    assert prefill.load().num_referenced_blocks == decode.load().num_referenced_blocks == 0
