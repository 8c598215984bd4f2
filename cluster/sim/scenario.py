"""One seed: a cluster of at least 4 workers, 50 requests, 5 faults, 2 switches, and what the checker says of it.

Everything follows from the seed alone, so that any seed can be replayed by itself. The cells of the table (fault x
stage) are dealt out in a fixed shuffled order, five to a seed: each comes once in about 80 consecutive seeds.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from random import Random

import numpy as np
from msgspec.structs import replace

from cluster.router.effects import Submit
from cluster.sim.chaos import CELLS, Chaos, Order
from cluster.sim.checker import Checker
from cluster.sim.cluster import SimCluster, SimConfig
from cluster.sim.controller import SimController
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.corruption import CorruptionCounts, Corruptor
from cluster.sim.stages import PHASES, Moment, StageWatcher
from cluster.sim.worker_config import SimWorkerConfig
from cluster.sim.workload import tokens
from cluster.worker.effects import StartCopy
from engine.config import EngineConfig, Role
from engine.fake_engine import FakeConfig, FakeModel
from engine.request import SamplingParams
from engine.scheduler.step_cost import StepCost

NUM_REQUESTS = 50
NUM_FAULTS = 5
NUM_SWITCHES = 2
LATE_S = (11.3, 11.6, 12.0, 12.4)  # when they come if a rank stands: it was given up, and stands still
NUM_LATE = len(LATE_S)
NUM_CORRUPTIONS = 2  # beside the faults
START_S = 0.05  # links are up
ARRIVALS_S = 0.2
FALLBACK_AT_S = START_S + 0.4  # an order that found no moment of its stage strikes at any after this
DRAIN_LIMIT_S = 120.0
FAR_S = 1000.0  # a deadline that is none
LONG_TOKENS = 140
SMALL_POOL = 16  # blocks: just enough for the longest request
FREED_WITHIN_S = 1.0
MOST_STEPS = 200_000  # a run has 2,000: one that never rests is a violation, too
POLICIES = ("least-loaded", "power-of-two", "predicted", "prefix-aware", "round-robin")
_MODEL = FakeModel(stop_probability=0.02)
_RARE = ("waiting for space", "moved", *PHASES)  # stages that few requests come through: dealt twice
_DECK = (*CELLS, *(cell for cell in CELLS if cell[1] in _RARE))
_SHUFFLED = tuple(Random(7).sample(_DECK, len(_DECK)))


@dataclass(kw_only=True)
class SeedReport:
    """What one seed showed. `cells` counts (fault, stage); `codes` how requests ended."""

    seed: int
    violations: list[str]
    cells: Counter[tuple[str, str]]
    corruption: CorruptionCounts
    codes: Counter[str]
    switches: Counter[str]
    num_tokens: int = 0
    num_moved: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0  # what running it took, garbage collection included
    journal: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Run:
    """The parts of one run."""

    sim: SimCluster
    checker: Checker
    chaos: Chaos
    corruptor: Corruptor
    controller: SimController


def run_seed(seed: int, *, trace: bool = False) -> SeedReport:
    """One whole history. With `trace` the report has its journal."""
    rng = Random(f"neap sim {seed}")
    run = _build(seed, rng, trace)
    try:
        _play(run, rng)
    except Exception as error:  # whatever a machine raises, asserts first of all, is what this looks for
        where = traceback.extract_tb(error.__traceback__)[-1]
        run.checker.report(f"{type(error).__name__} in {where.name}, {where.filename}:{where.lineno}: {error}")
    return _report(seed, run, trace)


def orders_of(seed: int, rng: Random) -> list[Order]:
    """The faults of a seed."""
    dealt = [_SHUFFLED[(seed * NUM_FAULTS + i) % len(_SHUFFLED)] for i in range(NUM_FAULTS)]
    orders = []
    for kind, stage in dealt:
        early = stage in PHASES or stage in ("moved", "waiting for row")  # rare: the first one will do
        not_before = START_S + (0.0 if early else 0.02 + rng.random() * ARRIVALS_S * 0.8)
        orders.append(Order(kind=kind, stage=stage, not_before=not_before, fallback_at=FALLBACK_AT_S))
    return orders


def _build(seed: int, rng: Random, trace: bool) -> _Run:
    orders = orders_of(seed, rng)
    stages = {order.stage for order in orders}
    config = SimConfig(
        workers=_workers(rng, crowded="waiting for row" in stages, full="waiting for space" in stages),
        seed=seed,
        policy=rng.choice(POLICIES),
        num_routers=2,
        journal=trace,
    )
    corruptor = Corruptor(Random(rng.random()))
    checker = Checker(corruptor.spoiled_requests)
    corruptor.report = checker.report
    sim = SimCluster(config, [checker])
    sim.clock.most_steps = MOST_STEPS
    controller = SimController(
        sim, Random(rng.random()), num_switches=NUM_SWITCHES, first_at=START_S + 0.05 + rng.random() * 0.1
    )
    chaos = Chaos(
        sim,
        Random(rng.random()),
        orders,
        corruptor=corruptor,
        controller=controller,
        disturbed=checker.disturbed,
        report=checker.report,
    )

    def on_moment(moment: Moment) -> None:
        chaos.on_moment(moment)
        if chaos.satisfied:
            stages_seen.deaf = True
            sim.watch(checker)

    stages_seen = StageWatcher(sim.clock, on_moment, chaos.seeks)
    sim.watch(checker, stages_seen)
    corruptor.watch(sim)
    spoiled_ended = sim.faults.copy_ended

    def copy_ended(incarnation: str, effect: StartCopy, ok: bool) -> None:
        checker.copy_ended(incarnation, effect)
        spoiled_ended(incarnation, effect, ok)

    sim.faults.copy_ended = copy_ended
    return _Run(sim=sim, checker=checker, chaos=chaos, corruptor=corruptor, controller=controller)


def _workers(rng: Random, *, crowded: bool, full: bool) -> tuple[SimWorkerConfig, ...]:
    """Two of each role and up to two more; some on another host; small batches or pools where a stage needs them."""
    names = ["prefill-1", "prefill-2", "decode-1", "decode-2", *rng.choice(((), (), ("decode-3",), ("prefill-3",)))]
    num_hosts = rng.choice((1, 2))
    max_num_seqs = 3 if crowded else rng.choice((16, 32))
    made = []
    for name in names:
        role: Role = "prefill" if name.startswith("prefill") else "decode"
        fixed_ms = rng.choice((4.0, 8.0, 12.0))
        engine = EngineConfig(
            model="fake",
            role=role,
            max_num_seqs=max_num_seqs,
            max_num_served=6,
            max_model_len=256,
            max_step_ms=fixed_ms + rng.choice((2.5, 5.0)),
            steps_in_flight=1 if rng.random() < 0.5 else 0,
        )
        fake = FakeConfig(
            engine=engine,
            model=_MODEL,
            speed=StepCost(fixed_ms=fixed_ms, ms_per_token=rng.choice((0.03, 0.05, 0.15))),
            num_blocks=SMALL_POOL if full and role == "decode" else rng.choice((64, 128)),
            num_layers=2,
        )
        host = f"host-{rng.randrange(num_hosts) + 1}"
        made.append(SimWorkerConfig(worker_id=name, role=role, engine=fake, host=host))
    return tuple(made)


def _requests(rng: Random) -> list[tuple[float, Submit, float | None]]:
    """(when, what, when its client leaves or None): greedy and sampled, one and two choices, shared prefixes."""
    prefixes = [tokens(rng, 32), tokens(rng, 48)]
    requests = []
    for i in range(NUM_REQUESTS):
        at = START_S + rng.randrange(6) * ARRIVALS_S / 6 + rng.random() * 0.001
        prompt = (rng.choice(prefixes) if rng.random() < 0.5 else []) + tokens(rng, rng.choice((1, 9, 16, 24, 44)))
        leaves = at + rng.random() * 0.03 if rng.random() < 0.08 and i < NUM_REQUESTS - NUM_LATE else None
        params = _params(
            rng.choice((0.0, 0.8)),
            # who is not told that its client left would go on for long
            LONG_TOKENS if leaves is not None else rng.choice((1, 1, 2, 2, 3, 4, 8)),
            rng.choice((1, 1, 1, 1, 2)),
        )
        submit = Submit(
            request_id=f"r{i}",
            prompt=np.array(prompt, dtype="<i4").tobytes(),
            params=params,
            seeds=tuple(rng.getrandbits(32) for _ in range(params.n)),
            deadline=at + 0.01 + rng.random() * 0.3 if rng.random() < 0.06 else FAR_S,
        )
        requests.append((at, submit, leaves))
    return requests


@cache
def _params(temperature: float, max_tokens: int, n: int) -> SamplingParams:
    """The few that there are; checking one takes longer than all else of a request here."""
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, n=n)


def _play(run: _Run, rng: Random) -> None:
    sim, chaos = run.sim, run.chaos
    for _ in range(NUM_CORRUPTIONS):
        kind = rng.choice(CORRUPTIONS)
        sim.clock.at(START_S + rng.random() * ARRIVALS_S, run.corruptor.arm, kind)
    requests = _requests(rng)
    for i, (at, submit, leaves) in enumerate(requests[:-NUM_LATE]):
        sim.submit(submit, at=at, router=i % 2)
        if leaves is not None:
            sim.clock.at(leaves, _leave, sim, submit.request_id)
    sim.run_until(FALLBACK_AT_S)
    for i, (_, submit, _) in enumerate(requests[-NUM_LATE:]):
        at = sim.clock.now if chaos.stands_since is None else chaos.stands_since + LATE_S[i]
        sim.submit(replace(submit, deadline=FAR_S), at=at, router=i % 2)
    if not sim.drain(limit_s=DRAIN_LIMIT_S):
        return  # the checker names those that never end
    sim.run_while(lambda: run.controller.busy, limit_s=2.0)
    sim.run_until(max(sim.clock.now, chaos.calm_at))
    end = sim.clock.now + FREED_WITHIN_S
    while sim.leaks() and sim.clock.now < end:
        sim.run_for(0.05)
    run.checker.check_leaks(sim)


def _leave(sim: SimCluster, request_id: str) -> None:
    for router in sim.routers:
        if router.process.alive and request_id in router.results:
            router.cancel(request_id)


def _report(seed: int, run: _Run, trace: bool) -> SeedReport:
    sim = run.sim
    run.checker.check_results(sim)
    run.corruptor.found_all()
    run.checker.check_use(run.corruptor.counts.num_healthy)
    codes: Counter[str] = Counter()
    num_tokens = 0
    for router in sim.routers:
        for name, result in router.results.items():
            poisoned = result.code == "decode_worker_lost" and run.chaos.is_poison(name)
            over = (
                "poison ended"
                if poisoned
                else result.code or ("finished" if result.ended_at is not None else "router lost")
            )
            codes["cancelled" if result.cancelled_at is not None else over] += 1
            num_tokens += sum(len(outputs) for outputs in result.outputs.values())
    return SeedReport(
        seed=seed,
        violations=run.checker.violations,
        cells=run.chaos.struck,
        corruption=run.corruptor.counts,
        codes=codes,
        switches=Counter(run.controller.outcomes),
        num_tokens=num_tokens,
        num_moved=sum(router.dispatcher.counters["moved"] for router in sim.routers),
        virtual_s=sim.clock.now,
        journal=sim.journal.lines() if trace else [],
    )
