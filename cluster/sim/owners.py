"""Who owns which block, kept a second time from outside the block manager: no block ever has two owners.

allocate  nobody holds the block, and no copy that was started into it is still to report
acquire   no copy is under way into it
release   no more often than it was taken
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cluster.sim.worker import SimWorker
from cluster.worker.effects import StartCopy


class BlockOwners:
    """The shadow of one worker's block manager. `report` gets each violation in words."""

    def __init__(self, worker: SimWorker, report: Callable[[str], None]) -> None:
        self._name = worker.info.worker_id
        self._report = report
        blocks = worker.core.scheduler.blocks
        self._holders = [0] * (blocks.num_usable + 1)
        self._writers = [0] * (blocks.num_usable + 1)
        self._allocate = blocks.allocate
        self._acquire = blocks.acquire
        self._release = blocks.release
        self._quarantine = blocks.quarantine
        blocks.allocate = self._on_allocate  # type: ignore[method-assign]
        blocks.acquire = self._on_acquire  # type: ignore[method-assign]
        blocks.release = self._on_release  # type: ignore[method-assign]
        blocks.quarantine = self._on_quarantine  # type: ignore[method-assign]

    @property
    def num_held(self) -> int:
        """Blocks with at least one holder."""
        return sum(count > 0 for count in self._holders)

    def copy_started(self, effect: StartCopy) -> None:
        """Its targets are the copy's until it reports."""
        for target in effect.target_block_ids:
            if target >= 0:
                if self._holders[target] != 1:
                    self._report(f"{self._name}: a copy starts into block {target}, held {self._holders[target]} times")
                if self._writers[target]:
                    self._report(f"{self._name}: two copies write block {target}")
                self._writers[target] += 1

    def copy_ended(self, effect: StartCopy) -> None:
        """It has reported."""
        for target in effect.target_block_ids:
            if target >= 0:
                self._writers[target] -= 1

    def _on_allocate(self, num_blocks: int, *, served: bool = False) -> list[int]:
        taken = self._allocate(num_blocks, served=served)
        for block in taken:
            if self._holders[block] or self._writers[block]:
                what = f"{self._holders[block]} holders and {self._writers[block]} copies"
                self._report(f"{self._name}: block {block} is given away, it has {what}")
            self._holders[block] = 1
        return taken

    def _on_acquire(self, block_ids: Iterable[int], *, served: bool = False) -> None:
        ids = list(block_ids)
        self._acquire(ids, served=served)
        for block in ids:
            if self._writers[block]:
                self._report(f"{self._name}: block {block} is shared while a copy writes it")
            self._holders[block] += 1

    def _on_release(self, block_ids: Sequence[int], *, served: bool = False) -> None:
        self._release(block_ids, served=served)
        self._drop(block_ids)

    def _on_quarantine(self, block_ids: Iterable[int]) -> None:
        ids = list(block_ids)
        self._quarantine(ids)
        self._drop(ids)

    def _drop(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            self._holders[block] -= 1
            if self._holders[block] < 0:
                self._report(f"{self._name}: block {block} is released more often than it was taken")
