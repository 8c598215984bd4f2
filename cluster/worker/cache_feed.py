"""What routers are told of this worker's prefix cache: everything on a new link, then changes, a few times a second.

Pure: the shell (worker/service.py, sim/worker.py) says which links stand and sends what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.types import CACHE_KEY_BYTES, CacheNews

FEED_S = 0.1  # at most so often
MAX_KEYS = 1 << 16  # that a new link is told of: the ones stored last


class CacheFeed:
    """Mirrors the keys of the rank's cache, and remembers what which link knows."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}
        self._changed: dict[bytes, bool] = {}
        self._told: tuple[str, ...] = ()
        self.due_at = float("-inf")  # no news before, unless `soon`

    def on_step(self, stored: bytes, evicted: bytes) -> None:
        """What a step of the rank brought (StepEvents)."""
        if not stored and not evicted:
            return
        for key in _split(evicted):
            self._held.pop(key, None)
            self._changed[key] = False
        for key in _split(stored):
            self._held.pop(key, None)
            self._held[key] = None
            self._changed[key] = True

    def news(self, now: float, links: Sequence[str], *, soon: bool = False) -> list[tuple[str, CacheNews]]:
        """What to send now, by link. Nothing within FEED_S of the last time, unless `soon`."""
        if (now < self.due_at and not soon) or (not self._changed and links == self._told):
            return []
        new = [link for link in links if link not in self._told]
        if not (new or self._changed):
            return []
        self.due_at = now + FEED_S
        news: list[tuple[str, CacheNews]] = []
        if self._changed:
            stored = b"".join([key for key, present in self._changed.items() if present])
            evicted = b"".join([key for key, present in self._changed.items() if not present])
            change = CacheNews(stored=stored, evicted=evicted)
            news += [(link, change) for link in links if link in self._told]
        if new:
            keys = list(self._held)[-MAX_KEYS:]
            news += [(link, CacheNews(reset=True, stored=b"".join(keys))) for link in new]
        self._changed = {}
        self._told = tuple(links)
        return news


def _split(keys: bytes) -> list[bytes]:
    return [keys[start : start + CACHE_KEY_BYTES] for start in range(0, len(keys), CACHE_KEY_BYTES)]
