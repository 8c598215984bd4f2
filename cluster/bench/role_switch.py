"""Role switches under load, with real processes: is anything lost, does any text change, how long does it take?

1. the questions once, undisturbed: their texts
2. the same questions again, so many at once all the time, while workers change their roles one after another:
   decode -> prefill of the busiest decode worker, then prefill -> decode of another worker, and so on
3. once more: are prompts still in the prefix caches of the workers that switched?
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from cluster.bench.answer_text import read_answer
from cluster.bench.load import Question, Target, run_closed
from cluster.bench.own_cluster import own_cluster
from cluster.bench.report import percentile
from cluster.bench.stream import Reply
from cluster.rpc.switch_client import call_switch
from cluster.types import SwitchReply, SwitchRequest
from engine.config import Role

POLL_S = 0.05
BETWEEN_S = 0.3
TIMEOUT_S = 120.0
MIN_RUNNING = 2


@dataclass(frozen=True, kw_only=True)
class RoleSwitchOptions:
    """`model` empty: the embedded one. One thread per worker."""

    switches: int = 100
    inflight: int = 12
    questions: int = 48
    prompt_tokens: int = 96
    output_tokens: int = 200
    prefill: int = 2
    decode: int = 2
    model: str = ""
    seed: int = 0


@dataclass
class _Switches:
    """What the switches gave. `running`: requests at the worker when decode -> prefill was asked."""

    replies: dict[Role, list[SwitchReply]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    refused: int = 0
    running: list[int] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)


def bench_role_switch(options: RoleSwitchOptions) -> dict[str, Any]:
    """Start a cluster of its own and run the three parts. Raises RuntimeError if it does not start or stands still."""
    with tempfile.TemporaryDirectory(prefix="neap-bench-") as name:
        file = Path(name) / "cluster.yaml"
        file.write_text(yaml.safe_dump(_cluster(options)), encoding="utf-8")
        with own_cluster(["--config", str(file)]) as cluster:
            return asyncio.run(_measure(cluster.target, options))


def _cluster(options: RoleSwitchOptions) -> dict[str, Any]:
    pools = [{"role": "prefill", "workers": options.prefill}, {"role": "decode", "workers": options.decode}]
    engine = {"threads": 1, "max_num_seqs": max(16, 2 * options.inflight)}
    return {
        "pools": pools,
        "engine": engine,
        "router": {"policy": "least-loaded"},
        "roles": {"auto": False},  # only the bench switches
        **({"model": options.model} if options.model else {}),
    }


async def _measure(target: Target, options: RoleSwitchOptions) -> dict[str, Any]:
    model = (await _get(target, "/v1/models"))["data"][0]["id"]
    questions = _questions(target, model, options)
    undisturbed = [read_answer(reply.raw) for reply in await run_closed(target, questions, options.inflight)]
    if any(answer.error or not answer.pieces for answer in undisturbed):
        raise RuntimeError("a request failed before any switch")
    stop = asyncio.Event()
    load = asyncio.create_task(_load(target, questions, options.inflight, stop))
    try:
        switches = await _switch(target, options)
    finally:
        stop.set()
        answers = await load
    hits = await _hits(target, switches.workers)
    await run_closed(target, questions, options.inflight)
    await asyncio.sleep(1.0)  # the counters ride on heartbeats
    hits = await _hits(target, switches.workers) - hits
    mismatches = sum(
        read_answer(reply.raw).text != undisturbed[index].text for index, reply in answers if not reply.error
    )
    return {
        "options": {name: getattr(options, name) for name in RoleSwitchOptions.__dataclass_fields__},
        "requests": len(answers),
        **_figures(switches, options),
        "failed": sum(bool(reply.error or read_answer(reply.raw).error) for _, reply in answers),
        "text_mismatches": mismatches,
        "prefix_hits_after": hits,
    }


def _figures(switches: _Switches, options: RoleSwitchOptions) -> dict[str, Any]:
    replies = [reply for some in switches.replies.values() for reply in some]
    good = {role: [r for r in some if r.outcome == "switched"] for role, some in switches.replies.items()}
    canaries = [reply.canary_ms for some in good.values() for reply in some]
    return {
        "switches": sum(len(some) for some in good.values()),
        "inflight": options.inflight,
        "moved": sum(reply.moved for reply in replies),
        "finished_in_place": sum(reply.finished_in_place for reply in replies),
        "rolled_back": sum(reply.outcome == "rolled_back" for reply in replies),
        "refused": switches.refused,
        "least_running": min(switches.running, default=0),
        "p_to_d_ms": _quantiles([reply.duration_ms for reply in good["decode"]]),
        "d_to_p_ms": _quantiles([reply.duration_ms for reply in good["prefill"]]),
        "canary_ms": _quantiles(canaries),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {"p50": round(percentile(values, 0.5), 2), "p99": round(percentile(values, 0.99), 2)}


def _questions(target: Target, model: str, options: RoleSwitchOptions) -> list[Question]:
    """Greedy and sampled ones in turn, each with its seed, every text of the same length."""
    rng = Random(options.seed)
    questions = []
    for index in range(options.questions):
        prompt = [rng.randrange(10, 250) for _ in range(options.prompt_tokens + rng.randrange(32))]
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": options.output_tokens,
            "temperature": 0.8 * (index % 2),
            "seed": index,
            "ignore_eos": True,
            "stream": True,
        }
        questions.append(Question(request=target.post("/v1/completions", body), keep=True))
    return questions


async def _load(
    target: Target, questions: list[Question], inflight: int, stop: asyncio.Event
) -> list[tuple[int, Reply]]:
    """Ask the questions round and round until told to stop: (index, reply)."""
    answers: list[tuple[int, Reply]] = []

    def turns() -> Iterator[int]:
        turn = 0
        while not stop.is_set():
            yield turn % len(questions)
            turn += 1

    waiting = turns()

    async def work() -> None:
        for index in waiting:
            (reply,) = await run_closed(target, [questions[index]], 1, timeout_s=TIMEOUT_S)
            answers.append((index, reply))

    await asyncio.gather(*(work() for _ in range(inflight)))
    return answers


async def _switch(target: Target, options: RoleSwitchOptions) -> _Switches:
    """Switch after switch, back and forth, each when the cluster is as busy as it should be."""
    done = _Switches()
    while sum(len(some) for some in done.replies.values()) < options.switches:
        to: Role = "prefill" if len(done.replies["prefill"]) <= len(done.replies["decode"]) else "decode"
        worker = await _candidate(target, to, options)
        request = SwitchRequest(incarnation=worker["incarnation"], expected_epoch=worker["epoch"], role=to)
        reply = await call_switch(worker["address"], request)
        if reply.outcome == "refused":  # the router's view was an epoch behind
            done.refused += 1
            await asyncio.sleep(POLL_S)
            continue
        done.replies[to].append(reply)
        done.workers.add(worker["worker_id"])
        if to == "prefill":
            done.running.append(worker["load"]["running"])
        await asyncio.sleep(BETWEEN_S)
    return done


async def _candidate(target: Target, to: Role, options: RoleSwitchOptions) -> dict[str, Any]:
    """The busiest decode worker, once it runs MIN_RUNNING; or the prefill worker that has been one for longest."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + TIMEOUT_S
    while loop.time() < deadline:
        status = await _get(target, "/status")
        workers: list[dict[str, Any]] = status["workers"]
        ready = [w for w in workers if (w["state"], w["link"]) == ("ready", "up") and w["role"] != to]
        if to == "decode" and len(ready) > 1:
            return min(ready, key=lambda worker: worker["epoch"])
        busy = sum(worker["load"]["running"] for worker in ready)
        busiest = max(ready, key=lambda worker: worker["load"]["running"], default=None)
        is_busy = busiest is not None and busiest["load"]["running"] >= MIN_RUNNING and busy >= min(8, options.inflight)
        if busiest is not None and is_busy and len(ready) > 1:
            return busiest
        await asyncio.sleep(POLL_S)
    raise RuntimeError(f"no worker could be asked to become a {to} worker for {TIMEOUT_S:g} s")


async def _hits(target: Target, workers: set[str]) -> int:
    status = await _get(target, "/status")
    return sum(w["load"]["prefix_cache_hits"] for w in status["workers"] if w["worker_id"] in workers)


async def _get(target: Target, path: str) -> dict[str, Any]:
    def get() -> dict[str, Any]:
        with urllib.request.urlopen(target.url + path, timeout=30) as response:
            value: dict[str, Any] = json.load(response)
            return value

    return await asyncio.to_thread(get)
