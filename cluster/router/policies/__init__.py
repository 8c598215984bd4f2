"""Policies by their name in the cluster file."""

from __future__ import annotations

from cluster.router.policies.base import Placement, Policy, RequestView, WorkerView
from cluster.router.policies.least_loaded import LeastLoaded
from cluster.router.policies.round_robin import RoundRobin

__all__ = ["POLICY_NAMES", "Placement", "Policy", "RequestView", "WorkerView", "policy_named"]

POLICY_NAMES = ("least-loaded", "round-robin")


def policy_named(name: str) -> Policy:
    """The policy with this name. Raises ValueError for an unknown one."""
    if name == "least-loaded":
        return LeastLoaded()
    if name == "round-robin":
        return RoundRobin()
    raise ValueError(f"policy must be one of {', '.join(POLICY_NAMES)}, got {name!r}")
