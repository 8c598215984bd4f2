"""Which node a worker goes to, by what nodes have and what was given out. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control.backend import Needs


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster. `accelerators` are type names as Ray knows them ("H100")."""

    node_id: str
    name: str
    address: str
    num_cpus: float
    num_gpus: float = 0
    accelerators: frozenset[str] = frozenset()


def place(needs: Needs, nodes: list[Node], taken: dict[str, list[Needs]]) -> Node | None:
    """The node with most GPUs, then CPUs, left that has room. `taken` lists by node id what runs there already."""

    def left(node: Node) -> tuple[float, float]:
        running = taken.get(node.node_id, [])
        return node.num_gpus - sum(n.num_gpus for n in running), node.num_cpus - sum(n.num_cpus for n in running)

    fitting = [
        node
        for node in nodes
        if left(node) >= (needs.num_gpus, 0)
        and left(node)[1] >= needs.num_cpus
        and (not needs.accelerator_type or needs.accelerator_type in node.accelerators)
    ]
    # a worker without GPUs goes where fewest GPUs are, so that it takes no CPUs from those that need them
    return max(fitting, key=lambda n: (left(n)[0] if needs.num_gpus else -n.num_gpus, left(n)[1], n.name), default=None)


def describe(needs: Needs, nodes: list[Node]) -> str:
    """Why nothing fits, for people: what is wanted and what each node has."""
    wanted = f"{needs.num_cpus:g} CPU" + (f", {needs.num_gpus:g} GPU" if needs.num_gpus else "")
    wanted += f", accelerator {needs.accelerator_type}" if needs.accelerator_type else ""
    have = "; ".join(
        f"{n.name}: {n.num_cpus:g} CPU, {n.num_gpus:g} GPU {', '.join(sorted(n.accelerators))}" for n in nodes
    )
    return f"no node has {wanted} left (nodes: {have.strip() or 'none'})"
