"""How long the engine alone takes for a request: the same fake in this process, with no network around it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from cluster.spec import FakeSpec
from cluster.worker.fake import fake_config
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import build_fake_engine
from engine.messages import Add
from engine.request import SamplingParams


def measure_alone(fake: FakeSpec, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[float, float]]:
    """Run prompts one after another: (seconds to the first token, seconds to the last) of each."""
    core = build_fake_engine(fake_config(EngineConfig(model="fake"), fake), sleep=time.sleep)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return [_run(core, str(index), prompt, params) for index, prompt in enumerate(prompts)]


def _run(core: EngineCore, name: str, prompt: Sequence[int], params: SamplingParams) -> tuple[float, float]:
    started = time.perf_counter()
    first = 0.0
    core.submit(Add(request_id=name, prompt=np.asarray(prompt, dtype="<i4").tobytes(), params=params, seed=0))
    while core.has_work:
        events = core.step()
        for tokens in events.tokens if events else ():
            first = first or time.perf_counter() - started
            if tokens.finish_reason is not None:
                return first, time.perf_counter() - started
    raise AssertionError("a request of the fake ends")
