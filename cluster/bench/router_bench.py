"""`neap bench router`: what the path around the engine costs. Real router, exact fakes as workers over the real link.

    throughput   256 streams at once, 32 tokens each, one event per token: requests/s, CPU per request
    crowd        1,000 streams at once: failures
    low load     one stream at a time: time added to the engine's own
The generator counts every event of every answer, and compares the texts of a sample with the fake's oracle, event by
event. It runs on the same cores, and its CPU time is listed beside the others'.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from cluster.bench.answer_text import read_answer
from cluster.bench.engine_time import measure_alone
from cluster.bench.load import Question, run_closed
from cluster.bench.own_cluster import OwnCluster, fake_cluster, fake_spec
from cluster.bench.prompts import FakePrompts, Prompt
from cluster.bench.report import percentile
from cluster.bench.stream import Reply

CHECK_EVERY = 8  # every n-th answer is kept and compared with the oracle
WARMUP_REQUESTS = 64
RAMP_S = 0.5  # over which the throughput scenario's streams begin; it counts as part of the run


@dataclass(frozen=True, kw_only=True)
class RouterBenchOptions:
    """Sizes and speeds. `step_ms` and `token_ms` are the fake's; `prefill` 0: the decode worker computes prompts."""

    requests: int = 2048
    concurrency: int = 256
    tokens: int = 32
    words: int = 16
    crowd: int = 1000
    low_requests: int = 50
    endpoint: str = "chat"
    step_ms: float = 0.0
    token_ms: float = 0.0
    prefill: int = 0
    decode: int = 1
    seed: int = 0


def bench_router(options: RouterBenchOptions) -> dict[str, Any]:
    """Run the three scenarios on a cluster of our own. Raises RuntimeError when it does not start."""
    fake = fake_spec(step_ms=options.step_ms, token_ms=options.token_ms)
    rows = max(options.concurrency, options.crowd, 1)
    with fake_cluster(fake, prefill=options.prefill, decode=options.decode, max_num_seqs=rows) as (cluster, folder):
        prompts = FakePrompts(folder, fake, options.seed)
        run_scenario(cluster, prompts, options, min(WARMUP_REQUESTS, options.requests), options.concurrency)
        throughput = run_scenario(cluster, prompts, options, options.requests, options.concurrency, RAMP_S)
        crowd = run_scenario(cluster, prompts, options, options.crowd, options.crowd)
        low = run_scenario(cluster, prompts, options, options.low_requests, 1)
        alone = measure_alone(
            fake, [prompts.token_ids(options.words + 3) for _ in range(options.low_requests)], options.tokens
        )
    for name, index in (("ttft", 0), ("e2e", 1)):
        own = percentile([one[index] for one in alone], 0.5) * 1000
        low[f"engine_{name}_p50_ms"] = round(own, 2)
        low[f"overhead_{name}_p50_ms"] = round(low[f"{name}_p50_ms"] - own, 2)
    return {"options": asdict(options), "throughput": throughput, "crowd": crowd, "low_load": low}


def run_scenario(
    cluster: OwnCluster,
    prompts: FakePrompts,
    options: RouterBenchOptions,
    num_requests: int,
    concurrency: int,
    ramp_s: float = 0.0,
) -> dict[str, Any]:
    """One closed loop and its figures."""
    asked = [
        prompts.draw(options.words, options.tokens, endpoint=options.endpoint, with_answer=index % CHECK_EVERY == 0)
        for index in range(num_requests)
    ]
    questions = [
        Question(request=cluster.target.post(prompt.path, prompt.body), keep=bool(prompt.pieces)) for prompt in asked
    ]
    cpu_before, own_before = cluster.cpu_s(), _own_cpu_s()
    started = time.perf_counter()
    replies = uvloop.run(run_closed(cluster.target, questions, concurrency, ramp_s=ramp_s))
    seconds = time.perf_counter() - started
    cpu = {kind: spent - cpu_before.get(kind, 0.0) for kind, spent in cluster.cpu_s().items()}
    cpu["generator"] = _own_cpu_s() - own_before
    num_events = options.tokens + (1 if options.endpoint == "chat" else 0)  # chat: the role comes first
    return {
        "concurrency": concurrency,
        **summarise(replies, asked, num_events, seconds),
        "cpu_ms_per_request": {kind: round(spent * 1000 / num_requests, 3) for kind, spent in sorted(cpu.items())},
        "cores_used": round(sum(cpu.values()) / seconds, 2),
    }


def summarise(replies: Sequence[Reply], asked: Sequence[Prompt], num_events: int, seconds: float) -> dict[str, Any]:
    """Figures of one scenario. A wrong number of events, or a wrong text, is a failure."""
    failures: Counter[str] = Counter()
    good: list[Reply] = []
    num_checked = 0
    for reply, prompt in zip(replies, asked, strict=True):
        error = reply.error
        if not error and reply.num_events != num_events:
            error = "wrong number of events"
        if not error and prompt.pieces:
            num_checked += 1
            error = "" if read_answer(reply.raw).pieces == prompt.pieces else "wrong text"
        if error:
            failures[error] += 1
        else:
            good.append(reply)
    per_token = [(reply.last_s - reply.first_s) * 1000 / max(num_events - 1, 1) for reply in good]
    figures: dict[str, Any] = {
        "requests": len(replies),
        "failures": dict(failures),
        "texts_checked": num_checked,
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 1),
        "events_per_s": round(sum(reply.num_events for reply in good) / seconds, 1),
        "events_per_read": round(sum(r.num_events for r in good) / max(sum(r.num_reads for r in good), 1), 2),
    }
    for name, values in (
        ("ttft", [reply.first_s * 1000 for reply in good]),
        ("tpot", per_token),
        ("e2e", [reply.last_s * 1000 for reply in good]),
    ):
        for share in (50, 90, 99):
            figures[f"{name}_p{share}_ms"] = round(percentile(values, share / 100), 2)
    return figures


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
