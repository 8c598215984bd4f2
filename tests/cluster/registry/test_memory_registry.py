"""The registry's map under explicit time."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from cluster.registry.memory_registry import MemoryRegistry
from cluster.types import WorkerInfo


def info(worker_id: str = "decode-0", incarnation: str = "a", epoch: int = 1) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id, incarnation=incarnation, epoch=epoch, role="decode", state="ready", address="127.0.0.1:1"
    )


def test_a_higher_epoch_of_an_incarnation_wins_and_a_lower_one_is_ignored() -> None:
    registry = MemoryRegistry()
    assert registry.put(info(epoch=2), ttl_s=5, now=0)
    assert not registry.put(info(epoch=1), ttl_s=5, now=1)
    assert registry.put(info(epoch=3), ttl_s=5, now=2)
    assert [w.epoch for w in registry.workers()] == [3]


def test_a_new_incarnation_replaces_whatever_its_epoch_and_the_old_one_stays_gone() -> None:
    registry = MemoryRegistry()
    registry.put(info(incarnation="a", epoch=9), ttl_s=5, now=0)
    assert registry.put(info(incarnation="b", epoch=1), ttl_s=5, now=1)
    assert not registry.put(info(incarnation="a", epoch=10), ttl_s=5, now=2)
    assert not registry.remove("decode-0", "a", now=2)
    assert [w.incarnation for w in registry.workers()] == ["b"]


def test_entries_end_with_their_time_and_come_back_when_said_again() -> None:
    registry = MemoryRegistry()
    registry.put(info(), ttl_s=5, now=0)
    registry.put(info(), ttl_s=5, now=3)
    assert registry.next_expiry() == 8
    assert not registry.expire(7.9)
    assert registry.expire(8)
    assert registry.workers() == ()
    assert registry.put(info(), ttl_s=5, now=9)
    assert len(registry.workers()) == 1


def test_a_removed_incarnation_is_not_believed_again() -> None:
    registry = MemoryRegistry()
    registry.put(info(), ttl_s=5, now=0)
    assert registry.remove("decode-0", "a", now=1)
    assert not registry.put(info(epoch=5), ttl_s=5, now=2)
    assert registry.put(info(incarnation="b"), ttl_s=5, now=2)


def test_the_version_grows_only_when_the_answer_changes() -> None:
    registry = MemoryRegistry()
    registry.put(info(), ttl_s=5, now=0)
    version = registry.version
    registry.put(info(), ttl_s=5, now=1)
    assert registry.version == version
    registry.put(structs.replace(info(), state="draining"), ttl_s=5, now=1)
    assert registry.version > version


statements = st.tuples(st.sampled_from(["w0", "w1"]), st.sampled_from("abc"), st.integers(0, 4))


@given(st.lists(statements, max_size=40))
def test_readers_never_see_an_epoch_fall_or_an_incarnation_return(history: list[tuple[str, str, int]]) -> None:
    registry = MemoryRegistry()
    seen: dict[str, list[WorkerInfo]] = {"w0": [], "w1": []}
    for now, (worker_id, incarnation, epoch) in enumerate(history):
        registry.put(info(worker_id, incarnation, epoch), ttl_s=1000, now=float(now))
        for worker in registry.workers():
            if worker not in seen[worker.worker_id][-1:]:
                seen[worker.worker_id].append(worker)
    for workers in seen.values():
        runs = [w.incarnation for i, w in enumerate(workers) if i == 0 or workers[i - 1].incarnation != w.incarnation]
        assert len(runs) == len(set(runs))
        assert all(a.epoch < b.epoch for a, b in itertools.pairwise(workers) if a.incarnation == b.incarnation)
