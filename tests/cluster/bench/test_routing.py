"""What `neap bench routing` is to show, at a size for a test. On the virtual clock, so the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.bench.routing import RoutingOptions, bench_routing, run_prefixes, run_unequal
from cluster.bench.routing_processes import ProcessOptions, _cluster
from cluster.cli.bench_routing import _PREFIXES, _UNEQUAL
from cluster.config import ClusterConfig

OPTIONS = RoutingOptions(requests=150, rate=60.0, output_tokens=16, conversations=30, turns=4)


@pytest.fixture(scope="module")
def unequal() -> dict[str, dict[str, Any]]:
    return {policy: run_unequal(OPTIONS, policy) for policy in ("predicted", "least-loaded", "round-robin")}


@pytest.fixture(scope="module")
def prefixes() -> dict[str, dict[str, Any]]:
    return {policy: run_prefixes(OPTIONS, policy) for policy in ("predicted", "prefix-aware", "least-loaded")}


def test_predicted_milliseconds_are_near_the_real_ones(unequal: dict[str, dict[str, Any]]) -> None:
    assert unequal["predicted"]["ttft_error_p50"] <= 0.2
    assert unequal["predicted"]["tpot_error_p50"] <= 0.2
    assert not any(figures["failures"] for figures in unequal.values())


def test_predicted_gets_more_out_of_unequal_pools(unequal: dict[str, dict[str, Any]]) -> None:
    goodput = {policy: figures["goodput_per_s"] for policy, figures in unequal.items()}
    assert goodput["predicted"] >= 1.3 * goodput["round-robin"]
    assert goodput["predicted"] > goodput["least-loaded"]


def test_prefix_aware_policies_compute_less_and_answer_sooner(prefixes: dict[str, dict[str, Any]]) -> None:
    plain = prefixes["least-loaded"]
    for policy in ("predicted", "prefix-aware"):
        assert prefixes[policy]["computed_tokens"] < 0.8 * plain["computed_tokens"]
        assert prefixes[policy]["ttft_p50_ms"] < 0.9 * plain["ttft_p50_ms"]
    assert prefixes["prefix-aware"]["cache_hit_tokens"] > plain["cache_hit_tokens"]


def test_the_same_seed_gives_the_same_figures(unequal: dict[str, dict[str, Any]]) -> None:
    assert run_unequal(OPTIONS, "round-robin") == unequal["round-robin"]


def test_the_tables_show_what_was_measured() -> None:
    small = RoutingOptions(requests=12, conversations=3, turns=2)
    figures = bench_routing(small, ("predicted", "round-robin", "least-loaded"))
    assert set(_UNEQUAL) <= set(figures["unequal"]["predicted"])
    assert set(_PREFIXES) <= set(figures["prefixes"]["predicted"])
    assert set(figures["ratios"]) == {"goodput_over_round_robin", "goodput_over_least_loaded"}


def test_the_real_pools_are_slowed_by_their_cluster_file(tmp_path: Path) -> None:
    config = ClusterConfig.model_validate(_cluster(ProcessOptions(slowdown=3.0), "predicted", tmp_path))
    specs = config.worker_specs(model_path=str(tmp_path), registry="r:1", log_dir="")
    speeds = {spec.worker_id: (spec.fake.fixed_ms, spec.fake.ms_per_token) for spec in specs if spec.fake}
    slow, fast = (60.0, pytest.approx(0.6)), (20.0, 0.2)
    assert speeds == {
        **{f"fast-{role}-0": fast for role in ("prefill", "decode")},
        **{f"slow-{role}-0": slow for role in ("prefill", "decode")},
    }
    (router, *_) = config.router_specs(model_path=str(tmp_path), registry="r:1")
    assert router.policy == "predicted"
