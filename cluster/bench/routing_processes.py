"""Two pools of unequal speed as real processes: `neap serve` over exact fakes, one pool slowed, an open-loop load.

What the virtual clock leaves out is in here: gRPC, event loops, Python's own time, whatever else the machine does. So
the figures vary, and the speeds are those of a slow model: a step must be long beside all that.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.bench.own_cluster import MODEL, own_cluster
from cluster.bench.serve_bench import Targets, bench_serve
from cluster.bench.words import VOCAB_SIZE, write_checkpoint
from cluster.bench.workload import LoadOptions

POLICIES = ("predicted", "least-loaded", "round-robin")
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """One prefill and one decode worker per pool. A step takes `step_ms` and `token_ms` per token, slowed or not."""

    requests: int = 120
    rate: float = 8.0
    slowdown: float = 3.0
    step_ms: float = 20.0
    token_ms: float = 0.2
    prompt_tokens: int = 256
    output_tokens: int = 24
    ttft_ms: float = 600.0
    tpot_ms: float = 80.0
    seed: int = 0


def bench_processes(options: ProcessOptions) -> dict[str, Any]:
    """Each policy on a cluster of its own, the same load. Raises RuntimeError when one does not start."""
    runs = {policy: _run(options, policy) for policy in POLICIES}
    goodput = {policy: figures["goodput_per_s"] for policy, figures in runs.items()}
    return {
        "clock": "real",
        "options": {name: getattr(options, name) for name in ProcessOptions.__dataclass_fields__},
        "unequal": runs,
        "ratios": {
            f"goodput_over_{name.replace('-', '_')}": round(goodput["predicted"] / goodput[name], 3)
            for name in ("round-robin", "least-loaded")
            if goodput[name]
        },
    }


def _run(options: ProcessOptions, policy: str) -> dict[str, Any]:
    load = LoadOptions(
        num_requests=options.requests,
        rate=options.rate,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        seed=options.seed,
        max_tokens=1024,
    )
    targets = Targets(ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
    with tempfile.TemporaryDirectory(prefix="neap-bench-") as name:
        folder = Path(name) / MODEL
        folder.mkdir()
        write_checkpoint(folder)
        file = Path(name) / "cluster.yaml"
        file.write_text(yaml.safe_dump(_cluster(options, policy, folder)), encoding="utf-8")
        with own_cluster(["--config", str(file)]) as cluster:
            figures = bench_serve(cluster.target, load, targets, TIMEOUT_S)
            with urllib.request.urlopen(f"{cluster.target.url}/status", timeout=30) as response:
                status = json.load(response)
    return {
        "requests": options.requests,
        "failures": sum(figures["failures"].values()),
        "goodput_per_s": figures["goodput"]["requests_per_s"],
        "goodput_share": figures["goodput"]["share"],
        **{f"{time}_{share}_ms": figures[f"{time}_ms"][share] for time in ("ttft", "tpot") for share in ("p50", "p90")},
        "ttft_error_p50": status["predictions"]["ttft_error_p50"],
        "tpot_error_p50": status["predictions"]["tpot_error_p50"],
        "decode_only_chosen": status["counters"].get("decode_only_chosen", 0),
    }


def _cluster(options: ProcessOptions, policy: str, folder: Path) -> dict[str, Any]:
    """The cluster file."""
    pools = [
        {"name": f"{name}-{role}", "role": role, "workers": 1, "fake_slowdown": slowdown}
        for name, slowdown in (("fast", 1.0), ("slow", options.slowdown))
        for role in ("prefill", "decode")
    ]
    return {
        "model": str(folder),
        "served_model_name": MODEL,
        "engine": {"max_num_seqs": 16},
        "pools": pools,
        "router": {"policy": policy, "max_queue": 1024},
        "roles": {"auto": False},  # the policies are compared on the same split
        "fake": {
            "vocab_size": VOCAB_SIZE,
            "num_blocks": 4096,
            "max_model_len": 2048,
            "fixed_ms": options.step_ms,
            "ms_per_token": options.token_ms,
        },
    }
