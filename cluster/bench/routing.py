"""`neap bench routing`: policies on the same seeded loads, on the virtual clock: real router, schedulers and transfers.

(a) unequal   two pools of the same shape, one of them slowed by a factor; goodput under targets, and how far the
              predicted milliseconds were off
(b) prefixes  equal workers, conversations that grow and share system prompts; cached tokens and time to first token

The virtual clock makes the figures exact and repeatable: the same seed gives the same numbers on every machine. Steps
take what the exact fake's speed says, up to 10 % more or less. neap bench router measures the real processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from msgspec.structs import replace

from cluster.bench.report import percentile
from cluster.router.effects import Submit
from cluster.router.policies import POLICY_NAMES
from cluster.sim.cluster import SimCluster, SimConfig
from cluster.sim.router import SimResult
from cluster.sim.worker_config import SimWorkerConfig
from engine.config import EngineConfig, Role
from engine.fake_engine import FakeConfig
from engine.request import SamplingParams
from engine.scheduler.step_cost import StepCost

STEP_JITTER = 0.1
LIMIT_S = 600.0  # virtual
_START_S = 0.05  # links are up
_FIRST_TOKEN_ID, _LAST_TOKEN_ID = 3, 255

Timed = tuple[float, Submit]  # seconds from the start


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Scenario (a). Rates are requests per second, times milliseconds; a pool is `pairs` prefill and decode workers."""

    requests: int = 400
    rate: float = 45.0
    pairs: int = 2
    slowdown: float = 3.0
    prompt_tokens: int = 384
    output_tokens: int = 48
    ttft_ms: float = 250.0
    tpot_ms: float = 12.0
    conversations: int = 60
    turns: int = 5
    seed: int = 0


def bench_routing(options: RoutingOptions, policies: Sequence[str] = POLICY_NAMES) -> dict[str, Any]:
    """Both scenarios, every policy."""
    unequal = {policy: run_unequal(options, policy) for policy in policies}
    prefixes = {policy: run_prefixes(options, policy) for policy in policies}
    figures: dict[str, Any] = {
        "clock": "virtual",
        "options": {name: getattr(options, name) for name in RoutingOptions.__dataclass_fields__},
        "unequal": unequal,
        "prefixes": prefixes,
    }
    if {"predicted", "round-robin", "least-loaded"} <= set(policies):
        goodput = {policy: unequal[policy]["goodput_per_s"] for policy in policies}
        figures["ratios"] = {
            "goodput_over_round_robin": _ratio(goodput["predicted"], goodput["round-robin"]),
            "goodput_over_least_loaded": _ratio(goodput["predicted"], goodput["least-loaded"]),
        }
    return figures


def run_unequal(options: RoutingOptions, policy: str) -> dict[str, Any]:
    """Scenario (a) under one policy."""
    workers = [
        worker
        for pool, factor in (("fast", 1.0), ("slow", options.slowdown))
        for number in range(options.pairs)
        for worker in _pair(f"{pool}-{number}", factor)
    ]
    sim = _run(workers, _lognormal_load(options), policy, options.seed)
    figures = _figures(sim, options)
    figures["by_pool"] = _by_pool(sim)
    return figures


def run_prefixes(options: RoutingOptions, policy: str) -> dict[str, Any]:
    """Scenario (b) under one policy: four prefill and four decode workers, all alike."""
    workers = [worker for number in range(4) for worker in _pair(str(number), 1.0)]
    sim = _run(workers, _conversations(options), policy, options.seed)
    figures = _figures(sim, options)
    loads = [worker.core.load() for worker in sim.workers.values()]
    prompt_tokens = sum(len(result.submit.prompt) // 4 for result in sim.results.values())
    cached = sum(decision.cached_tokens or 0 for decision in sim.router.decisions)
    figures["prompt_tokens"] = prompt_tokens
    figures["cache_hit_tokens"] = cached
    figures["cache_hit_share"] = round(cached / prompt_tokens, 4)
    figures["computed_tokens"] = sum(load.prefix_cache_queries - load.prefix_cache_hits for load in loads)
    return figures


# ---- loads


def _lognormal_load(options: RoutingOptions) -> list[Timed]:
    """Poisson arrivals of log-normal lengths, nothing shared."""
    rng = Random(options.seed)
    load: list[Timed] = []
    at = 0.0
    for number in range(options.requests):
        at += rng.expovariate(options.rate)
        prompt = _tokens(rng, _length(rng, options.prompt_tokens, 16, 1600))
        load.append((at, _submit(f"request-{number}", prompt, _length(rng, options.output_tokens, 2, 256))))
    return load


def _conversations(options: RoutingOptions) -> list[Timed]:
    """Conversations under one of four system prompts; each turn brings back all that was said before."""
    rng = Random(options.seed + 1)
    systems = [_tokens(rng, 192) for _ in range(4)]
    load: list[Timed] = []
    for number in range(options.conversations):
        at = rng.random() * options.turns * 0.6
        history = list(rng.choice(systems))
        for turn in range(options.turns):
            history += _tokens(rng, _length(rng, 64, 8, 256))
            load.append((at, _submit(f"chat-{number}-{turn}", list(history), 24)))
            history += _tokens(rng, 24)  # what it was answered: not what the fake says, so this part is never cached
            at += 0.4 + rng.random() * 0.4
    return sorted(load, key=lambda timed: (timed[0], timed[1].request_id))


def _length(rng: Random, mean: int, least: int, most: int) -> int:
    return max(least, min(most, round(mean * rng.lognormvariate(-0.18, 0.6))))


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randint(_FIRST_TOKEN_ID, _LAST_TOKEN_ID) for _ in range(count)]


def _submit(request_id: str, prompt: list[int], max_tokens: int) -> Submit:
    return Submit(
        request_id=request_id,
        prompt=np.array(prompt, dtype="<i4").tobytes(),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        seeds=(0,),
        deadline=LIMIT_S,
    )


# ---- the cluster


def _pair(name: str, factor: float) -> list[SimWorkerConfig]:
    """A prefill and a decode worker that are `factor` times slower than 2 ms a step, 80 us a token."""
    return [_worker(f"{role}-{name}", role, factor) for role in ("prefill", "decode")]


def _worker(worker_id: str, role: Any, factor: float) -> SimWorkerConfig:
    chosen: Role = role
    speed = StepCost(fixed_ms=2.0 * factor, ms_per_token=0.08 * factor, ms_per_token_kilocontext=0.02 * factor)
    engine = EngineConfig(model="fake", role=chosen, max_num_seqs=24, max_model_len=2048, max_step_ms=50.0)
    return SimWorkerConfig(
        worker_id=worker_id,
        role=chosen,
        engine=FakeConfig(engine=engine, speed=speed, num_blocks=2048),
        step_jitter=STEP_JITTER,
    )


def _run(workers: Sequence[SimWorkerConfig], load: Sequence[Timed], policy: str, seed: int) -> SimCluster:
    sim = SimCluster(SimConfig(workers=tuple(workers), seed=seed, policy=policy))
    sim.run_for(_START_S)
    for at, submit in load:
        sim.submit(replace(submit, deadline=_START_S + at + LIMIT_S), at=_START_S + at)
    if not sim.drain(limit_s=LIMIT_S):
        raise RuntimeError(f"requests under {policy} were not over after {LIMIT_S:g} virtual seconds")
    return sim


# ---- figures


def _figures(sim: SimCluster, options: RoutingOptions) -> dict[str, Any]:
    """What clients got, and how good the router's predictions were. Times in ms."""
    results = list(sim.results.values())
    first, each = [], []
    good = 0
    for result in results:
        ttft_ms, tpot_ms = _times(result)
        first.append(ttft_ms)
        each.append(tpot_ms)
        good += ttft_ms <= options.ttft_ms and tpot_ms <= options.tpot_ms
    seconds = max(result.ended_at or 0.0 for result in results) - min(result.submitted_at for result in results)
    decisions = [one for one in sim.router.decisions if one.ttft_ms is not None]
    ttft_errors = [abs(one.predicted.ttft_ms - one.ttft_ms) / one.ttft_ms for one in decisions if one.ttft_ms]
    tpot_errors = [abs(one.predicted.tpot_ms - one.tpot_ms) / one.tpot_ms for one in decisions if one.tpot_ms]
    return {
        "requests": len(results),
        "failures": sum(result.code is not None for result in results),
        "seconds": round(seconds, 3),
        "goodput_per_s": round(good / seconds, 2),
        "goodput_share": round(good / len(results), 4),
        **{f"ttft_p{share}_ms": round(percentile(first, share / 100), 2) for share in (50, 90, 99)},
        **{f"tpot_p{share}_ms": round(percentile(each, share / 100), 2) for share in (50, 90, 99)},
        "ttft_error_p50": round(percentile(ttft_errors, 0.5), 4),
        "tpot_error_p50": round(percentile(tpot_errors, 0.5), 4),
        "decode_only_chosen": sim.router.dispatcher.counters["decode_only_chosen"],
    }


def _times(result: SimResult) -> tuple[float, float]:
    """(time to first token, mean time per further token) in ms; endless for a failed one."""
    if result.code is not None or result.first_token_at is None or result.ended_at is None:
        return float("inf"), float("inf")
    num_more = sum(len(outputs) for outputs in result.outputs.values()) - 1
    tpot_ms = (result.ended_at - result.first_token_at) * 1000 / num_more if num_more else 0.0
    return (result.first_token_at - result.submitted_at) * 1000, tpot_ms


def _by_pool(sim: SimCluster) -> dict[str, dict[str, int]]:
    """Requests that each pool decoded, and prefilled for them."""
    counts: dict[str, dict[str, int]] = {pool: {"decoded": 0, "prefilled": 0} for pool in ("fast", "slow")}
    for decision in sim.router.decisions:
        decode = decision.placement.decode
        counts[decode.split("-")[1]]["decoded"] += 1
        counts[(decision.sources or (decode,))[0].split("-")[1]]["prefilled"] += 1
    return counts


def _ratio(one: float, other: float) -> float | None:
    return round(one / other, 3) if other else None
