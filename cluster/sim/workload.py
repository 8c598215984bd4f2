"""Small clusters and mixed requests, to run on the virtual clock."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from cluster.router.effects import Submit
from cluster.sim.cluster import SimCluster, SimConfig
from cluster.sim.worker_config import SimWorkerConfig
from engine.config import EngineConfig, Role
from engine.fake_engine import FakeConfig, FakeModel
from engine.request import SamplingParams
from engine.scheduler.step_cost import StepCost

BLOCK_SIZE = 16


def fake(
    *,
    num_blocks: int = 256,
    max_num_seqs: int = 8,
    max_num_served: int = 8,
    stop_probability: float = 0.0,
    fixed_ms: float = 1.0,
    ms_per_token: float = 0.05,
    max_step_ms: float = 20.0,
    steps_in_flight: int = 0,
) -> FakeConfig:
    """A small engine. A step takes fixed_ms and ms_per_token, at most max_step_ms."""
    return FakeConfig(
        engine=EngineConfig(
            model="fake",
            max_num_seqs=max_num_seqs,
            max_num_served=max_num_served,
            max_model_len=2048,
            max_step_ms=max_step_ms,
            steps_in_flight=1 if steps_in_flight else 0,
        ),
        model=FakeModel(stop_probability=stop_probability),
        speed=StepCost(fixed_ms=fixed_ms, ms_per_token=ms_per_token),
        num_blocks=num_blocks,
    )


def worker(worker_id: str, engine: FakeConfig, *, host: str = "host-1") -> SimWorkerConfig:
    """A worker named "prefill-..." or "decode-..."; its role is in its name."""
    role: Role = "prefill" if worker_id.startswith("prefill") else "decode"
    engine = replace(engine, engine=replace(engine.engine, role=role))
    return SimWorkerConfig(worker_id=worker_id, role=role, engine=engine, host=host)


def cluster(
    *worker_ids: str, engine: FakeConfig | None = None, seed: int = 0, hosts: dict[str, str] | None = None
) -> SimCluster:
    """Workers of one engine configuration, 50 ms after the last one was ready: links are up."""
    names = worker_ids or ("prefill-1", "decode-1")
    engine = engine or fake()
    workers = tuple(worker(name, engine, host=(hosts or {}).get(name, "host-1")) for name in names)
    made = SimCluster(SimConfig(workers=workers, seed=seed))
    assert made.run_while(lambda: any(w.info.state != "ready" for w in made.workers.values()), limit_s=60)
    made.run_for(0.05)
    return made


def tokens(rng: Random, num: int) -> list[int]:
    """Random token ids of the fake's vocabulary."""
    return rng.choices(range(3, 256), k=num)


def submit(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 16,
    temperature: float = 0.0,
    num_choices: int = 1,
    deadline: float = 1000.0,
    seed: int = 0,
) -> Submit:
    """A request as the HTTP side hands it over."""
    return Submit(
        request_id=request_id,
        prompt=np.array(prompt, dtype="<i4").tobytes(),
        params=SamplingParams(temperature=temperature, max_tokens=max_tokens, n=num_choices),
        seeds=tuple(seed + i for i in range(num_choices)),
        deadline=deadline,
    )


def mixed_requests(rng: Random, num: int) -> list[Submit]:
    """Greedy and sampled, one and two choices, short and long, many with a shared prefix."""
    prefixes = [tokens(rng, 64 * (i + 1)) for i in range(3)]
    requests = []
    for i in range(num):
        prefix = rng.choice(prefixes) if rng.random() < 0.5 else []
        prompt = prefix + tokens(rng, rng.choice((1, 7, 16, 33, 120, 400)))
        requests.append(
            submit(
                f"request-{i}",
                prompt,
                max_tokens=rng.choice((1, 5, 24, 60)),
                temperature=rng.choice((0.0, 0.8)),
                num_choices=rng.choice((1, 1, 1, 2)),
                seed=rng.getrandbits(32),
            )
        )
    return requests
