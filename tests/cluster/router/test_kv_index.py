"""The KV index: a hint that is fed, guessed, corrected and bounded."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.kv_index import MAX_GUESSED_BLOCKS, KVIndex, PrefixHint, block_keys
from cluster.types import CacheNews
from engine.kv.prefix_cache import SHORT_KEY_BYTES, HashChain, root_key

BLOCK = 4
ROOT = root_key("model")


def prompt(num_blocks: int, *, first: int = 3, extra: int = 1) -> bytes:
    """Whole blocks and a few tokens more."""
    return np.arange(first, first + num_blocks * BLOCK + extra, dtype="<i4").tobytes()


def keys(tokens: bytes, first: int = 0, last: int | None = None) -> bytes:
    return b"".join(
        key.to_bytes(SHORT_KEY_BYTES, "little") for key in list(block_keys(ROOT, tokens, BLOCK))[first:last]
    )


def match(index: KVIndex, tokens: bytes, salt: bytes = b"") -> PrefixHint:
    return index.match(tokens, identity="model", cache_salt=salt, block_size=BLOCK)


def index_with(**stored: bytes) -> KVIndex:
    index = KVIndex()
    for worker_id, news in stored.items():
        index.update(worker_id, CacheNews(stored=news))
    return index


def test_keys_are_those_of_the_prefix_cache() -> None:
    tokens = prompt(5)
    chain = HashChain(ROOT, BLOCK).hash_blocks(np.frombuffer(tokens, dtype="<i4"))
    assert keys(tokens) == b"".join(key[:SHORT_KEY_BYTES] for key in chain)


def test_each_worker_is_hinted_with_its_own_prefix() -> None:
    tokens = prompt(6)
    index = index_with(
        d1=keys(tokens, 0, 4), d2=keys(tokens, 0, 2), d3=keys(tokens, 1, 6), d4=keys(prompt(6, first=99))
    )
    hint = match(index, tokens)
    assert {worker_id: hint.tokens(worker_id) for worker_id in ("d1", "d2", "d3", "d4")} == {
        "d1": 4 * BLOCK,
        "d2": 2 * BLOCK,
        "d3": 0,
        "d4": 0,
    }


def test_the_last_tokens_block_is_never_wanted() -> None:
    tokens = prompt(3, extra=0)
    assert match(index_with(d1=keys(tokens)), tokens).tokens("d1") == 2 * BLOCK


def test_another_salt_or_model_shares_nothing() -> None:
    tokens = prompt(3)
    index = index_with(d1=keys(tokens))
    assert match(index, tokens, salt=b"other").held == {}
    assert index.match(tokens, identity="other", cache_salt=b"", block_size=BLOCK).held == {}
    assert match(index, tokens).tokens("d1") == 3 * BLOCK


def test_evicted_blocks_end_the_prefix() -> None:
    tokens = prompt(6)
    index = index_with(d1=keys(tokens), d2=keys(tokens))
    index.update("d1", CacheNews(evicted=keys(tokens, 3, 5)))
    hint = match(index, tokens)
    assert (hint.tokens("d1"), hint.tokens("d2")) == (3 * BLOCK, 6 * BLOCK)
    index.update("d2", CacheNews(evicted=keys(tokens)))
    index.update("d1", CacheNews(evicted=keys(tokens)))
    assert len(index) == 0, "what nobody holds takes no room"


def test_a_new_link_begins_anew() -> None:
    first, second = prompt(3), prompt(3, first=50)
    index = index_with(d1=keys(first))
    index.update("d1", CacheNews(reset=True, stored=keys(second)))
    assert match(index, first).held == {} and match(index, second).tokens("d1") == 3 * BLOCK


def test_a_lost_worker_is_forgotten_and_many_lost_ones_leave_no_trace() -> None:
    tokens = prompt(2)
    index = KVIndex()
    index.update("stays", CacheNews(stored=keys(tokens)))
    for i in range(100):
        index.update(f"w{i}", CacheNews(stored=keys(tokens, 0, 1) + keys(prompt(1, first=1000 + 10 * i))))
        index.forget(f"w{i}")
        assert match(index, tokens).held == {"stays": 2}
    assert len(index) <= 2 + 33, "what only lost workers held is swept in time"


def test_the_oldest_keys_go_first_at_the_bound() -> None:
    index = KVIndex(max_keys=8)
    old, used, new = prompt(3), prompt(3, first=50), prompt(4, first=90)
    for tokens in (old, used):
        index.update("d1", CacheNews(stored=keys(tokens)))
    index.update("d2", CacheNews(stored=keys(used)))  # comes again
    index.update("d1", CacheNews(stored=keys(new)))
    assert len(index) == 8
    assert match(index, old).held == {} and match(index, used).tokens("d1") == 3 * BLOCK


def test_a_dispatch_is_guessed_ahead_of_the_workers_news() -> None:
    index, tokens = KVIndex(), prompt(5)
    hint = match(index, tokens)
    assert hint.held == {}
    index.guess(hint, "p1")
    assert match(index, tokens).tokens("p1") == 5 * BLOCK


def test_a_prompt_that_nobody_holds_is_not_hashed_to_its_end() -> None:
    hint = match(index_with(d1=keys(prompt(2))), prompt(500))
    assert len(hint.keys) == 2 + MAX_GUESSED_BLOCKS and hint.tokens("d1") == 2 * BLOCK


def test_the_first_reply_corrects_what_was_promised_too_much() -> None:
    tokens = prompt(6)
    index = index_with(d1=keys(tokens), d2=keys(tokens))
    hint = match(index, tokens)
    assert index.correct(hint, "d1", 2 * BLOCK)
    after = match(index, tokens)
    assert (after.tokens("d1"), after.tokens("d2")) == (2 * BLOCK, 6 * BLOCK)
    assert not index.correct(hint, "d2", 6 * BLOCK) and not index.correct(hint, "unknown", 0)


def test_what_came_after_the_hint_is_not_corrected_away() -> None:
    tokens = prompt(4)
    index = index_with(d1=keys(tokens))
    hint = match(index, tokens)
    index.update("d1", CacheNews(stored=keys(tokens, 2, 4)))  # it computed them for this very request
    index.correct(hint, "d1", 0)
    index.update("d1", CacheNews(stored=keys(tokens, 0, 2)))
    assert match(index, tokens).tokens("d1") == 4 * BLOCK


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=40))
def test_it_agrees_with_plain_sets(ops: list[tuple[str, int, int, bool]]) -> None:
    index = KVIndex()
    held: dict[str, set[int]] = {name: set() for name in "abc"}
    tokens = prompt(6)
    all_keys = list(block_keys(ROOT, tokens, BLOCK))
    for worker_id, block, kind, gone in ops:
        news = all_keys[block].to_bytes(SHORT_KEY_BYTES, "little")
        if kind == 3:
            index.forget(worker_id)
            held[worker_id] = set()
        elif gone:
            index.update(worker_id, CacheNews(evicted=news))
            held[worker_id].discard(block)
        else:
            index.update(worker_id, CacheNews(stored=news))
            held[worker_id].add(block)
    hint = match(index, tokens)
    for worker_id, blocks in held.items():
        prefix = next(i for i in range(7) if i not in blocks)
        assert hint.tokens(worker_id) == prefix * BLOCK
