"""`neap bench serve`: an open-loop load against an OpenAI-style server, and what its clients got.

Requests come at their own times whether the server keeps up or not, and every time counts from the moment a request was
due. Goodput is what met both targets. Beside the client's figures stand the server's own counters over the same time.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from cluster.bench.answer_text import read_answer
from cluster.bench.counters import difference, read_counters
from cluster.bench.load import Question, Target, run_open
from cluster.bench.report import percentile
from cluster.bench.stream import Reply
from cluster.bench.workload import Arrival, LoadOptions, make_load

SHARES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a request must keep to count as good: first token and mean time per further token, in ms."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request as its client saw it. Times in seconds; `tpot_s` is 0 for one token."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    num_tokens: int = 0
    error: str = ""


def bench_serve(target: Target, options: LoadOptions, targets: Targets, timeout_s: float) -> dict[str, Any]:
    """Run one load. Raises ValueError for a trace that is not understood, OSError when nobody answers at the target."""
    arrivals = make_load(options)
    model = served_model(target)
    questions = [
        Question(request=target.post("/v1/completions", body), keep=True, at_s=arrival.at_s)
        for arrival, body in zip(arrivals, bodies(model, arrivals, options.seed), strict=True)
    ]
    before = read_counters(target)
    started = time.perf_counter()
    replies, lateness_s = uvloop.run(run_open(target, questions, timeout_s))
    seconds = time.perf_counter() - started
    samples = [read_sample(reply) for reply in replies]
    return {
        "model": model,
        "load": {**asdict(options), **describe(arrivals)},
        "generator_late_ms": round(lateness_s * 1000, 2),
        **summarise(samples, targets, seconds),
        "server": difference(before, read_counters(target)),
    }


def bodies(model: str, arrivals: Sequence[Arrival], seed: int) -> list[dict[str, Any]]:
    """The requests: token ids, an exact number of tokens, sampling seeded by their place in the load."""
    return [
        {
            "model": model,
            "prompt": arrival.token_ids(seed, index),
            "max_tokens": arrival.output_tokens,
            "min_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "seed": seed + index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for index, arrival in enumerate(arrivals)
    ]


def served_model(target: Target) -> str:
    """The first model of /v1/models. Raises OSError when there is none."""
    request = urllib.request.Request(f"{target.url}/v1/models")
    if target.api_key:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            models = json.load(response)["data"]
    except (urllib.error.URLError, KeyError, ValueError) as error:
        raise OSError(f"{target.url}/v1/models: {error}") from error
    if not models:
        raise OSError(f"{target.url}/v1/models: no model is served")
    return str(models[0]["id"])


def read_sample(reply: Reply) -> Sample:
    """Times and tokens of a kept reply; its failure by kind (HTTP status, error code, cut off, timeout)."""
    if reply.error.startswith("HTTP"):
        return Sample(error=f"{reply.error} {read_answer(reply.raw).error}".strip())
    answer = read_answer(reply.raw) if reply.raw else None
    if answer is not None and answer.error:
        return Sample(error=answer.error)
    if reply.error or answer is None:
        return Sample(error=reply.error or "empty answer")
    num_tokens = len(answer.pieces) if answer.num_tokens is None else answer.num_tokens
    if not num_tokens:
        return Sample(error="no tokens")
    first_s = reply.first_s or reply.last_s
    tpot_s = (reply.last_s - first_s) / (num_tokens - 1) if num_tokens > 1 else 0.0
    return Sample(ttft_s=first_s, tpot_s=tpot_s, e2e_s=reply.last_s, num_tokens=num_tokens)


def summarise(samples: Sequence[Sample], targets: Targets, seconds: float) -> dict[str, Any]:
    """Figures over all requests; times only of those that ended well."""
    well = [sample for sample in samples if not sample.error]
    good = [s for s in well if s.ttft_s * 1000 <= targets.ttft_ms and s.tpot_s * 1000 <= targets.tpot_ms]
    figures: dict[str, Any] = {
        "requests": len(samples),
        "seconds": round(seconds, 3),
        "failures": dict(Counter(sample.error for sample in samples if sample.error)),
        "requests_per_s": round(len(well) / seconds, 3),
        "output_tokens_per_s": round(sum(sample.num_tokens for sample in well) / seconds, 1),
        "goodput": {
            **asdict(targets),
            "requests_per_s": round(len(good) / seconds, 3),
            "share": round(len(good) / len(samples), 4) if samples else 0.0,
        },
    }
    for name, values in (
        ("ttft_ms", [sample.ttft_s * 1000 for sample in well]),
        ("tpot_ms", [sample.tpot_s * 1000 for sample in well if sample.num_tokens > 1]),
        ("e2e_ms", [sample.e2e_s * 1000 for sample in well]),
    ):
        figures[name] = {f"p{share}": round(percentile(values, share / 100), 2) for share in SHARES}
    return figures


def describe(arrivals: Sequence[Arrival]) -> dict[str, float]:
    """What the load came to: its span and lengths."""
    prompts = [arrival.prompt_tokens for arrival in arrivals]
    outputs = [arrival.output_tokens for arrival in arrivals]
    return {
        "span_s": round(arrivals[-1].at_s, 3),
        "prompt_tokens_p50": percentile(prompts, 0.5),
        "prompt_tokens_p99": percentile(prompts, 0.99),
        "output_tokens_p50": percentile(outputs, 0.5),
        "output_tokens_p99": percentile(outputs, 0.99),
    }
