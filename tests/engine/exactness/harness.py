"""Runs requests through the real scheduler and runner and keeps every sampled row's logits by request and position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine import BuiltEngine, build_engine
from engine.kernels.cpu.library import CpuKernels
from engine.kv.block_manager import BlockManager
from engine.kv.kv_cache import KVCache
from engine.layers.options import LayerOptions
from engine.messages import Abort, Add
from engine.request import SamplingParams
from engine.runner.model_runner import LaunchedStep, ModelRunner
from engine.scheduler.batch import IntArray, ScheduledBatch, StepResult
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_cost import StepCost
from engine.tiny.random_checkpoint import make_random_checkpoint

Logits = npt.NDArray[np.float32]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
FREE = StepCost(fixed_ms=0.0, ms_per_token=0.0)  # only max_batched_tokens bounds a step


@dataclass(kw_only=True)
class Outcome:
    """What came of a request: its tokens, and the logits each was chosen from, by number of the output."""

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, Logits] = field(default_factory=dict)
    finished: bool = False


class RecordingRunner:
    """A Runner that keeps logits. A step recomputed after a preemption must give the same bits again."""

    def __init__(self, inner: ModelRunner) -> None:
        self._inner = inner
        self._requests: dict[int, tuple[str, int]] = {}
        self.checksum_algorithm = inner.checksum_algorithm
        self.checksum_blocks = inner.checksum_blocks
        self.checksum_partial = inner.checksum_partial
        self.logits: dict[tuple[str, int], Logits] = {}

    def launch(self, batch: ScheduledBatch) -> RecordingStep:
        for start in batch.starts:
            self._requests[start.row] = (start.request_id, start.num_prompt_tokens)
        requests = [self._requests[row] for row in batch.rows.tolist()]
        return RecordingStep(self, self._inner.launch(batch), batch, requests)

    def keep(self, batch: ScheduledBatch, requests: list[tuple[str, int]], result: StepResult) -> None:
        if result.logits is None:
            assert not batch.samples.any()
            return
        for logits, index in zip(result.logits, np.flatnonzero(batch.samples).tolist(), strict=True):
            request_id, num_prompt_tokens = requests[index]
            position = int(batch.num_computed[index] + batch.query_lens[index]) - num_prompt_tokens
            earlier = self.logits.setdefault((request_id, position), logits)
            assert np.array_equal(earlier, logits), f"{request_id} changed at output {position}"


@dataclass
class RecordingStep:
    runner: RecordingRunner
    step: LaunchedStep
    batch: ScheduledBatch
    requests: list[tuple[str, int]]

    def wait(self) -> StepResult:
        result = self.step.wait()
        self.runner.keep(self.batch, self.requests, result)
        return result


def build(
    path: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    kernels: CpuKernels | None = None,
    row_multiple: int = 16,
    key_multiple: int = 512,
    checkpoint: Mapping[str, Any] | None = None,
    **engine: Any,
) -> BuiltEngine:
    """A random model in a warm engine that captures logits: with `kernels`, or torch's on one thread."""
    make_random_checkpoint(path, seed=seed, **(checkpoint or {}))
    options = LayerOptions(
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        kernels=kernels,
        row_multiple=row_multiple,
        key_multiple=key_multiple,
    )
    settings: dict[str, Any] = {"max_model_len": 1024, "kv_cache_bytes": 16 << 20, **engine}
    config = EngineConfig(model=str(path), dtype=dtype, device="cpu", **settings)  # type: ignore[arg-type]
    return build_engine(config, capture_logits=True, options=options)


def own_kernels(threads: int = 2) -> CpuKernels:
    """This machine's kernels, from the user's cache as the product keeps them."""
    return CpuKernels.load(Path.home() / ".cache" / "neap", threads)


class Cores:
    """Fresh schedulers over one built engine: its KV memory stays as earlier runs left it.

    Oracles run on rows and KV of their own, so they may be asked for while a core is at work.
    """

    def __init__(self, built: BuiltEngine) -> None:
        self.built = built
        runner = built.runner
        self._oracle_runner = ModelRunner(
            runner.model,
            KVCache.on_device(built.layout, torch.device("cpu")),
            num_rows=1,
            max_model_len=built.max_model_len,
            capture_logits=True,
        )

    def core(
        self,
        *,
        num_blocks: int | None = None,
        cost: StepCost = FREE,
        runner: ModelRunner | None = None,
        **settings: Any,
    ) -> EngineCore:
        """An empty pool of `num_blocks` over the same runner; `settings` are EngineConfig's."""
        limits = self.built.core.scheduler.limits
        config = EngineConfig(model="", **{"max_model_len": limits.max_model_len, **settings})
        layout = self.built.layout
        blocks = BlockManager(
            num_blocks=num_blocks or layout.num_blocks,
            block_size=layout.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        scheduler = Scheduler(config, limits=limits, blocks=blocks, step_cost=cost)
        recording = RecordingRunner(runner or self.built.runner)
        return EngineCore(scheduler=scheduler, runner=recording, steps_in_flight=config.steps_in_flight)

    def alone(self, prompt: IntArray, params: SamplingParams = GREEDY, seed: int = 0) -> Outcome:
        """The oracle: one request in an empty pool, its prompt in one chunk."""
        core = self.core(runner=self._oracle_runner, enable_prefix_caching=False, max_batched_tokens=4096)
        core.submit(add("alone", prompt, params, seed))
        return drain(core)["alone"]


def add(request_id: str, prompt: IntArray, params: SamplingParams = GREEDY, seed: int = 0) -> Add:
    return Add(request_id=request_id, prompt=prompt.astype("<i4").tobytes(), params=params, seed=seed)


def abort(request_id: str) -> Abort:
    return Abort(request_id=request_id)


def take(core: EngineCore, outcomes: dict[str, Outcome]) -> None:
    """One step; file what it produced."""
    events = core.step()
    for news in events.tokens if events else ():
        outcome = outcomes.setdefault(news.request_id, Outcome())
        outcome.tokens += news.token_ids
        outcome.finished = news.finish_reason is not None
    runner = core.runner
    assert isinstance(runner, RecordingRunner)
    for (request_id, position), logits in runner.logits.items():
        outcomes.setdefault(request_id, Outcome()).logits[position] = logits


def drain(core: EngineCore, outcomes: dict[str, Outcome] | None = None) -> dict[str, Outcome]:
    outcomes = {} if outcomes is None else outcomes
    while core.has_work:
        take(core, outcomes)
    return outcomes


def serve(core: EngineCore, requests: Iterable[Add]) -> dict[str, Outcome]:
    for request in requests:
        core.submit(request)
    return drain(core)


def same(outcome: Outcome, oracle: Outcome) -> bool:
    """Tokens equal, and every logit of every one of them, bit for bit."""
    return outcome.tokens == oracle.tokens and all(
        np.array_equal(outcome.logits[position], oracle.logits[position]) for position in range(len(oracle.tokens))
    )


def prompts(seed: int, lengths: Iterable[int], vocab_size: int = 320) -> list[IntArray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, size=length, dtype=np.int32) for length in lengths]


def with_params(base: SamplingParams, **changes: Any) -> SamplingParams:
    return replace(base, **changes)
