"""Fills one step within its bounds (predicted ms, tokens) and turns it into the runner's ScheduledBatch."""

from __future__ import annotations

import numpy as np

from engine.scheduler.batch import NewBlocks, PromptScore, RowStart, ScheduledBatch
from engine.scheduler.request_state import Entry, LaunchedStep, Request, Seat, ServedCall
from engine.scheduler.step_cost import StepCost


class BatchBuilder:
    """One step in the making. Decode rows are added first; prefill chunks share what they leave."""

    def __init__(self, *, cost: StepCost, max_ms: float, max_tokens: int, block_size: int) -> None:
        self._cost = cost
        self._ms_left = max_ms - cost.fixed_ms
        self._tokens_left = max_tokens
        self._block_size = block_size
        self._decode: list[Entry] = []
        self._prefill: list[Entry] = []
        self._rows: set[int] = set()
        self._has_scores = False

    @property
    def num_tokens_left(self) -> int:
        """Query tokens that still fit."""
        return self._tokens_left

    @property
    def has_room(self) -> bool:
        """Whether looking for another chunk makes sense."""
        return self._tokens_left > 0 and (self._ms_left > 0 or not self._prefill)

    def has(self, seat: Seat) -> bool:
        """Whether this step already computes something of `seat`."""
        return seat.row in self._rows

    def add_decode(self, request: Request, seat: Seat) -> None:
        """One query token, sampled. Never refused for time: decode rows cannot be cut."""
        self._add(self._decode, Entry(owner=request, seat=seat, query_len=1, samples=True))
        seat.num_sampling += 1

    def chunk_len(self, num_computed: int, end: int) -> int:
        """Query tokens of the next chunk of a prefill that stands at `num_computed`; 0 if nothing fits any more.

        Ends at a block boundary or at `end` where possible. The first chunk of a step gets up to one block even when
        the time is spent, so that prefills always advance.
        """
        at_most = min(end - num_computed, self._tokens_left)
        if at_most <= 0:
            return 0
        is_first = not self._prefill
        num_fitting = self._cost.longest_chunk(self._ms_left, num_computed, at_most)
        to_boundary = self._block_size - num_computed % self._block_size
        if is_first:
            num_fitting = max(num_fitting, min(at_most, to_boundary))
        if num_computed + num_fitting == end:
            return num_fitting
        if num_fitting < to_boundary:
            return num_fitting if is_first else 0
        return num_fitting - (num_computed + num_fitting) % self._block_size

    def add_chunk(
        self,
        owner: Request | ServedCall,
        seat: Seat,
        query_len: int,
        *,
        samples: bool,
        scores: range | None = None,
    ) -> None:
        """A prefill chunk of `query_len` tokens (from `chunk_len`)."""
        self._add(self._prefill, Entry(owner=owner, seat=seat, query_len=query_len, samples=samples, scores=scores))
        seat.num_sampling += int(samples)
        self._has_scores = self._has_scores or scores is not None

    def _add(self, group: list[Entry], entry: Entry) -> None:
        assert not entry.seat.closed, f"row {entry.seat.row} is scheduled after it was given up"
        assert not self.has(entry.seat), f"row {entry.seat.row} is scheduled twice in one step"
        group.append(entry)
        self._rows.add(entry.seat.row)
        self._ms_left -= self._cost.row_ms(entry.query_len, entry.seat.num_computed)
        self._tokens_left -= entry.query_len

    def build(self, step: int) -> tuple[ScheduledBatch, LaunchedStep] | None:
        """The batch and what to remember until it lands; None when nothing was added."""
        entries = self._decode + self._prefill
        if not entries:
            return None
        batch = ScheduledBatch(
            step=step,
            starts=self._starts(entries),
            new_blocks=self._new_blocks(entries),
            rows=np.array([entry.seat.row for entry in entries], dtype=np.int32),
            query_lens=np.array([entry.query_len for entry in entries], dtype=np.int32),
            num_computed=np.array([entry.seat.num_computed for entry in entries], dtype=np.int32),
            samples=np.array([entry.samples for entry in entries], dtype=np.bool_),
            num_decode_rows=len(self._decode),
            scores=_scores(entries) if self._has_scores else (),
        )
        for entry in entries:
            entry.seat.num_computed += entry.query_len
            entry.seat.last_step = step
        return batch, LaunchedStep(step=step, entries=entries)

    def _starts(self, entries: list[Entry]) -> tuple[RowStart, ...]:
        starts = []
        for entry in entries:
            if not entry.seat.started:
                entry.seat.started = True
                starts.append(entry.owner.row_start(entry.seat.row))
        return tuple(starts)

    def _new_blocks(self, entries: list[Entry]) -> tuple[NewBlocks, ...]:
        news = []
        for entry in entries:
            seat = entry.seat
            if seat.num_told_blocks < len(seat.block_ids):
                told = np.array(seat.block_ids[seat.num_told_blocks :], dtype=np.int32)
                news.append(NewBlocks(row=seat.row, first=seat.num_told_blocks, block_ids=told))
                seat.num_told_blocks = len(seat.block_ids)
        return tuple(news)


def _scores(entries: list[Entry]) -> tuple[PromptScore, ...]:
    scores = []
    for index, entry in enumerate(entries):
        if entry.scores is not None and isinstance(entry.owner, Request):
            num_top = entry.owner.params.prompt_logprobs
            assert num_top is not None, "only requests that ask for prompt logprobs are scored"
            scores.append(
                PromptScore(index=index, first_position=entry.scores.start, count=len(entry.scores), num_top=num_top)
            )
    return tuple(scores)
