"""Which node a worker goes to."""

from __future__ import annotations

from cluster.control.backend import Needs
from cluster.control.placement import Node, describe, place

PLAIN = Node(node_id="a", name="plain", address="10.0.0.1", num_cpus=4)
H100 = Node(node_id="b", name="big", address="10.0.0.2", num_cpus=8, num_gpus=2, accelerators=frozenset({"H100"}))
L4 = Node(node_id="c", name="small", address="10.0.0.3", num_cpus=8, num_gpus=1, accelerators=frozenset({"L4"}))
NODES = [PLAIN, H100, L4]


def test_a_worker_without_gpus_leaves_gpu_nodes_alone() -> None:
    assert place(Needs(num_cpus=2), NODES, {}) == PLAIN
    assert place(Needs(num_cpus=6), NODES, {}) == L4


def test_gpu_workers_spread_to_where_most_are_left_and_stop_when_none_is() -> None:
    taken: dict[str, list[Needs]] = {}
    needs = Needs(num_gpus=1)
    names = []
    while (node := place(needs, NODES, taken)) is not None:
        names.append(node.name)
        taken.setdefault(node.node_id, []).append(needs)
    assert sorted(names) == ["big", "big", "small"]


def test_the_accelerator_type_is_respected() -> None:
    assert place(Needs(num_gpus=1, accelerator_type="L4"), NODES, {}) == L4
    assert place(Needs(num_gpus=2, accelerator_type="L4"), NODES, {}) is None


def test_the_reason_says_what_is_wanted_and_what_there_is() -> None:
    words = describe(Needs(num_cpus=2, num_gpus=4, accelerator_type="B200"), NODES)
    assert "2 CPU, 4 GPU, accelerator B200" in words
    assert "big: 8 CPU, 2 GPU H100" in words
    assert "nodes: none" in describe(Needs(), [])
