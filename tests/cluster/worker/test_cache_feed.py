"""What routers are told of the prefix cache: everything once, then changes, not too often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.kv_index import KVIndex
from cluster.types import CacheNews
from cluster.worker import cache_feed
from cluster.worker.cache_feed import FEED_S, CacheFeed


def key(number: int) -> bytes:
    return number.to_bytes(8, "little")


def keys(*numbers: int) -> bytes:
    return b"".join(key(number) for number in numbers)


def test_a_new_link_is_told_everything_and_then_what_changes() -> None:
    feed = CacheFeed()
    feed.on_step(keys(1, 2, 3), b"")
    assert feed.news(0.0, ["a"]) == [("a", CacheNews(reset=True, stored=keys(1, 2, 3)))]
    feed.on_step(keys(4), keys(2))
    news = dict(feed.news(1.0, ["a", "b"]))
    assert news["a"] == CacheNews(stored=keys(4), evicted=keys(2))
    assert news["b"] == CacheNews(reset=True, stored=keys(1, 3, 4))


def test_changes_are_gathered() -> None:
    feed = CacheFeed()
    feed.news(0.0, ["a"])
    feed.on_step(keys(1), b"")
    assert feed.news(FEED_S / 2, ["a"]) == []
    feed.on_step(keys(2), keys(1))
    assert feed.news(FEED_S, ["a"]) == [("a", CacheNews(stored=keys(2), evicted=keys(1)))]
    assert feed.news(9.0, ["a"], soon=True) == [], "nothing new"


def test_a_heartbeat_takes_along_what_waits() -> None:
    feed = CacheFeed()
    feed.news(0.0, ["a"])
    feed.on_step(keys(1), b"")
    assert feed.news(0.01, ["a"], soon=True) == [("a", CacheNews(stored=keys(1)))]


def test_a_link_that_comes_back_begins_anew() -> None:
    feed = CacheFeed()
    feed.on_step(keys(1), b"")
    feed.news(0.0, ["a/1"])
    feed.on_step(keys(2), b"")
    assert feed.news(1.0, []) == []
    assert feed.news(2.0, ["a/2"]) == [("a/2", CacheNews(reset=True, stored=keys(1, 2)))]


def test_a_large_cache_is_told_in_part() -> None:
    feed = CacheFeed()
    feed.on_step(keys(*range(cache_feed.MAX_KEYS + 5)), b"")
    ((_, news),) = feed.news(0.0, ["a"])
    assert len(news.stored) == 8 * cache_feed.MAX_KEYS and news.stored.endswith(key(cache_feed.MAX_KEYS + 4))


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.sampled_from("abc")), max_size=20))
def test_every_router_ends_up_knowing_the_cache(steps: list[tuple[set[int], set[int], str]]) -> None:
    feed, held = CacheFeed(), set()
    indices: dict[str, KVIndex] = {}
    for now, (stored, evicted, link) in enumerate(steps):
        feed.on_step(keys(*(stored - evicted)), keys(*evicted))
        held = held - evicted | (stored - evicted)
        indices.setdefault(link, KVIndex())
        for link_id, news in feed.news(float(now), sorted(indices)):
            indices[link_id].update("w", news)
        for index in indices.values():
            assert set(index._values) == held
