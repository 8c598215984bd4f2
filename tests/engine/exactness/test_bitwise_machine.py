"""Any order of requests, aborts and step sizes over the whole engine: every logit is the bits of the request alone.

Prompts share prefixes (prefix hits), the pool is small (preemption), lengths cross the key tile of 512. A step that is
recomputed after a preemption is compared with the first time by the harness.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from engine.request import SamplingParams
from engine.scheduler.batch import IntArray
from engine.scheduler.step_cost import StepCost
from tests.engine.exactness import harness
from tests.engine.exactness.harness import Cores, Outcome

SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 6, "num_hidden_layers": 2}
DENSE = {**SHAPE, "head_dim": 64}
MOE = {**SHAPE, "model_type": "ernie4_5_moe", "head_dim": 32, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {  # dtype, checkpoint, own kernels (on two threads) or torch's
    "dense-float32": ("float32", DENSE, True),
    "moe-bfloat16": ("bfloat16", MOE, True),
    "moe-bfloat16-torch": ("bfloat16", MOE, False),
}
BASES = harness.prompts(11, (600, 600))
PREFIXES = (0, 16, 40, 250, 505, 560)
MAX_TOKENS = 40
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=40, max_tokens=12, ignore_eos=True, frequency_penalty=0.5),
)


@cache
def cores_of(model: str) -> Cores:
    dtype, checkpoint, own = MODELS[model]
    kernels = harness.own_kernels() if own else None
    with tempfile.TemporaryDirectory() as folder:
        built = harness.build(Path(folder), dtype=dtype, checkpoint=checkpoint, kernels=kernels, kv_cache_bytes=8 << 20)
    return Cores(built)


@cache
def oracle_of(model: str, prompt: bytes, params_index: int, seed: int) -> Outcome:
    return cores_of(model).alone(np.frombuffer(prompt, dtype=np.int32), PARAMS[params_index], seed)


class BitwiseMachine(RuleBasedStateMachine):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.oracles: dict[str, Outcome] = {}
        self.aborted: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}

    @initialize(
        num_blocks=st.sampled_from([8, 12, 45, 120]),
        steps_in_flight=st.sampled_from([0, 1]),
        num_seqs=st.integers(3, 6),
        enable_prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, steps_in_flight: int, num_seqs: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.core = cores_of(self.model).core(
            num_blocks=num_blocks,
            steps_in_flight=steps_in_flight,
            max_num_seqs=num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            max_batched_tokens=600,
        )

    @rule(
        base=st.sampled_from(range(len(BASES))),
        prefix=st.sampled_from(PREFIXES),
        tail=st.sampled_from([1, 15, 16, 30]),
        params_index=st.sampled_from(range(len(PARAMS))),
    )
    def add(self, base: int, prefix: int, tail: int, params_index: int) -> None:
        if (prefix + tail + MAX_TOKENS) // 16 + 2 > self.num_blocks:
            prefix = 16  # the whole prompt would never fit
        # The tail differs from every base, and is the same for the same draw: oracles are used again.
        prompt: IntArray = np.concatenate([BASES[base][:prefix], harness.prompts(prefix + tail, (tail,))[0]])
        request_id = str(len(self.oracles))
        self.oracles[request_id] = oracle_of(self.model, prompt.tobytes(), params_index, tail)
        self.core.submit(harness.add(request_id, prompt, PARAMS[params_index], seed=tail))

    @precondition(lambda self: self.oracles)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.oracles)))
        self.aborted.add(request_id)
        self.core.submit(harness.abort(request_id))

    @rule(tokens_per_step=st.sampled_from([16, 33, 100, 256, 600]))
    def cut_prompts_into(self, tokens_per_step: int) -> None:
        cost = StepCost(fixed_ms=0.0, ms_per_token=500.0 / tokens_per_step)
        self.core.scheduler.step_cost = cost

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            harness.take(self.core, self.outcomes)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        harness.drain(self.core, self.outcomes)
        assert self.core.load().num_referenced_blocks == 0
        for request_id, oracle in self.oracles.items():
            outcome = self.outcomes.get(request_id, Outcome())
            if request_id not in self.aborted:
                assert outcome.finished and outcome.tokens == oracle.tokens
            for position, logits in outcome.logits.items():
                # A step in flight may overshoot the end by one.
                if position < len(oracle.tokens):
                    assert np.array_equal(logits, oracle.logits[position]), f"{request_id}, output {position}"


def run(model: str, max_examples: int, num_steps: int, *, derandomize: bool = False) -> None:
    run_state_machine_as_test(
        lambda: BitwiseMachine(model),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
def test_logits_do_not_depend_on_what_else_happens(model: str) -> None:
    run(model, max_examples=10, num_steps=12, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_logits_do_not_depend_on_what_else_happens_long(model: str) -> None:
    run(model, max_examples=300, num_steps=30)
