"""Policies by their name in the cluster file."""

from __future__ import annotations

from collections.abc import Callable

from cluster.router.policies.base import Placement, Policy
from cluster.router.policies.least_loaded import LeastLoaded
from cluster.router.policies.power_of_two import PowerOfTwo
from cluster.router.policies.predicted import Predicted
from cluster.router.policies.prefix_aware import PrefixAware
from cluster.router.policies.round_robin import RoundRobin
from cluster.router.views import RequestView, WorkerView

__all__ = ["POLICY_NAMES", "Placement", "Policy", "RequestView", "WorkerView", "policy_named"]

_POLICIES: dict[str, Callable[[], Policy]] = {
    policy.name: policy for policy in (Predicted, PrefixAware, LeastLoaded, PowerOfTwo, RoundRobin)
}
POLICY_NAMES = tuple(_POLICIES)


def policy_named(name: str) -> Policy:
    """The policy with this name. Raises ValueError for an unknown one."""
    if name not in _POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICY_NAMES)}, got {name!r}")
    return _POLICIES[name]()
