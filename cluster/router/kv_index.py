"""Which worker may hold which KV blocks: one router's hint, never a truth.

    key of a block -> bit set of workers, and when it last came        keys are chained hashes, so a prefix is a walk

Fed by the links (CacheNews), guessed ahead at each dispatch (both workers are about to hold the prompt), corrected by
each first reply: workers that held less than was expected lose what was expected of them. The prompt is hashed only as
far as anybody holds it. Bounded: the keys that came longest ago go first. No I/O.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator

import msgspec

from cluster.types import CACHE_KEY_BYTES, CacheNews
from engine.kv.prefix_cache import root_key

MAX_KEYS = 1 << 18  # some 40 MB; at 16 tokens a block 4 million tokens
MAX_GUESSED_BLOCKS = 8  # a dispatch hashes at most so many blocks that nobody is known to hold
_TOKEN_BYTES = 4
_TICK_BITS = 40
_TICKS = (1 << _TICK_BITS) - 1


class PrefixHint(msgspec.Struct, frozen=True, kw_only=True):
    """What the index says of one prompt. `held` is blocks by worker; `tick` is when it was asked."""

    keys: tuple[int, ...]
    held: dict[str, int]
    block_size: int
    tick: int

    def tokens(self, worker_id: str) -> int:
        """Tokens of the prompt that a worker may hold."""
        return self.held.get(worker_id, 0) * self.block_size


class KVIndex:
    """Keys of all workers of one router. A value is (bit set of workers, tick of the last change) in one int."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._values: dict[int, int] = {}
        self._bit_of: dict[str, int] = {}
        self._workers: list[str] = []  # by bit; "" for one that is gone and still in some values
        self._gone = 0
        self._tick = 0
        self._roots: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._values)

    # ---- what workers say

    def update(self, worker_id: str, news: CacheNews) -> None:
        """What a worker's cache has taken in and given up since its last news."""
        if news.reset:
            self.forget(worker_id)
        bit = self._bit(worker_id)
        self._tick += 1
        for key in _split(news.evicted):
            self._drop(key, bit)
        self._add(_split(news.stored), bit)

    def forget(self, worker_id: str) -> None:
        """A worker is gone, or says everything anew."""
        number = self._bit_of.pop(worker_id, None)
        if number is None:
            return
        self._workers[number] = ""
        self._gone |= 1 << number
        if self._gone.bit_count() > 32:
            self._sweep()

    # ---- what the router asks and learns

    def match(self, prompt: bytes, *, identity: str, cache_salt: bytes, block_size: int) -> PrefixHint:
        """Who holds how many blocks of the prompt's beginning. The last token's block is never wanted."""
        held: dict[str, int] = {}
        keys: list[int] = []
        num_blocks = (len(prompt) // _TOKEN_BYTES - 1) // block_size
        alive = sum(1 << number for number in self._bit_of.values()) if self._values else 0
        guesses = MAX_GUESSED_BLOCKS
        for count, key in enumerate(
            block_keys(self._root(identity, cache_salt), prompt[: num_blocks * block_size * _TOKEN_BYTES], block_size)
        ):
            still = alive & (self._values.get(key, 0) >> _TICK_BITS) if alive else 0
            if still != alive:
                self._note(held, alive & ~still, count)
                alive = still
            if not alive:
                if not guesses:
                    break
                guesses -= 1
            keys.append(key)
        self._note(held, alive, len(keys))
        return PrefixHint(keys=tuple(keys), held=held, block_size=block_size, tick=self._tick)

    def guess(self, hint: PrefixHint, worker_id: str) -> None:
        """A worker is about to hold what was hashed of a prompt, because it was just sent there."""
        first = hint.held.get(worker_id, 0)
        self._add(hint.keys[first:], self._bit(worker_id), tick=hint.tick)

    def correct(self, hint: PrefixHint, worker_id: str, cached_tokens: int) -> bool:
        """The first reply: how many tokens were cached at most. Returns whether the hint had promised more.

        What came after the hint was given is known better, and stays.
        """
        expected, actual = hint.held.get(worker_id, 0), cached_tokens // hint.block_size
        if actual >= expected or worker_id not in self._bit_of:
            return False
        bit = self._bit(worker_id)
        for key in hint.keys[actual:expected]:
            value = self._values.get(key)
            if value is not None and (value & _TICKS) <= hint.tick:
                self._drop(key, bit)
        return True

    # ---- inside

    def _bit(self, worker_id: str) -> int:
        number = self._bit_of.get(worker_id)
        if number is None:
            number = self._bit_of[worker_id] = len(self._workers)
            self._workers.append(worker_id)
        return 1 << number

    def _root(self, identity: str, cache_salt: bytes) -> bytes:
        if cache_salt:
            return root_key(identity, cache_salt)
        root = self._roots.get(identity)
        if root is None:
            self._roots = {identity: (root := root_key(identity))}  # one model at a time
        return root

    def _note(self, held: dict[str, int], bits: int, num_blocks: int) -> None:
        while bits and num_blocks:
            low = bits & -bits
            held[self._workers[low.bit_length() - 1]] = num_blocks
            bits ^= low

    def _add(self, keys: Iterable[int], bit: int, tick: int | None = None) -> None:
        values, stamp = self._values, self._tick if tick is None else tick
        for key in keys:
            old = values.pop(key, 0)  # and again at the end: the oldest go first
            values[key] = ((old >> _TICK_BITS | bit) << _TICK_BITS) | max(old & _TICKS, stamp)
        while len(values) > self._max_keys:
            del values[next(iter(values))]

    def _drop(self, key: int, bit: int) -> None:
        value = self._values.get(key)
        if value is None:
            return
        workers = (value >> _TICK_BITS) & ~bit & ~self._gone
        if workers:
            self._values[key] = workers << _TICK_BITS | value & _TICKS
        else:
            del self._values[key]

    def _sweep(self) -> None:
        """Number the workers anew without those that are gone. Takes some 50 ms at MAX_KEYS, once in 32 losses."""
        alive = [worker_id for worker_id in self._workers if worker_id]
        moved = [(1 << self._bit_of[worker_id], 1 << number) for number, worker_id in enumerate(alive)]
        swept: dict[int, int] = {}
        for key, value in self._values.items():
            old = value >> _TICK_BITS
            new = sum(after for before, after in moved if old & before)
            if new:
                swept[key] = new << _TICK_BITS | value & _TICKS
        self._values = swept
        self._workers = alive
        self._bit_of = {worker_id: number for number, worker_id in enumerate(alive)}
        self._gone = 0


def block_keys(root: bytes, tokens: bytes, block_size: int) -> Iterator[int]:
    """The keys of whole blocks as CacheNews has them, one by one: see engine/kv/prefix_cache.py."""
    size = block_size * _TOKEN_BYTES
    parent = root
    for start in range(0, len(tokens) - size + 1, size):
        parent = hashlib.sha256(parent + tokens[start : start + size]).digest()
        yield int.from_bytes(parent[:CACHE_KEY_BYTES], "little")


def _split(keys: bytes) -> tuple[int, ...]:
    num_keys = len(keys) // CACHE_KEY_BYTES
    return struct.unpack(f"<{num_keys}Q", keys[: num_keys * CACHE_KEY_BYTES])
