"""One placement and what came of it, in numbers, and told in words for `neap status --why`."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.router.policies import Placement
from cluster.router.predict import Prediction

MAX_OTHERS_TOLD = 3


class Decision(msgspec.Struct, kw_only=True, eq=False):
    """What was chosen at `at` (monotonic seconds), for which reasons; what was real is filled in later."""

    request_id: str
    attempt: int
    at: float
    policy: str
    num_tokens: int
    num_outputs: float
    placement: Placement
    sources: tuple[str, ...]  # as sent
    avoided: frozenset[str]  # by the breakers
    predicted: Prediction
    is_scored: bool  # prompt logprobs were asked for
    cached: tuple[tuple[str, int], ...]  # (worker id, tokens) that the KV index hinted at, of those chosen
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cached_tokens: int | None = None
    path: str | None = None
    failed: dict[str, str] = {}  # sources that failed this very attempt -> reason

    @property
    def source(self) -> str | None:
        """The source that may have served it: the first that has not failed."""
        return next((source for source in self.sources if source not in self.failed), None)

    @property
    def kind(self) -> str:
        """What its overhead is learnt under."""
        return "remote" if self.sources else "alone"


def words(decision: Decision) -> list[str]:
    """The choice, the reason, the numbers, what else was considered, and what came of it."""
    placement, predicted = decision.placement, decision.predicted
    attempt = f", attempt {decision.attempt}" if decision.attempt > 1 else ""
    lines = [
        f"{decision.num_tokens} prompt tokens, about {decision.num_outputs:.0f} to come{attempt}: "
        f"{_where(placement.decode, decision.sources[0] if decision.sources else None)}.",
        f"Why ({decision.policy}): {placement.why}.",
    ]
    if placement.alone:
        lines.append("No source was named: the decode worker alone is predicted to cost less (conditional prefill).")
    elif not decision.sources:
        reason = "every source failed this decode worker lately" if decision.avoided else "there is none"
        if decision.is_scored:
            reason = "prompt logprobs are computed where they are told"
        lines.append(f"No source was named: {reason}.")
    if decision.avoided and decision.sources:
        lines.append(f"Avoided, because they failed {placement.decode} lately: {', '.join(sorted(decision.avoided))}.")
    if held := [f"{worker_id} {tokens}" for worker_id, tokens in decision.cached if tokens]:
        lines.append(f"Tokens of the prompt already there, by the KV index: {', '.join(held)}.")
    lines.append(f"Predicted: {_sum(predicted)}; then {_ms(predicted.tpot_ms)} per token.")
    for other in [one for one in placement.considered if one is not predicted][:MAX_OTHERS_TOLD]:
        lines.append(
            f"Instead {_where(other.decode, other.source)}: first token {_ms(other.ttft_ms)}, "
            f"{_ms(other.tpot_ms)} per token, cost {_ms(other.cost_ms)} against {_ms(predicted.cost_ms)}."
        )
    for source, reason in decision.failed.items():
        lines.append(f"{source} failed it ({reason}); {placement.decode} avoids it for a while.")
    return [*lines, _outcome(decision)]


def as_json(decision: Decision, now: float) -> dict[str, Any]:
    """For the /status/why route."""
    predicted = decision.predicted
    names = ("wait", "queue", "compute", "transfer", "steps", "overhead", "ttft", "tpot", "cost")
    return {
        "request_id": decision.request_id,
        "attempt": decision.attempt,
        "age_s": round(now - decision.at, 3),
        "policy": decision.policy,
        "decode": decision.placement.decode,
        "sources": list(decision.sources),
        "alone_by_choice": decision.placement.alone,
        "predicted_ms": {name: round(getattr(predicted, f"{name}_ms"), 3) for name in names},
        "real_ms": {"ttft": _rounded(decision.ttft_ms), "tpot": _rounded(decision.tpot_ms)},
        "cached_tokens": decision.cached_tokens,
        "path": decision.path,
        "words": words(decision),
    }


def _where(decode: str, source: str | None) -> str:
    return f"decode on {decode}, prefill on {source}" if source else f"{decode} does both"


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _sum(predicted: Prediction) -> str:
    parts = [
        ("waiting for a row", predicted.wait_ms),
        ("queued prefill", predicted.queue_ms),
        ("prefill", predicted.compute_ms),
        ("transfer", predicted.transfer_ms),
        ("decode steps", predicted.steps_ms),
        ("overhead, learnt", predicted.overhead_ms),
    ]
    told = ", ".join(f"{name} {_ms(value)}" for name, value in parts if abs(value) >= 0.05)
    return f"first token after {_ms(predicted.ttft_ms)} ({told})" if told else f"first token {_ms(predicted.ttft_ms)}"


def _outcome(decision: Decision) -> str:
    if decision.ttft_ms is None:
        return "No token yet."
    told = f"Real: first token after {_ms(decision.ttft_ms)}"
    if decision.tpot_ms is not None:
        told += f", then {_ms(decision.tpot_ms)} per token"
    return f"{told}; {decision.cached_tokens or 0} tokens were cached; path {decision.path or 'unknown'}."


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
