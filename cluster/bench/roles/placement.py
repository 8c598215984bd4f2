"""Where a request goes: the formulas of cluster/router/predict.py and policies/predicted.py, for all workers at once.

The real policy makes one object per worker and request, 0.3 ms with 64 workers; a bench of millions of requests keeps
the same numbers in arrays. A test places the same requests with both. What the router knows is as old here as there:
its own dispatches at once, growth and free memory by the last heartbeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.bench.roles.machine import Job
from cluster.bench.roles.setting import Hardware, tables_of
from cluster.router.accuracy import Accuracy
from cluster.router.policies.predicted import MAX_DECODERS_COMPARED, MAX_SOURCES_COMPARED
from cluster.router.predict import ALONE, REMOTE
from cluster.worker.admission import PLACES_PER_ROW

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Workers by index; `source` -1: the decode worker alone. Times in ms."""

    decode: int
    source: int
    ttft_ms: float
    overhead_ms: float
    work_ms: float  # what the one that prefills is busy with it


@dataclass(kw_only=True)
class _Source:
    """The best source. ready_ms: until its KV is at the decode worker."""

    worker: int
    compute_ms: float
    ready_ms: float


@dataclass(slots=True)
class _Decoder:
    """A decode worker that is worth a closer look: cluster/router/predict.py's DecodeCosts."""

    worker: int
    running: int
    step_ms: float
    tpot_ms: float
    row_wait_ms: float
    memory_wait_ms: float
    slows_ms: float
    least_ms: float

    def wait_ms(self, ready_ms: float) -> float:
        """For a prompt that is computed elsewhere for so long: Predictor.remote; 0 ms by itself: alone."""
        return max(self.memory_wait_ms, self.row_wait_ms - ready_ms)


class Placer:
    """One router's view of all workers. Who decodes and who prefills is set by `set_roles`."""

    def __init__(self, hardware: Sequence[Hardware]) -> None:
        num = len(hardware)
        self.accuracy = Accuracy()
        self.sequences = np.zeros(num, dtype=np.intp)
        self.keys = np.zeros(num)
        self.others_keys = np.zeros(num)
        self.free_tokens = np.full(num, math.inf)
        self.decoders: Indices = np.zeros(0, dtype=np.intp)
        self.sources: Indices = np.zeros(0, dtype=np.intp)
        self._hardware = list(hardware)
        self._kinds = sorted({one.name: one for one in hardware}.items())
        names = [name for name, _ in self._kinds]
        self._kind = np.array([names.index(one.name) for one in hardware], dtype=np.intp)
        self._most = np.array([one.max_num_seqs for one in hardware], dtype=np.intp)
        self._capacity = PLACES_PER_ROW * self._most
        self._least_most = int(self._most.min())
        widest = int(self._most.max())
        self._tables = np.array(
            [[one.profile.decode_step_ms(rows, 0) for rows in range(widest + 1)] for one in hardware]
        )
        self._row_key_ms = np.array([one.profile.decode_ms_per_row_kilocontext / 1000 for one in hardware])
        self._step_tables = [tables_of(one) for one in hardware]
        self._kind_tables = [tables_of(one) for _, one in self._kinds]
        self._works: list[dict[Job, float]] = [{} for _ in hardware]
        self._sum_ms, self._head_ms, self._head_since = np.zeros(num), np.zeros(num), np.zeros(num)

    def set_roles(self, decoders: Sequence[int], sources: Sequence[int]) -> None:
        """Who is ready in which role."""
        self.decoders, self.sources = np.array(decoders, dtype=np.intp), np.array(sources, dtype=np.intp)

    # ---- what the router counts

    def assign(self, now: float, job: Job, placed: Placed) -> None:
        """It was sent."""
        num_tokens = job.prompt + job.produced
        self.sequences[placed.decode] += 1
        self.keys[placed.decode] += num_tokens
        if placed.work_ms <= 0.0:
            return
        worker = placed.decode if placed.source < 0 else placed.source
        works = self._works[worker]
        if not works:
            self._head_since[worker], self._head_ms[worker] = now, placed.work_ms
        works[job] = placed.work_ms
        self._sum_ms[worker] += placed.work_ms

    def prefilled(self, now: float, job: Job) -> None:
        """Its first token came, or its attempt is over."""
        worker = job.decode if job.source < 0 else job.source
        works = self._works[worker]
        if job not in works:
            return
        is_head = next(iter(works)) is job
        self._sum_ms[worker] -= works.pop(job)
        if not works:
            self._sum_ms[worker] = self._head_ms[worker] = 0.0
        elif is_head:
            self._head_since[worker], self._head_ms[worker] = now, works[next(iter(works))]

    def unassign(self, job: Job, produced: int) -> None:
        """Its decode worker has it no more; `produced` as it was when it was assigned."""
        self.sequences[job.decode] -= 1
        self.keys[job.decode] -= job.prompt + produced

    # ---- choosing

    def place(self, now: float, job: Job, *, source_is_given: bool = False) -> Placed | None:
        """The least predicted cost; None while no decode worker has room.

        `source_is_given`: its KV is held by the worker that gives it away, so only who decodes is to be chosen.
        """
        most = self._capacity if source_is_given or len(self.sources) else self._most
        index = self.decoders[self.sequences[self.decoders] < most[self.decoders]]
        if not len(index):
            return None
        num_outputs = min(float(job.asked), self.accuracy.mean_outputs)
        near = self._nearest(index, job, num_outputs)
        if source_is_given:
            best = min(near, key=lambda one: one.least_ms)
            return Placed(decode=best.worker, source=-1, ttft_ms=0.0, overhead_ms=0.0, work_ms=0.0)
        wanted = job.prompt + job.produced - 1
        source = self._soonest(now, wanted, min(job.done, wanted))
        overhead_ms = self.accuracy.overheads.get(REMOTE, 0.0)
        more = max(0.0, num_outputs - 1)
        best_cost, chosen, is_alone = math.inf, near[0], True
        for one in near:
            own_ms = one.tpot_ms * more + one.slows_ms
            if source is None or one.running < self._most[one.worker]:
                first_ms, work_ms = self._alone_ms(now, one, job)
                cost_ms = own_ms + one.wait_ms(0.0) + first_ms + one.running * work_ms
                if cost_ms < best_cost:
                    best_cost, chosen, is_alone = cost_ms, one, True
            if source is not None:
                wait_ms = one.wait_ms(source.ready_ms)
                cost_ms = own_ms + wait_ms + source.ready_ms + one.step_ms + one.tpot_ms + overhead_ms
                if cost_ms < best_cost:
                    best_cost, chosen, is_alone = cost_ms, one, False
        return self._placed(now, chosen, job, None if is_alone else source)

    def _nearest(self, index: Indices, job: Job, num_outputs: float) -> list[_Decoder]:
        """The decode workers that cost least, of any placement there."""
        rows = self.sequences[index]
        mine = job.prompt + job.produced + num_outputs
        if int(rows.max()) < self._least_most and mine <= float(self.free_tokens[index].min()):
            return _least(index, rows, *self._costs_with_room(index, rows, mine - num_outputs / 2, num_outputs))
        table, most, slope = self._tables, self._most[index], self._row_key_ms[index]
        running, with_us = np.minimum(rows, most), np.minimum(rows + 1, most)
        keys = self.keys[index] + self.others_keys[index]
        num_tokens = job.prompt + job.produced
        keys_ms = slope * keys
        step_ms = np.where(running > 0, table[index, running] + keys_ms, 0.0)
        tpot_ms = table[index, with_us] + keys_ms + slope * (num_tokens + num_outputs / 2)
        answer_ms = num_outputs * tpot_ms
        row_wait_ms = np.maximum(0, rows + 1 - most) * answer_ms / most
        is_full = (running > 0) & (num_tokens + num_outputs > self.free_tokens[index])
        memory_wait_ms = np.where(is_full, answer_ms / np.maximum(running, 1), 0.0)
        others = with_us - 1
        without_ms = np.where(others == running, step_ms, table[index, others] + np.where(others > 0, keys_ms, 0.0))
        slows_ms = others * num_outputs * np.maximum(0.0, tpot_ms - without_ms)
        least_ms = np.maximum(row_wait_ms, memory_wait_ms) + answer_ms + slows_ms
        return _least(index, running, step_ms, tpot_ms, row_wait_ms, memory_wait_ms, slows_ms, least_ms)

    def _costs_with_room(
        self, index: Indices, rows: Indices, mine: float, num_outputs: float
    ) -> tuple[Array, Array, Array, Array, Array, Array]:
        """The same where no batch and no memory is full, which is most of the time: half the work."""
        slope = self._row_key_ms[index]
        keys_ms = slope * (self.keys[index] + self.others_keys[index]) * (rows > 0)
        at = index * self._tables.shape[1] + rows
        flat = self._tables.ravel()
        step_ms = flat[at] + keys_ms
        tpot_ms = flat[at + 1] + keys_ms + slope * mine
        slows_ms = rows * (num_outputs * np.maximum(0.0, tpot_ms - step_ms))
        none = np.zeros(len(index))
        return step_ms, tpot_ms, none, none, slows_ms, num_outputs * tpot_ms + slows_ms

    def backlog_ms(self, now: float, index: Indices) -> Array:
        """Predicted time until new prefill work would begin: cluster/router/backlog.py."""
        elapsed = np.maximum(0.0, (now - self._head_since[index]) * 1000)
        left: Array = np.maximum(0.0, self._sum_ms[index] - np.minimum(self._head_ms[index], elapsed))
        return left

    def _soonest(self, now: float, wanted: int, cached: int) -> _Source | None:
        """The source whose KV is there first: the same for every decode worker, as links are the source's here."""
        index = self.sources
        if not len(index):
            return None
        kinds = [tables.prefill_ms(wanted - cached, cached) for tables in self._kind_tables]
        queue_ms = self.backlog_ms(now, index)
        ready_ms = queue_ms + (np.array(kinds)[self._kind[index]] if len(kinds) > 1 else kinds[0])
        if len(index) > MAX_SOURCES_COMPARED:
            some = np.argpartition(ready_ms, MAX_SOURCES_COMPARED)[:MAX_SOURCES_COMPARED].tolist()
        else:
            some = list(range(len(index)))
        best: _Source | None = None
        for at in some:
            worker = int(index[at])
            compute_ms = kinds[self._kind[worker]]
            there_ms = float(ready_ms[at]) + self.transfer_ms(worker, wanted, compute_ms)
            if best is None or there_ms < best.ready_ms:
                best = _Source(worker=worker, compute_ms=compute_ms, ready_ms=there_ms)
        return best

    def transfer_ms(self, source: int, moved: int, compute_ms: float) -> float:
        """What of the KV is still to be moved when the source has computed: SourceCosts.transfer_ms."""
        hardware = self._hardware[source]
        if moved <= 0:
            return hardware.latency_ms
        most = hardware.profile.max_step_tokens
        last = moved if moved <= most else moved % most or most
        ms_per_token = hardware.profile.kv_token_bytes / (hardware.gb_per_s * 1e6)
        if last >= moved:
            return hardware.latency_ms + moved * ms_per_token
        return hardware.latency_ms + max(last * ms_per_token, moved * ms_per_token - compute_ms)

    def _alone_ms(self, now: float, one: _Decoder, job: Job) -> tuple[float, float]:
        """(first token but for the wait for a row, computing) by the decode worker alone: Predictor.alone."""
        worker = one.worker
        tables = self._step_tables[worker]
        compute_ms = tables.prefill_ms(job.prompt + job.produced, 0)
        num_steps = max(1.0, compute_ms / tables.max_step_ms)
        riding_ms = max(0.0, one.step_ms - tables.decode[1]) if one.running else 0.0
        queue_ms = 0.0
        if self._works[worker]:
            elapsed_ms = max(0.0, (now - float(self._head_since[worker])) * 1000)
            queue_ms = max(0.0, float(self._sum_ms[worker]) - min(float(self._head_ms[worker]), elapsed_ms))
        overhead_ms = self.accuracy.overheads.get(ALONE, 0.0)
        return queue_ms + compute_ms + num_steps * riding_ms + one.step_ms / 2 + overhead_ms, compute_ms

    def _placed(self, now: float, one: _Decoder, job: Job, source: _Source | None) -> Placed:
        kind = ALONE if source is None else REMOTE
        overhead_ms = self.accuracy.overheads.get(kind, 0.0)
        if source is None:
            first_ms, work_ms = self._alone_ms(now, one, job)
            first_ms += one.wait_ms(0.0)
        else:
            steps_ms, work_ms = one.step_ms + one.tpot_ms, source.compute_ms
            first_ms = one.wait_ms(source.ready_ms) + source.ready_ms + steps_ms + overhead_ms
        return Placed(
            decode=one.worker,
            source=-1 if source is None else source.worker,
            ttft_ms=first_ms,
            overhead_ms=overhead_ms,
            work_ms=work_ms,
        )


def _least(index: Indices, running: Indices, *costs: Array) -> list[_Decoder]:
    """Those with the least cost (the last of the arrays)."""
    values: tuple[npt.NDArray[Any], ...] = (index, running, *costs)
    if len(index) > MAX_DECODERS_COMPARED:
        near = np.argpartition(costs[-1], MAX_DECODERS_COMPARED)[:MAX_DECODERS_COMPARED]
        values = tuple(value[near] for value in values)
    return [_Decoder(*one) for one in zip(*(value.tolist() for value in values), strict=True)]
