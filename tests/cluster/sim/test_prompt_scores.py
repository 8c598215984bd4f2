"""Prompt logprobs and priorities under random faults: each position once, from the right KV, before the first token."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from msgspec import structs

from cluster.sim.cluster import SimCluster
from cluster.sim.workload import mixed_requests
from engine.fake_engine import FakeModel
from tests.cluster.sim.test_random_faults import SETTLE_S, add_bad_luck, add_disasters, build

NUM_REQUESTS = 24


def run(seed: int) -> SimCluster:
    """A random history in which most prompts are to be scored."""
    rng = Random(seed)
    sim = build(rng, seed)
    for request in mixed_requests(rng, NUM_REQUESTS):
        num_top = rng.choice((None, 0, 2))
        params = replace(request.params, prompt_logprobs=num_top)
        sim.submit(
            structs.replace(request, params=params, priority=rng.choice((0, 0, -1, 4))), at=0.05 + rng.random() * 0.6
        )
    add_bad_luck(sim, rng)
    add_disasters(sim, rng)
    assert sim.drain(limit_s=300), [name for name, result in sim.results.items() if result.live]
    sim.run_for(SETTLE_S)
    return sim


def check(sim: SimCluster) -> int:
    """Returns how many scored answers were complete."""
    num_complete = 0
    for name, result in sim.results.items():
        prompt = np.frombuffer(result.submit.prompt, dtype="<i4").tolist()
        expected = FakeModel().prompt_oracle(prompt) if result.submit.params.prompt_logprobs is not None else []
        assert result.scores == expected[: len(result.scores)], name
        if result.outputs:
            assert len(result.scores) == len(expected), f"{name}: tokens before its prompt's logprobs"
        if expected and result.code is None:
            assert set(result.paths) == {"decode-only"} and result.outputs == sim.oracle(result.submit), name
            num_complete += 1
    assert sim.leaks() == []
    return num_complete


@pytest.mark.parametrize("seed", range(6))
def test_prompt_logprobs_survive_random_faults(seed: int) -> None:
    assert check(run(seed)) > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_prompt_logprobs_survive_many_random_faults() -> None:
    assert sum(check(run(seed)) for seed in range(2000, 2500)) > 2000
