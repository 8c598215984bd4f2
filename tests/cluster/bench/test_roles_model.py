"""The bench's model of whole requests: against the exact cluster simulator, and what must hold in every run."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import median

import numpy as np
import pytest

from cluster.bench.roles.compare import goodput
from cluster.bench.roles.control import Control
from cluster.bench.roles.figures import Requests
from cluster.bench.roles.machine import Job
from cluster.bench.roles.model import ClusterModel
from cluster.bench.roles.setting import Hardware, Phase, Setting, SwitchCost, load_setting
from cluster.router.effects import Submit
from cluster.sim.cluster import SimCluster, SimConfig
from cluster.sim.worker import SimWorkerConfig
from cluster.spec import RolesSpec
from engine.config import EngineConfig, Role
from engine.fake_engine import FakeConfig
from engine.request import SamplingParams
from engine.scheduler.step_cost import StepCost

START_S = 0.05


def fake(role: Role) -> FakeConfig:
    engine = EngineConfig(model="fake", role=role, max_num_seqs=24, max_model_len=2048, max_step_ms=50.0)
    speed = StepCost(fixed_ms=2.0, ms_per_token=0.08, ms_per_token_kilocontext=0.02)
    return FakeConfig(engine=engine, speed=speed, num_blocks=2048)


def small_setting(**changes: object) -> Setting:
    """The fake's speed. A copy takes 0.5 ms and 0.1 ms per block of 16 tokens there (sim/worker.py)."""
    engine = fake("decode")
    hardware = Hardware(
        name="fake",
        profile=engine.profile,
        max_num_seqs=24,
        kv_tokens=2048 * 16,
        gb_per_s=engine.profile.kv_token_bytes * 16 / 1e5,
        latency_ms=1.5,
    )
    setting = replace(
        load_setting(),
        hardware={"fake": hardware},
        machines="fake",
        max_model_len=2048,
        ttft_ms=250.0,
        tpot_ms=12.0,
        phases=(Phase(trace="code", rate=5.0),),
        phase_s=10.0,
        rounds=1,
        known_outputs=True,
    )
    return replace(setting, **changes)  # type: ignore[arg-type]


def some_load(num: int, rate: float, seed: int = 3) -> Requests:
    rng = Random(seed)
    gaps = [rng.expovariate(rate) for _ in range(num)]
    return Requests(
        at=np.cumsum(gaps),
        prompts=np.array([min(1200, max(16, round(384 * rng.lognormvariate(-0.18, 0.6)))) for _ in range(num)]),
        outputs=np.array([min(200, max(2, round(40 * rng.lognormvariate(-0.18, 0.6)))) for _ in range(num)]),
    )


def simulated(load: Requests, num_prefill: int, num_decode: int) -> list[tuple[float, float]]:
    """(time to first token, per further token) in ms by the exact simulator, in the order of arrival."""
    roles: list[Role] = [*["prefill"] * num_prefill, *["decode"] * num_decode]  # type: ignore[list-item]
    workers = [SimWorkerConfig(worker_id=f"w{i}", role=role, engine=fake(role)) for i, role in enumerate(roles)]
    sim = SimCluster(SimConfig(workers=tuple(workers), policy="predicted", journal=False))
    sim.run_for(START_S)
    rng = Random(1)
    for i, (at, prompt, outputs) in enumerate(zip(load.at, load.prompts, load.outputs, strict=True)):
        tokens = np.array([rng.randint(3, 255) for _ in range(prompt)], dtype="<i4").tobytes()
        params = SamplingParams(temperature=0.0, max_tokens=int(outputs), ignore_eos=True)
        submit = Submit(request_id=f"r{i:04d}", prompt=tokens, params=params, seeds=(0,), deadline=600.0)
        sim.submit(submit, at=START_S + float(at))
    assert sim.drain(limit_s=300.0)
    found = []
    for _, result in sorted(sim.results.items()):
        assert result.first_token_at is not None and result.ended_at is not None
        more = len(result.outputs[0]) - 1
        tpot_ms = (result.ended_at - result.first_token_at) * 1000 / max(1, more)
        found.append(((result.first_token_at - result.submitted_at) * 1000, tpot_ms))
    return found


def modelled(load: Requests, num_prefill: int, num_decode: int) -> list[Job]:
    setting = small_setting()
    return ClusterModel(setting, [setting.kind] * (num_prefill + num_decode), num_prefill).run(load)


@pytest.mark.parametrize(("num_prefill", "rate"), [(2, 45.0), (0, 30.0)])
def test_times_are_those_of_the_exact_simulator(num_prefill: int, rate: float) -> None:
    load = some_load(150, rate)
    exact, light = simulated(load, num_prefill, 4 - num_prefill), modelled(load, num_prefill, 4 - num_prefill)
    ttft = median((job.first_at - job.at) * 1000 for job in light)
    tpot = median((job.end_at - job.first_at) * 1000 / max(1, job.outputs - 1) for job in light)
    assert ttft == pytest.approx(median(one[0] for one in exact), rel=0.1)
    assert tpot == pytest.approx(median(one[1] for one in exact), rel=0.05)


def _ended(jobs: list[Job]) -> bool:
    return all(job.at <= job.first_at <= job.end_at and job.produced == job.outputs for job in jobs)


def test_changes_of_roles_under_load_lose_no_request() -> None:
    setting, load = small_setting(), some_load(300, 60.0)
    model = ClusterModel(setting, [setting.kind] * 5, 2)
    for index, when in ((2, 1.0), (0, 2.0), (3, 2.5), (2, 3.0)):
        model.switch_at(when, index, "prefill" if index in (2, 3) and when < 3.0 else "decode")
    jobs = model.run(load)
    assert _ended(jobs)
    assert model.changes.to_prefill == 2 and model.changes.to_decode == 2
    assert model.changes.moved > 0 and model.changes.rolled_back == 0
    assert [machine.role for machine in model.machines] == ["decode", "prefill", "decode", "prefill", "decode"]
    for machine in model.machines:
        assert machine.idle and not machine.reserved and not machine.context
    assert sum(machine.generated(jobs[-1].end_at) for machine in model.machines) == sum(job.outputs for job in jobs)


def test_a_change_that_cannot_end_is_rolled_back() -> None:
    """The only decode worker can give its requests to nobody."""
    setting, load = small_setting(switch=SwitchCost(timeout_s=0.2)), some_load(40, 60.0)
    model = ClusterModel(setting, [setting.kind] * 2, 1)
    model.switch_at(0.3, 1, "prefill")
    jobs = model.run(load)
    assert model.changes.rolled_back == 1 and model.changes.to_prefill == 0
    assert _ended(jobs)


def test_more_than_the_queue_holds_is_refused() -> None:
    setting, load = small_setting(max_queue=4), some_load(300, 3000.0)
    jobs = ClusterModel(setting, [setting.kind] * 2, 1).run(load)
    served = [job for job in jobs if job.end_at >= 0.0]
    assert 4 < len(served) < len(jobs)
    assert _ended(served)
    figures = goodput(setting, jobs)
    assert figures["never_served"] == len(jobs) - len(served)
    assert figures["share"] <= len(served) / len(jobs)


def test_chunks_slow_the_rows_of_their_step() -> None:
    """Colocation: a bound on the step is what keeps the time per token."""
    setting, load = small_setting(), some_load(200, 45.0)

    def slowest_tenth(max_step_ms: float) -> float:
        model = ClusterModel(setting, [setting.kind] * 4, 0, max_step_ms=max_step_ms)
        each = sorted((job.end_at - job.first_at) * 1000 / max(1, job.outputs - 1) for job in model.run(load))
        return each[len(each) * 9 // 10]

    assert slowest_tenth(6.0) < slowest_tenth(50.0) / 1.3


def test_the_planner_follows_the_traffic() -> None:
    """Prompts at first, answers later: more workers prefill at first, and a second run is the same to the request."""
    setting = small_setting(tpot_ms=8.0)
    early, late = some_load(700, 70.0), some_load(900, 60.0, seed=4)
    load = Requests(
        at=np.concatenate((early.at, 12.0 + late.at)),
        prompts=np.concatenate((early.prompts * 2, late.prompts // 8 + 16)),
        outputs=np.concatenate((np.maximum(2, early.outputs // 8), late.outputs * 6)),
    )
    spec = RolesSpec(ttft_ms=250.0, tpot_ms=8.0, min_role_s=2.0, horizon_s=10.0)

    def run() -> tuple[list[tuple[float, int]], list[float]]:
        hardware = [setting.kind] * 8
        control = Control(setting, hardware, 3, spec)
        jobs = ClusterModel(setting, hardware, 3, watcher=control).run(load)
        assert _ended(jobs)
        return control.timeline, [job.end_at for job in jobs]

    timeline, ends = run()
    most_early = max((num for at, num in timeline if at < 12.0), default=3)
    least_late = min((num for at, num in timeline if at > 12.0), default=most_early)
    assert most_early > 3 and least_late < most_early
    assert run() == (timeline, ends)
