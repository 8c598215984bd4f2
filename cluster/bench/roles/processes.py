"""The same comparison with real processes: `neap serve` over exact fakes whose steps sleep, so two cores carry several.

What the model leaves out is in here: gRPC, event loops, real hand-offs, real changes of roles with their canaries, and
whatever else the machine does; so figures vary. Lengths are scaled down, the rates so that each phase loads the
workers by `load` of what ideally divided ones could do, as reckoned for the simulator. The load is this cluster's
share of what a large one would get: requests are drawn for `of` workers, with all their burstiness, and some kept.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import uvloop
import yaml

from cluster.bench.load import Question, Target, run_open
from cluster.bench.own_cluster import MODEL, own_cluster
from cluster.bench.report import percentile
from cluster.bench.roles.figures import Requests, load_figures
from cluster.bench.serve_bench import Sample, bodies, read_sample, served_model
from cluster.bench.words import VOCAB_SIZE, write_checkpoint
from cluster.bench.workload import Arrival

TIMEOUT_S = 60.0
CONTEXT = 2048
WINDOW_S = 6.0  # phases of 10 minutes and 20 s are what the simulator has; these phases are shorter by more than that
_GOODPUT = ("goodput_per_s", "goodput_tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """A step takes step_ms and token_ms per token. Prompts and answers are scaled and cut; times in the units named.

    `load` is the share of what the workers could do, each dividing its time as the phase needs it; the TPOT target is
    as far above a full batch's step as that of the simulated hardware (roles.json: 50 of 34 ms).
    """

    workers: int = 8
    of: int = 64
    phase_s: float = 90.0
    rounds: int = 1
    load: float = 0.85
    step_ms: float = 50.0
    token_ms: float = 0.8
    rows: int = 16
    prompt_scale: float = 0.08
    output_scale: float = 0.5
    most_prompt: int = 1400
    ttft_ms: float = 4000.0
    tpot_ms: float = 90.0
    seed: int = 0


def bench_processes(options: ProcessOptions) -> dict[str, Any]:
    """Every static split between what the phases want, colocation, and the planner from the middle one, in turn.

    Raises RuntimeError when a cluster does not start.
    """
    load, rates, shares = process_load(options)
    splits = sensible_splits(shares, options.workers)
    middle = splits[len(splits) // 2]
    runs: dict[str, Any] = {}
    for split in splits:
        runs[f"static {split}+{options.workers - split}"] = _run(options, load, split, auto=False)
    runs["colocated"] = _run(options, load, 0, auto=False)
    runs["dynamic"] = _run(options, load, middle, auto=True)
    dynamic, others = runs["dynamic"], [run for name, run in runs.items() if name.startswith("static")]
    return {
        "clock": "real",
        "options": {name: getattr(options, name) for name in ProcessOptions.__dataclass_fields__},
        "rates": rates,
        "prefill_shares": shares,
        "runs": runs,
        "over_best_static": {key: _over(dynamic, others, key) for key in _GOODPUT},
        "over_colocated": {key: _over(dynamic, [runs["colocated"]], key) for key in _GOODPUT},
    }


def _over(run: dict[str, Any], others: Sequence[dict[str, Any]], key: str) -> float:
    best = max(float(other[key]) for other in others)
    return round(float(run[key]) / max(1e-9, best), 3)


def sensible_splits(shares: dict[str, float], num_workers: int) -> list[int]:
    """From what the one phase wants to what the other wants, to whole workers; both roles have one at least."""
    low, high = round(min(shares.values()) * num_workers), round(max(shares.values()) * num_workers)
    return list(range(max(1, low), min(num_workers - 1, high) + 1))


def process_load(options: ProcessOptions) -> tuple[list[Arrival], dict[str, float], dict[str, float]]:
    """The load; the rate of each phase, which follows from the lengths; the share of its work that is prefill."""
    rng, figures = Random(options.seed), load_figures()
    arrivals: list[Arrival] = []
    kept = min(1.0, options.workers / options.of)
    rates: dict[str, float] = {}
    shares: dict[str, float] = {}
    for number, name in enumerate(list(figures) * options.rounds):
        some = _scaled(figures[name].sample(Random(f"lengths {options.seed} {name}"), 1.0, 4000.0), options)
        prefill_ms, decode_ms = mean_work_ms(some, options)
        rates[name] = round(options.load * options.workers * 1000.0 / (prefill_ms + decode_ms), 3)
        shares[name] = round(prefill_ms / (prefill_ms + decode_ms), 3)
        part = _scaled(figures[name].sample(rng, rates[name] / kept, options.phase_s), options)
        rows = zip(part.at.tolist(), part.prompts.tolist(), part.outputs.tolist(), strict=True)
        begin = number * options.phase_s
        ours = (row for row in rows if rng.random() < kept)
        arrivals += [Arrival(at_s=begin + at, prompt_tokens=p, output_tokens=o) for at, p, o in ours]
    return arrivals, rates, shares


def _scaled(some: Requests, options: ProcessOptions) -> Requests:
    outputs = np.clip(np.rint(some.outputs * options.output_scale), 2, CONTEXT // 4).astype(np.int64)
    prompts = np.clip(np.rint(some.prompts * options.prompt_scale), 4, options.most_prompt).astype(np.int64)
    return Requests(at=some.at, prompts=prompts, outputs=outputs)


def mean_work_ms(some: Requests, options: ProcessOptions) -> tuple[float, float]:
    """Of a mean request: a step for its prompt, and its share of the steps of a full batch within the TPOT target."""
    rows = options.rows
    while rows > 1 and options.step_ms + options.token_ms * rows > options.tpot_ms:
        rows -= 1
    step_ms = options.step_ms + options.token_ms * rows
    prefill_ms = options.step_ms + options.token_ms * float(some.prompts.mean())
    return prefill_ms, float(some.outputs.mean()) * step_ms / rows


def _run(options: ProcessOptions, load: Sequence[Arrival], split: int, *, auto: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="neap-bench-") as name:
        folder = Path(name) / MODEL
        folder.mkdir()
        write_checkpoint(folder)
        file = Path(name) / "cluster.yaml"
        file.write_text(yaml.safe_dump(_cluster(options, folder, split, auto=auto)), encoding="utf-8")
        with own_cluster(["--config", str(file)]) as cluster:
            samples, late_s = _ask(cluster.target, load, options.seed)
            with urllib.request.urlopen(f"{cluster.target.url}/status", timeout=30) as response:
                workers = json.load(response)["workers"]
    return {**_summed(options, load, samples), "late_ms": round(late_s * 1000, 1), "split_at_end": _split(workers)}


def _ask(target: Target, load: Sequence[Arrival], seed: int) -> tuple[list[Sample], float]:
    requests = bodies(served_model(target), load, seed)
    questions = [
        Question(request=target.post("/v1/completions", body), keep=True, at_s=arrival.at_s)
        for arrival, body in zip(load, requests, strict=True)
    ]
    replies, late_s = uvloop.run(run_open(target, questions, TIMEOUT_S))
    return [read_sample(reply) for reply in replies], late_s


def _summed(options: ProcessOptions, load: Sequence[Arrival], samples: Sequence[Sample]) -> dict[str, Any]:
    names = list(load_figures())
    seconds = options.phase_s * len(names) * options.rounds
    num, good = [0] * len(names), [0] * len(names)
    good_tokens = 0
    for arrival, sample in zip(load, samples, strict=True):
        phase = int(arrival.at_s / options.phase_s) % len(names)
        num[phase] += 1
        kept = sample.ttft_s * 1000 <= options.ttft_ms and sample.tpot_s * 1000 <= options.tpot_ms
        if kept and not sample.error:
            good[phase] += 1
            good_tokens += arrival.prompt_tokens + arrival.output_tokens
    well = [sample for sample in samples if not sample.error]
    shares = [g / max(1, n) for g, n in zip(good, num, strict=True)]
    return {
        "requests": len(load),
        "failures": len(samples) - len(well),
        "failure_kinds": dict(Counter(sample.error for sample in samples if sample.error)),
        "requests_per_s": round(len(load) / seconds, 3),
        "goodput_per_s": round(sum(good) / seconds, 3),
        "goodput_tokens_per_s": round(good_tokens / seconds, 1),
        "phases_share": round(sum(shares) / len(shares), 4),
        "shares": {name: round(share, 4) for name, share in zip(names, shares, strict=True)},
        "ttft_p50_ms": round(percentile([s.ttft_s * 1000 for s in well], 0.5), 1),
        "ttft_p90_ms": round(percentile([s.ttft_s * 1000 for s in well], 0.9), 1),
        "tpot_p50_ms": round(percentile([s.tpot_s * 1000 for s in well], 0.5), 2),
        "tpot_p90_ms": round(percentile([s.tpot_s * 1000 for s in well], 0.9), 2),
    }


def _split(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """Who does what at the end, and how many changes of roles there were: four epochs each."""
    epochs = [int(worker["epoch"]) for worker in workers]
    return {
        "prefill": sum(worker["role"] == "prefill" for worker in workers),
        "decode": sum(worker["role"] == "decode" for worker in workers),
        "changes": sum((epoch - 1) // 4 for epoch in epochs),
        "epochs": epochs,
    }


def _cluster(options: ProcessOptions, folder: Path, split: int, *, auto: bool) -> dict[str, Any]:
    """The cluster file."""
    pools = [{"role": "prefill", "workers": split}] if split else []
    return {
        "model": str(folder),
        "served_model_name": MODEL,
        "engine": {"max_num_seqs": options.rows, "max_step_ms": 400.0 if split else options.tpot_ms * 1.4},
        "pools": [*pools, {"role": "decode", "workers": options.workers - split}],
        "router": {"max_queue": 256, "traffic_window_s": WINDOW_S},
        "roles": {
            "auto": auto,
            "ttft_ms": options.ttft_ms,
            "tpot_ms": options.tpot_ms,
            "min_role_s": WINDOW_S,
        },
        "fake": {
            "vocab_size": VOCAB_SIZE,
            "num_blocks": 4096,
            "max_model_len": CONTEXT,
            "fixed_ms": options.step_ms,
            "ms_per_token": options.token_ms,
        },
    }
