"""Blocks: one owner while written, shared when READY, evicted oldest first, quarantined while a copy may write."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.kv.block_manager import BlockManager, BlockState


def manager(num_blocks: int = 5, **kwargs: float | bool) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, block_size=16, **kwargs)  # type: ignore[arg-type]


def committed(blocks: BlockManager, *keys: bytes) -> list[int]:
    taken = blocks.allocate(len(keys))
    for block_id, key in zip(taken, keys, strict=True):
        blocks.commit(block_id, key, checksum=7)
    return taken


def test_the_null_block_is_never_given_out() -> None:
    assert sorted(manager(5).allocate(4)) == [1, 2, 3, 4]


def test_a_block_is_not_matched_before_its_commit() -> None:
    blocks = manager()
    (block_id,) = blocks.allocate(1)
    assert blocks.match([b"k"]) == []
    assert blocks.commit(block_id, b"k", checksum=9)
    assert blocks.match([b"k"]) == [block_id]
    assert blocks.checksum(block_id) == 9


def test_the_second_block_of_a_key_stays_uncached_and_is_freed_at_once() -> None:
    blocks = manager()
    first, second = blocks.allocate(2)
    assert blocks.commit(first, b"k", 1)
    assert not blocks.commit(second, b"k", 1)
    blocks.release([second])
    assert blocks.state(second) is BlockState.FREE
    blocks.release([first])
    assert blocks.state(first) is BlockState.READY and blocks.num_free == 4


def test_the_least_recently_released_is_evicted_first_and_tails_before_heads() -> None:
    blocks = manager(5)
    old = committed(blocks, b"a", b"b")
    new = committed(blocks, b"c", b"d")
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate(1) == [old[1]]
    assert blocks.match([b"a"]) == [old[0]] and blocks.match([b"b"]) == []
    assert blocks.allocate(2) == [old[0], new[1]]


def test_matched_blocks_do_not_count_as_room_for_the_rest() -> None:
    blocks = manager(4)
    cached = committed(blocks, b"a", b"b")
    blocks.release(cached)
    assert blocks.can_take(cached, 1) and not blocks.can_take(cached, 2)
    assert blocks.can_take([], 3)


def test_a_quarantined_block_is_not_free_until_its_copy_has_ended() -> None:
    blocks = manager(4)
    taken = blocks.allocate(2)
    blocks.quarantine(taken)
    assert (blocks.num_free, blocks.num_referenced, blocks.num_quarantined) == (1, 0, 2)
    blocks.end_quarantine(taken)
    assert (blocks.num_free, blocks.num_quarantined) == (3, 0)


def test_served_calls_share_their_quota_per_distinct_block() -> None:
    blocks = manager(11, served_fraction=0.3)
    cached = committed(blocks, b"a", b"b")
    assert blocks.served_quota == 3
    assert blocks.can_serve(cached, 1) and not blocks.can_serve(cached, 2)
    blocks.acquire(cached, served=True)
    blocks.acquire(cached, served=True)
    assert blocks.num_served == 2 and blocks.can_serve(cached, 1)
    blocks.release(cached, served=True)
    assert blocks.num_served == 2
    blocks.release(cached, served=True)
    assert blocks.num_served == 0


def test_without_prefix_caching_nothing_is_matched() -> None:
    blocks = manager(5, enable_prefix_caching=False)
    taken = committed(blocks, b"a")
    assert blocks.match([b"a"]) == []
    blocks.release(taken)
    assert blocks.state(taken[0]) is BlockState.FREE


@pytest.mark.parametrize(
    ("misuse", "sentence"),
    [
        (lambda blocks: blocks.allocate(5), "check before allocating"),
        (lambda blocks: blocks.release([1]), "released more often"),
        (lambda blocks: blocks.acquire(blocks.allocate(1)), "before it is READY"),
        (lambda blocks: blocks.commit(1, b"k", 0), "not LOADING"),
        (lambda blocks: blocks.quarantine([1]), "not LOADING"),
        (lambda blocks: blocks.end_quarantine([1]), "not in quarantine"),
        (lambda blocks: blocks.checksum(1), "has no checksum"),
    ],
)
def test_misuse_asserts_with_a_sentence(misuse, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match=sentence):
        misuse(manager())


def test_a_pool_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        manager(1)


class BlockManagerMachine(RuleBasedStateMachine):
    """Holders take, commit, share, release and quarantine blocks; a model keeps who holds what."""

    @initialize(num_blocks=st.integers(2, 12), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.blocks = BlockManager(num_blocks=num_blocks, block_size=16, enable_prefix_caching=caching)
        self.holders: list[tuple[list[int], bool]] = []  # (blocks, served)
        self.quarantined: list[list[int]] = []
        self.key_of: dict[int, bytes] = {}  # what is written in a READY block
        self.num_keys = 0

    def holder(self, data: st.DataObject) -> tuple[list[int], bool]:
        return self.holders[data.draw(st.integers(0, len(self.holders) - 1))]

    @rule(num=st.integers(1, 5), served=st.booleans())
    def allocate(self, num: int, served: bool) -> None:
        if num > self.blocks.num_free:
            with pytest.raises(AssertionError):
                self.blocks.allocate(num)
            return
        taken = self.blocks.allocate(num, served=served)
        in_use = {b for ids, _ in self.holders for b in ids} | {b for ids in self.quarantined for b in ids}
        assert not in_use & set(taken) and len(set(taken)) == num and 0 not in taken
        for block_id in taken:
            self.key_of.pop(block_id, None)
        self.holders.append((taken, served))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), fresh=st.booleans())
    def commit(self, data: st.DataObject, fresh: bool) -> None:
        block_ids, _ = self.holder(data)
        loading = [b for b in block_ids if self.blocks.state(b) is BlockState.LOADING]
        if not loading:
            return
        key = b"%d" % (self.num_keys if fresh else data.draw(st.integers(0, 5)))
        self.num_keys += 1
        was_held = bool(self.blocks.match([key]))
        cached = self.blocks.commit(loading[0], key, checksum=int(key) + 1000)
        self.key_of[loading[0]] = key
        assert not (cached and was_held)

    @rule(key=st.integers(0, 8), served=st.booleans())
    def share(self, key: int, served: bool) -> None:
        matched = self.blocks.match([b"%d" % key])
        if matched:
            assert self.key_of[matched[0]] == b"%d" % key, "a matched block holds another key's KV"
            self.blocks.acquire(matched, served=served)
            self.holders.append((matched, served))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holder(data)
        self.holders.remove(holder)
        self.blocks.release(holder[0], served=holder[1])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def abort_pull(self, data: st.DataObject) -> None:
        holder = self.holder(data)
        if holder[1]:
            return
        self.holders.remove(holder)
        loading = [b for b in holder[0] if self.blocks.state(b) is BlockState.LOADING]
        self.blocks.release([b for b in holder[0] if b not in loading])
        self.blocks.quarantine(loading)
        self.quarantined.append(loading)

    @precondition(lambda self: self.quarantined)
    @rule()
    def close_pull(self) -> None:
        self.blocks.end_quarantine(self.quarantined.pop(0))

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "blocks"):
            return
        refs = Counter(b for ids, _ in self.holders for b in ids)
        num_quarantined = sum(len(ids) for ids in self.quarantined)
        assert all(self.blocks.num_refs(b) == refs[b] for b in range(1, self.blocks.num_usable + 1))
        assert self.blocks.num_referenced == len(refs) and self.blocks.num_quarantined == num_quarantined
        assert self.blocks.num_free == self.blocks.num_usable - len(refs) - num_quarantined
        assert self.blocks.num_served == len({b for ids, served in self.holders if served for b in ids})
        for block_id, num in refs.items():
            assert num == 1 or self.blocks.state(block_id) is BlockState.READY, "a LOADING block has two owners"
        for key, block_id in self.blocks.cache.items():
            assert self.key_of[block_id] == key and self.blocks.checksum(block_id) == int(key) + 1000

    def teardown(self) -> None:
        if not hasattr(self, "blocks"):
            return
        for block_ids, served in self.holders:
            self.blocks.release(block_ids, served=served)
        for block_ids in self.quarantined:
            self.blocks.end_quarantine(block_ids)
        assert self.blocks.num_free == self.blocks.num_usable and self.blocks.num_served == 0


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.long
def test_block_manager_machine_in_full() -> None:
    run_state_machine_as_test(
        BlockManagerMachine, settings=settings(max_examples=2000, stateful_step_count=80, deadline=None)
    )
