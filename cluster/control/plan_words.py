"""Plans in words: what was seen, what it means, and why a worker changes or stays."""

from __future__ import annotations

from cluster.control.capacity import Capacity
from cluster.control.observation import WorkerSeen
from cluster.control.split import Needs, Split
from cluster.traffic import Traffic
from cluster.types import SwitchReply
from engine.config import Role

FEW_REQUESTS = "No change: too few requests came lately to conclude anything."


def facts(traffic: Traffic, needs: Needs, capacity: Capacity, now: Split) -> tuple[str, str]:
    """What came, and what the workers can do of it."""
    outputs = "unknown" if traffic.mean_output_tokens is None else f"{traffic.mean_output_tokens:.0f}"
    queued = (needs.prefill - traffic.requests_per_s, needs.decode - traffic.requests_per_s)
    more = (
        f"; queued work adds {queued[0]:.2f}/s of prefill and {queued[1]:.2f}/s of decode"
        if max(queued) > 0.005
        else ""
    )
    came = (
        f"{traffic.requests_per_s:.2f} requests/s came in the last {traffic.window_s:.0f} s, of "
        f"{traffic.mean_prompt_tokens:.0f} prompt tokens ({traffic.cached_share:.0%} cached) and {outputs} output "
        f"tokens{more}."
    )
    can = (
        f"Within {capacity.ttft_ms:.0f} ms to the first token the prefill workers can do {float(now.prefill):.2f}/s; "
        f"within {capacity.tpot_ms:.0f} ms per token the decode workers {float(now.decode):.2f}/s."
    )
    return came, can


def counts(num_prefill: int, num_decode: int, pressure: float) -> str:
    """The split as it is."""
    return f"{num_prefill} prefill and {num_decode} decode workers: pressure {pressure:.2f} (1 is all they can do)."


def missed(traffic: Traffic, capacity: Capacity) -> dict[Role, str]:
    """Which targets nine of ten requests do not meet, by the role that there is too little of."""
    words: dict[Role, str] = {}
    if traffic.ttft_p90_ms is not None and traffic.ttft_p90_ms > capacity.ttft_ms:
        words["prefill"] = f"Missed: one first token in ten takes over {traffic.ttft_p90_ms:.0f} ms."
    if traffic.tpot_p90_ms is not None and traffic.tpot_p90_ms > capacity.tpot_ms:
        words["decode"] = f"Missed: one answer in ten takes over {traffic.tpot_p90_ms:.1f} ms per token."
    return words


def little_gain(role: Role, pressure: float, best: float, aim: int, hysteresis: float) -> str:
    """Why changes that would help a little are not made."""
    if aim == 0:
        return f"No change: with one more {role} worker the pressure would not fall."
    return (
        f"No change: with {aim} more to {role} the pressure would fall from {pressure:.2f} to {best:.2f}, by less than "
        f"the {hysteresis:.0%} that a change must bring."
    )


def too_dear(saved_ms: float, cost_ms: float) -> str:
    """Why changes that would help are not worth it."""
    return f"No change: it would save {saved_ms:.0f} ms of work and cost {cost_ms:.0f} ms."


def change(
    worker: WorkerSeen,
    role: Role,
    *,
    speeds: tuple[float, float],
    cost_ms: float,
    pressures: tuple[float, float, float],
    aim: int,
) -> str:
    """Why this worker. `speeds`: prefill and decode over the mean; `pressures`: before, after this plan, at the aim."""
    short = "prompts" if role == "prefill" else "answers"
    more = f", by {aim} changes in all {pressures[2]:.2f}" if aim > 1 else ""
    load = worker.load
    carries = f"{load.num_running} running requests of {load.context_tokens} tokens"
    if role == "decode":
        carries = f"{load.queued_tokens} queued prompt tokens"
    return (
        f"{short} are what there is too little room for; the pressure of {pressures[0]:.2f} becomes {pressures[1]:.2f}"
        f"{more}; it prefills {speeds[0]:.2f} and decodes {speeds[1]:.2f} times the mean; the change costs "
        f"{cost_ms:.0f} ms, with {carries}"
    )


def switch_words(reply: SwitchReply) -> str:
    """How a change ended, in one line."""
    name, role = reply.info.worker_id, reply.info.role
    took = f"in {reply.duration_ms:.0f} ms (canary {reply.canary_ms:.0f} ms)"
    work = f"{reply.moved} requests moved, {reply.finished_in_place} finished in place"
    if reply.outcome == "switched":
        return f"{name} is {role} now, {took}: {work}"
    if reply.outcome == "drained":
        return f"{name} is drained, in {reply.duration_ms:.0f} ms: {work}"
    if reply.outcome == "rolled_back":
        return f"{name} went back to {role} after {reply.duration_ms:.0f} ms: {reply.reason}"
    return f"{name} refused to change: {reply.reason}"
