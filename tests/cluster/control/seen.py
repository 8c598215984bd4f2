"""Workers and traffic for the tests of the planner."""

from __future__ import annotations

from typing import Any

from cluster.control.observation import Observation, WorkerSeen
from cluster.traffic import Traffic
from cluster.types import WorkerInfo
from engine.config import Role
from engine.messages import Load
from engine.scheduler.profile import Profile


def profile(*, prefill: float = 1.0, decode: float = 1.0) -> Profile:
    """0.1 ms a prompt token, and 10 ms + 0.2 ms a row for a decode step, so many times slower."""
    return Profile(
        prefill=((1, 2.0 * prefill), (2000, 200.0 * prefill)),
        decode=((1, 10.2 * decode), (101, 30.2 * decode)),
        max_step_tokens=2000,
        kv_token_bytes=100_000,
    )


def worker(worker_id: str, role: Role, *, state: Any = "ready", pool: str = "", **more: Any) -> WorkerSeen:
    """A worker of the pool of its own name (less its number), if no other is given."""
    info = WorkerInfo(
        worker_id=worker_id,
        incarnation=f"i-{worker_id}",
        epoch=3,
        role=role,
        state=state,
        address="",
        pool=pool or worker_id.rpartition("-")[0],
        max_num_seqs=100,
        profile=more.pop("profile", profile()),
    )
    return WorkerSeen(info=info, load=more.pop("load", Load()), **more)


def workers(num_prefill: int, num_decode: int, **more: Any) -> tuple[WorkerSeen, ...]:
    """Equal ones."""
    prefill = [worker(f"prefill-{i}", "prefill", **more) for i in range(num_prefill)]
    return (*prefill, *(worker(f"decode-{i}", "decode", **more) for i in range(num_decode)))


def traffic(rate: float, prompt: float, output: float, **more: Any) -> Traffic:
    """`rate` requests per second of equal prompts and answers, for 20 s."""
    return Traffic(
        window_s=20.0,
        num_requests=round(20 * rate),
        requests_per_s=rate,
        prompt_tokens_per_s=rate * prompt,
        output_tokens_per_s=rate * output,
        mean_prompt_tokens=prompt,
        mean_output_tokens=output,
        **more,
    )


def seen(ready: tuple[WorkerSeen, ...], came: Traffic, **more: Any) -> Observation:
    """An observation of a cluster whose file has both pools."""
    return Observation(workers=ready, traffic=came, **{"wants_prefill": True, **more})
