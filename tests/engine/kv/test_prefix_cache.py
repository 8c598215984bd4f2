"""Block keys name everything a block's KV depends on; the cache maps one key to one block."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv.prefix_cache import HashChain, PrefixCache, root_key

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_keys_follow_the_written_rule() -> None:
    root = root_key("model", b"salt")
    first, second = HashChain(root, 2).hash_blocks(array([1, 2, 3, 4, 5]))
    assert first == hashlib.sha256(root + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
    assert second == hashlib.sha256(first + bytes([3, 0, 0, 0, 4, 0, 0, 0])).digest()


def test_root_separates_identity_from_salt() -> None:
    roots = {root_key("ab", b"c"), root_key("a", b"bc"), root_key("abc"), root_key("ab", b"d")}
    assert len(roots) == 4


@settings(deadline=None)
@given(token_lists, st.lists(st.integers(0, 40), max_size=4))
def test_hashing_in_steps_equals_hashing_at_once(tokens: list[int], cuts: list[int]) -> None:
    chain = HashChain(root_key("m"), 4)
    for cut in sorted(cuts):
        chain.hash_blocks(array(tokens[:cut]))
    assert chain.hash_blocks(array(tokens)) == HashChain(root_key("m"), 4).hash_blocks(array(tokens))


@settings(deadline=None)
@given(token_lists, token_lists)
def test_equal_keys_mean_equal_prefixes(one: list[int], other: list[int]) -> None:
    keys_one = HashChain(root_key("m"), 4).hash_blocks(array(one))
    keys_other = HashChain(root_key("m"), 4).hash_blocks(array(other))
    for i, (a, b) in enumerate(zip(keys_one, keys_other, strict=False)):
        assert (a == b) == (one[: 4 * i + 4] == other[: 4 * i + 4])


def test_asking_for_fewer_tokens_gives_fewer_keys() -> None:
    chain = HashChain(root_key("m"), 4)
    keys = chain.hash_blocks(array(list(range(12))))
    assert chain.hash_blocks(array(list(range(9)))) == keys[:2]


def test_a_block_cannot_hold_two_keys() -> None:
    cache = PrefixCache()
    assert cache.insert(b"a", 1)
    with pytest.raises(AssertionError, match="already holds a key"):
        cache.insert(b"b", 1)


class PrefixCacheMachine(RuleBasedStateMachine):
    """The cache against a plain dict from key to block."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache()
        self.model: dict[bytes, int] = {}
        self.next_block = 1

    @rule(key=st.integers(0, 9))
    def insert(self, key: int) -> None:
        name = bytes([key])
        is_new = name not in self.model
        assert self.cache.insert(name, self.next_block) is is_new
        if is_new:
            self.model[name] = self.next_block
        self.next_block += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.remove(self.model.pop(key))

    @rule(keys=st.lists(st.integers(0, 9), max_size=6))
    def match(self, keys: list[int]) -> None:
        expected = []
        for key in keys:
            if bytes([key]) not in self.model:
                break
            expected.append(self.model[bytes([key])])
        assert self.cache.match([bytes([key]) for key in keys]) == expected

    @invariant()
    def holds_exactly_the_model(self) -> None:
        assert dict(self.cache.items()) == self.model
        assert len(self.cache) == len(self.model)
        assert all(block_id in self.cache for block_id in self.model.values())


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
