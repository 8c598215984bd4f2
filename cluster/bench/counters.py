"""A server's own counters, read from its /metrics before and after a load: what it says it did, beside what we saw."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from cluster.bench.load import Target

TIMEOUT_S = 10.0


def read_counters(target: Target) -> dict[str, float]:
    """Every counter, and every histogram's count and sum, by name and labels. Empty where there is no /metrics."""
    request = urllib.request.Request(f"{target.url}/metrics")
    if target.api_key:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return parse_counters(response.read().decode())
    except (OSError, ValueError, urllib.error.URLError):
        return {}


def parse_counters(text: str) -> dict[str, float]:
    """Of the Prometheus text format; `_created` and buckets are left out. Raises ValueError for another text."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type not in ("counter", "histogram"):
            continue
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What moved between the two, by how much."""
    moved = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: round(value, 6) for name, value in sorted(moved.items()) if value}
