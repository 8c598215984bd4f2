"""How long the planner takes to decide, for clusters of several sizes: `python -m cluster.bench.planner_bench`.

Every worker has measured tables of its own, as real machines have; the traffic is such that changes are worth while,
so that the whole way is gone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random

from cluster.control.observation import Observation, WorkerSeen
from cluster.control.planner import Planner
from cluster.spec import RolesSpec
from cluster.traffic import Traffic
from cluster.types import WorkerInfo
from engine.config import Role
from engine.messages import Load
from engine.scheduler.profile import Profile

SIZES = (8, 64, 256, 1024)
RUNS = 50
NUM_POOLS = 8


def worker(random: Random, index: int, num_prefill: int) -> WorkerSeen:
    """A worker of some speed whose tables lie near the line that it stands for."""
    speed = random.choice((0.5, 1.0, 2.0))
    role: Role = "prefill" if index < num_prefill else "decode"

    def ms(fixed: float, per_token: float, count: int) -> tuple[int, float]:
        return count, speed * (fixed + per_token * count) * random.uniform(0.97, 1.03)

    profile = Profile(
        prefill=tuple(ms(5.0, 0.05, count) for count in (1, 64, 256, 1024, 2048)),
        prefill_ms_per_token_kilocontext=0.005 * speed,
        decode=tuple(ms(8.0, 0.15, count) for count in (1, 8, 32, 64, 128)),
        decode_ms_per_row_kilocontext=0.05 * speed,
        kv_token_bytes=100_000,
    )
    info = WorkerInfo(
        worker_id=f"worker-{index}",
        incarnation=f"{index:032x}",
        epoch=1,
        role=role,
        state="ready",
        address="",
        pool=f"pool-{index % NUM_POOLS}",
        max_num_seqs=128,
        profile=profile,
    )
    running = random.randrange(40) if role == "decode" else 0
    load = Load(
        num_running=running,
        context_tokens=running * 1000,
        queued_tokens=0 if running else random.randrange(4000),
        num_blocks=20_000,
        prefill_scale=random.uniform(0.9, 1.1),
        decode_scale=random.uniform(0.9, 1.1),
    )
    return WorkerSeen(info=info, load=load)


def observation(num_workers: int, seed: int = 1) -> Observation:
    """Half of the workers prefill, and the prompts are more than they can do."""
    random = Random(seed)
    rate = 2.5 * num_workers
    return Observation(
        workers=tuple(worker(random, index, num_workers // 2) for index in range(num_workers)),
        traffic=Traffic(
            window_s=20.0,
            num_requests=int(20 * rate),
            requests_per_s=rate,
            prompt_tokens_per_s=4000 * rate,
            output_tokens_per_s=100 * rate,
            mean_prompt_tokens=4000.0,
            mean_output_tokens=100.0,
            prompt_square_ratio=1.5,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Milliseconds of the fastest and the median decision, of CPU in the mean; how many changes one plans."""

    fastest_ms: float
    median_ms: float
    cpu_ms: float
    num_changes: int


def decide(num_workers: int, runs: int = RUNS) -> Decisions:
    """Decide so many times."""
    seen, planner = observation(num_workers), Planner(RolesSpec())
    took: list[float] = []
    cpu_began = time.process_time()
    for _ in range(runs):
        began = time.perf_counter()
        plan = planner.plan(seen)
        took.append((time.perf_counter() - began) * 1000)
    cpu_ms = (time.process_time() - cpu_began) * 1000 / runs
    took.sort()
    return Decisions(fastest_ms=took[0], median_ms=took[len(took) // 2], cpu_ms=cpu_ms, num_changes=len(plan.switches))


def main() -> None:
    """Print one line per size."""
    print("workers  fastest ms  median ms  CPU ms  changes")
    for num_workers in SIZES:
        one = decide(num_workers)
        print(f"{num_workers:7}  {one.fastest_ms:10.2f}  {one.median_ms:9.2f}  {one.cpu_ms:6.2f}  {one.num_changes:7}")


if __name__ == "__main__":
    main()
