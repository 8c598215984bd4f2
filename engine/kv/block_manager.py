"""Who holds which KV block: states, reference counts, eviction, quarantine and the quota of served calls.

    FREE -> LOADING        allocate: one holder, its KV is being computed or copied in
    LOADING -> READY       commit: complete, checksummed, immutable; cached unless another block holds the same key
    LOADING -> FREE        release: never became complete (the last block of a request)
    LOADING -> QUARANTINED quarantine: its request is gone but a copy may still write into it
    QUARANTINED -> FREE    end_quarantine: the copy reached its terminal state
    READY -> FREE          last holder released and not cached; or evicted, least recently used first

A READY block without holders that is cached stays READY and counts as free (evictable). Torch-free, clock-free.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import Enum

from engine.kv.layout import NULL_BLOCK
from engine.kv.prefix_cache import PrefixCache


class BlockState(Enum):
    """See the module's picture."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
    QUARANTINED = "quarantined"


class BlockManager:
    """Allocates blocks 1..num_blocks-1 (block 0 is the null block). Misuse is our own fault and asserts."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        served_fraction: float = 1.0,
        enable_prefix_caching: bool = True,
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is the null block), got {num_blocks}")
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self.served_quota = int(self.num_usable * served_fraction)
        self.cache = PrefixCache()
        self._caching = enable_prefix_caching
        self._state = [BlockState.FREE] * num_blocks
        self._num_refs = [0] * num_blocks
        self._num_served_refs: dict[int, int] = {}
        self._checksum = [0] * num_blocks
        self._free = deque(range(NULL_BLOCK + 1, num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self.num_quarantined = 0  # blocks that a late copy may still write

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free ones and unreferenced cached ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_referenced(self) -> int:
        """Blocks with at least one holder."""
        return self.num_usable - len(self._free) - len(self._evictable) - self.num_quarantined

    @property
    def num_served(self) -> int:
        """Distinct blocks that served calls hold."""
        return len(self._num_served_refs)

    def state(self, block_id: int) -> BlockState:
        """The state of one block."""
        return self._state[block_id]

    def num_refs(self, block_id: int) -> int:
        """Holders of one block."""
        return self._num_refs[block_id]

    def checksum(self, block_id: int) -> int:
        """The checksum that a READY block was committed with."""
        assert self._state[block_id] is BlockState.READY, f"block {block_id} has no checksum: it is not READY"
        return self._checksum[block_id]

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest prefix of `keys`. Nothing is pinned: `acquire` before anything is allocated."""
        return self.cache.match(keys)

    def can_take(self, matched: Sequence[int], num_new: int) -> bool:
        """Whether `acquire(matched)` then `allocate(num_new)` would succeed."""
        num_matched_free = len([block_id for block_id in matched if self._num_refs[block_id] == 0])
        return num_new <= self.num_free - num_matched_free

    def can_serve(self, matched: Sequence[int], num_new: int) -> bool:
        """Whether a served call taking these blocks stays within the quota of served blocks."""
        num_extra = len([block_id for block_id in matched if block_id not in self._num_served_refs])
        return self.num_served + num_extra + num_new <= self.served_quota

    def acquire(self, block_ids: Iterable[int], *, served: bool = False) -> None:
        """Add one holder to each of these READY blocks."""
        for block_id in block_ids:
            assert self._state[block_id] is BlockState.READY, f"block {block_id} is shared before it is READY"
            self._evictable.pop(block_id, None)
            self._hold(block_id, served)

    def allocate(self, num_blocks: int, *, served: bool = False) -> list[int]:
        """Take blocks, LOADING with one holder each. The caller has checked `num_free` (or `can_take`)."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free: check before allocating"
        taken = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._evictable.popitem(last=False)
                self.cache.remove(block_id)
            self._state[block_id] = BlockState.LOADING
            self._hold(block_id, served)
            taken.append(block_id)
        return taken

    def commit(self, block_id: int, key: bytes, checksum: int) -> bool:
        """A complete block's KV is in memory. Returns whether it is cached: not if another block holds the same key."""
        assert self._state[block_id] is BlockState.LOADING, f"block {block_id} is {self._state[block_id]}, not LOADING"
        self._state[block_id] = BlockState.READY
        self._checksum[block_id] = checksum
        return self._caching and self.cache.insert(key, block_id)

    def release(self, block_ids: Sequence[int], *, served: bool = False) -> None:
        """Drop one holder of each block; later blocks of a sequence are evicted before earlier ones."""
        num_refs, cache = self._num_refs, self.cache
        for block_id in reversed(block_ids):
            self._drop(block_id, served)
            if num_refs[block_id] > 0:
                continue
            if block_id in cache:
                self._evictable[block_id] = None
            else:
                self._set_free(block_id)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """The holder of these LOADING blocks is gone, a copy into them is not."""
        for block_id in block_ids:
            assert self._state[block_id] is BlockState.LOADING, f"block {block_id} is not LOADING: nothing writes it"
            self._drop(block_id, served=False)
            self._state[block_id] = BlockState.QUARANTINED
            self.num_quarantined += 1

    def end_quarantine(self, block_ids: Iterable[int]) -> None:
        """No copy will write these blocks any more."""
        for block_id in block_ids:
            assert self._state[block_id] is BlockState.QUARANTINED, f"block {block_id} is not in quarantine"
            self.num_quarantined -= 1
            self._set_free(block_id)

    def _hold(self, block_id: int, served: bool) -> None:
        self._num_refs[block_id] += 1
        if served:
            self._num_served_refs[block_id] = self._num_served_refs.get(block_id, 0) + 1

    def _drop(self, block_id: int, served: bool) -> None:
        assert self._num_refs[block_id] > 0, f"block {block_id} is released more often than it was taken"
        self._num_refs[block_id] -= 1
        if served:
            num_left = self._num_served_refs.pop(block_id) - 1
            if num_left:
                self._num_served_refs[block_id] = num_left

    def _set_free(self, block_id: int) -> None:
        self._state[block_id] = BlockState.FREE
        self._free.append(block_id)
