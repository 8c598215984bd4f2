"""Rows and blocks of everything that computes, and the rule that neither is given back while a launched step may
still touch it: a puller must never get a block that a kernel may still write.

A seat of a pull has blocks only: it gets a row when its request is to run, so prompts that are computed elsewhere
keep nobody out of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.kv.block_manager import BlockManager
from engine.scheduler.request_state import NO_ROW, Seat


class Seats:
    """Gives out seats: rows [0, num_own) for own requests, the next num_served for served calls."""

    def __init__(self, blocks: BlockManager, num_own: int, num_served: int) -> None:
        self.blocks = blocks
        self.num_rows = num_own + num_served
        self._own_rows = list(range(num_own - 1, -1, -1))
        self._served_rows = list(range(self.num_rows - 1, num_own - 1, -1))
        self._landed_step = -1
        self._closing: list[Seat] = []

    @property
    def num_closing(self) -> int:
        """Seats given up whose step in flight has not landed: their rows and blocks come back when it does."""
        return len(self._closing)

    def num_free_rows(self, *, served: bool) -> int:
        """Rows that can be opened now."""
        return len(self._served_rows if served else self._own_rows)

    def open(self, matched: Sequence[int], num_new: int, *, served: bool) -> Seat:
        """Take a row, pin `matched` cached blocks (checked by `can_take`) and allocate `num_new` more."""
        seat = self.reserve(matched, num_new, served=served)
        self.take_row(seat)
        return seat

    def reserve(self, matched: Sequence[int], num_new: int, *, served: bool = False) -> Seat:
        """`open` without a row."""
        self.blocks.acquire(matched, served=served)
        block_ids = list(matched) + self.blocks.allocate(num_new, served=served)
        num_cached = len(matched) * self.blocks.block_size
        return Seat(row=NO_ROW, served=served, block_ids=block_ids, num_computed=num_cached, num_landed=num_cached)

    def take_row(self, seat: Seat) -> None:
        """Give a reserved seat its row."""
        rows = self._served_rows if seat.served else self._own_rows
        assert rows, "no free row: check num_free_rows first"
        assert seat.row == NO_ROW, f"a seat takes a second row beside {seat.row}"
        seat.row = rows.pop()

    def extend_match(self, seat: Seat, keys: Sequence[bytes]) -> None:
        """Swap blocks of a seat that has computed nothing for ones that were cached since it was opened."""
        assert not seat.started, "a started row's block table is fixed"
        num_had = seat.num_computed // self.blocks.block_size
        matched = self.blocks.match(keys)
        if len(matched) <= num_had:
            return
        fresh = matched[num_had:]
        self.blocks.acquire(fresh, served=seat.served)
        self.blocks.release(seat.block_ids[num_had : len(matched)], served=seat.served)
        seat.block_ids[num_had : len(matched)] = fresh
        seat.num_computed = seat.num_landed = len(matched) * self.blocks.block_size

    def is_in_flight(self, seat: Seat) -> bool:
        """Whether a launched step that has not landed touches this seat."""
        return seat.last_step > self._landed_step

    def close(self, seat: Seat) -> None:
        """Give a seat up: at once, or when the last step that touches it lands."""
        assert not seat.closed, f"row {seat.row} is closed twice"
        seat.closed = True
        if self.is_in_flight(seat):
            self._closing.append(seat)
        else:
            self._give_back(seat)

    def end_reservation(self, seat: Seat) -> None:
        """End a seat whose blocks the caller has dealt with; it never had a row."""
        assert not seat.closed and seat.row == NO_ROW, "only a reserved seat is ended this way"
        seat.closed = True
        seat.block_ids = []

    def landed(self, step: int) -> None:
        """All kernels up to `step` have completed."""
        self._landed_step = step
        if not self._closing:
            return
        still_closing = []
        for seat in self._closing:
            if seat.last_step > step:
                still_closing.append(seat)
            else:
                self._give_back(seat)
        self._closing = still_closing

    def _give_back(self, seat: Seat) -> None:
        self.blocks.release(seat.block_ids, served=seat.served)
        if seat.row != NO_ROW:
            (self._served_rows if seat.served else self._own_rows).append(seat.row)
