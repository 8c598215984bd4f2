"""Fills one step within its bounds (predicted ms, tokens) and turns it into the runner's ScheduledBatch."""

from __future__ import annotations

import numpy as np

from engine.scheduler.batch import NewBlocks, PromptScore, RowStart, ScheduledBatch
from engine.scheduler.request_state import Entry, LaunchedStep, Request, Seat, ServedCall
from engine.scheduler.step_cost import StepCost

_INT32 = np.dtype(np.int32)


class BatchBuilder:
    """One step in the making. Decode rows are added first; prefill chunks share what they leave."""

    def __init__(self, *, cost: StepCost, max_ms: float, max_tokens: int, block_size: int) -> None:
        self._cost = cost
        self._ms_left = max_ms - cost.fixed_ms
        self._rows_ms = 0.0
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
        row_ms = self._cost.row_ms(entry.query_len, entry.seat.num_computed)
        self._rows_ms += row_ms
        self._ms_left -= row_ms
        self._tokens_left -= entry.query_len

    def build(self, step: int) -> tuple[ScheduledBatch, LaunchedStep] | None:
        """The batch and what to remember until it lands; None when nothing was added."""
        entries = self._decode + self._prefill
        if not entries:
            return None
        starts: list[RowStart] = []
        new_blocks: list[NewBlocks] = []
        rows, query_lens, num_computed, samples = [], [], [], []
        for entry in entries:
            seat = entry.seat
            if not seat.started:
                seat.started = True
                starts.append(entry.owner.row_start(seat.row))
            if seat.num_told_blocks < len(seat.block_ids):
                told = np.array(seat.block_ids[seat.num_told_blocks :], _INT32)
                new_blocks.append(NewBlocks(row=seat.row, first=seat.num_told_blocks, block_ids=told))
                seat.num_told_blocks = len(seat.block_ids)
            rows.append(seat.row)
            query_lens.append(entry.query_len)
            num_computed.append(seat.num_computed)
            samples.append(entry.samples)
            seat.num_computed += entry.query_len
            seat.last_step = step
        batch = ScheduledBatch(
            step=step,
            starts=tuple(starts),
            new_blocks=tuple(new_blocks),
            rows=np.array(rows, _INT32),
            query_lens=np.array(query_lens, _INT32),
            num_computed=np.array(num_computed, _INT32),
            samples=np.array(samples, np.bool_),
            num_decode_rows=len(self._decode),
            scores=_scores(entries) if self._has_scores else (),
            predicted_ms=self._cost.fixed_ms + self._rows_ms,
        )
        return batch, LaunchedStep(step=step, entries=entries)


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
