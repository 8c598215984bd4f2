"""One worker as a step machine, at the level of requests: decode batches go on analytically between changes.

    nothing to prefill   the rows that there are step until one ends; whatever comes cuts the run at the next boundary
    a prompt is queued   step by step: all rows, and as much of the queue as the step's bounds leave room for

A step takes what the worker's Profile says (engine/scheduler/profile.py; mixed steps as StepTimes.parts adds them), the
same tables that routers and planner predict from. No clock, no randomness: the caller passes the time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Protocol

from cluster.bench.roles.setting import Hardware, tables_of
from cluster.worker.giving_away import MAX_FINISH_MS, MOVE_BYTES_PER_MS, MOVE_MS
from engine.config import Role

MIN_CHUNK = 16  # tokens: a prefill that is first in its step advances by a block whatever the step has left


class Job:
    """One request. `left` prompt tokens are still to be computed after `done` ones; `asked` is what the router knows.

    `attempt` grows with each placement: what was under way for an older one is void.
    """

    __slots__ = (
        "asked",
        "at",
        "attempt",
        "decode",
        "done",
        "end_at",
        "first_at",
        "kv_from",
        "left",
        "outputs",
        "overhead_ms",
        "placed_at",
        "predicted_ms",
        "produced",
        "prompt",
        "remote",
        "source",
    )

    def __init__(self, at: float, prompt: int, outputs: int, asked: int) -> None:
        self.at, self.prompt, self.outputs, self.asked = at, prompt, outputs, asked
        self.attempt = self.produced = self.done = 0
        self.left = prompt
        self.decode = self.source = self.kv_from = -1
        self.remote = False
        self.placed_at = self.predicted_ms = self.overhead_ms = 0.0
        self.first_at = self.end_at = -1.0


class Listener(Protocol):
    """Hears what a machine's steps bring."""

    def at(self, when: float, machine: Machine, version: int) -> None:
        """Call machine.ended(when, version) then."""
        ...

    def computed(self, now: float, job: Job, last_tokens: int) -> None:
        """A prompt that is decoded elsewhere is computed; so many tokens of it in the last step."""
        ...

    def first_token(self, now: float, job: Job) -> None:
        """The first token of an attempt."""
        ...

    def ended(self, now: float, job: Job) -> None:
        """Its last token."""
        ...

    def gave(self, now: float, machine: Machine, jobs: list[Job]) -> None:
        """Running requests that leave it, at a step boundary."""
        ...


class Machine:
    """One worker's engine. `prefills`: prompts to compute, first come first served; `waiting`: for a seat to decode."""

    def __init__(self, index: int, hardware: Hardware, listener: Listener) -> None:
        profile = hardware.profile
        self.index, self.hardware, self.profile = index, hardware, profile
        self.role: Role = "decode"
        self.max_step_ms = profile.max_step_ms
        self.prefills: deque[Job] = deque()
        self.waiting: deque[Job] = deque()
        self.context = 0  # keys that the rows see
        self.num_own = 0  # seats of prompts that it computes for itself
        self.reserved = 0  # tokens of KV
        self._generated = 0
        self.giving = False
        self._rows: list[tuple[int, int, Job]] = []  # (step after which it ends, order, request)
        self._joining: list[Job] = []
        self._listener = listener
        self._steps = self._order = self._version = 0
        self._landing = False  # what comes meanwhile starts with the next step
        self._began = 0.0
        self._run = 0  # steps under way; 0: idle
        self._run_ms = 0.0
        self._chunks: list[tuple[Job, int]] = []
        tables = tables_of(hardware)
        self._decode_ms, self._prefill_ms = tables.decode, tables.prefill
        self._decode_fixed_ms = profile.decode_step_ms(1, 0) if profile.decode else 0.0
        self._row_key_ms, self._key_ms = tables.row_key_ms, tables.key_ms

    # ---- what comes

    def prefill(self, now: float, job: Job) -> None:
        """Compute `job.left` tokens for a request that is decoded elsewhere."""
        self.prefills.append(job)
        self._poke(now)

    def decode(self, now: float, job: Job) -> None:
        """Decode it as soon as there is a seat, after computing `job.left` tokens if any."""
        self.waiting.append(job)
        self._poke(now)

    def give_away(self, now: float, finish_ms: float) -> tuple[list[Job], list[Job]]:
        """Leave the present role: (requests not yet running, prompts of others to compute elsewhere), at once.

        Prompts of others with at most `finish_ms` to go are finished. Running requests follow by `Listener.gave` at the
        next boundary.
        """
        queued = [*self.waiting, *(job for job in self.prefills if not job.remote)]
        self.waiting.clear()
        for job in self.prefills:
            if not job.remote:
                self._leave_seat(job)
                self.num_own -= 1
        chunks = dict(self._chunks)
        near = [job for job in self.prefills if job.remote and self._is_near(job, chunks.get(job, 0), finish_ms)]
        served = [job for job in self.prefills if job.remote and job not in near]
        self.prefills = deque(near)
        self._chunks = [(job, num) for job, num in self._chunks if job in near]
        self.giving = True
        self._poke(now)
        return queued, served

    def drop(self, job: Job) -> None:
        """Compute no more of a prompt; a step under way takes its time."""
        self.prefills.remove(job)
        self._chunks = [(one, num) for one, num in self._chunks if one is not job]

    def running(self) -> set[Job]:
        """The requests that it decodes."""
        return {job for _, _, job in self._rows}

    def _is_near(self, job: Job, computing: int, finish_ms: float) -> bool:
        return self._prefill_ms[min(job.left - computing, len(self._prefill_ms) - 1)] <= finish_ms

    @property
    def num_rows(self) -> int:
        """Requests that it decodes."""
        return len(self._rows)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing is queued."""
        return not (self._run or self.prefills or self.waiting or self._rows)

    @property
    def queued_tokens(self) -> int:
        """Of prompts to be computed here."""
        return sum(job.left for job in self.prefills) + sum(job.left for job in self.waiting)

    def generated(self, now: float) -> int:
        """Tokens of answers so far, those of the steps under way too."""
        under_way = min(self._run, self._steps_within((now - self._began) * 1000)) if self._run > 1 else 0
        return self._generated + under_way * len(self._rows)

    # ---- steps

    def ended(self, now: float, version: int) -> None:
        """The steps under way have landed, unless they were cut since."""
        if version != self._version:
            return
        self._landing = True
        self._land(now)
        self._landing = False
        self._start(now)

    def _land(self, now: float) -> None:
        rows = self._rows
        self._steps += self._run
        self.context += self._run * len(rows)
        self._generated += self._run * len(rows)
        self._run = 0
        chunks, self._chunks = self._chunks, []
        for job in self._joining:
            self._listener.first_token(now, job)
        self._joining.clear()
        while rows and rows[0][0] <= self._steps:
            job = heapq.heappop(rows)[2]
            self.context -= job.prompt + job.outputs - 1
            self._leave_seat(job)
            job.produced = job.outputs
            self._listener.ended(now, job)
        for job, num_tokens in chunks:
            self._chunk_landed(now, job, num_tokens)

    def _chunk_landed(self, now: float, job: Job, num_tokens: int) -> None:
        job.done += num_tokens
        job.left -= num_tokens
        if job.left:
            return
        self.prefills.popleft()  # chunks are in the order of the queue
        if job.remote:
            self._listener.computed(now, job, num_tokens)
            return
        self.num_own -= 1
        job.produced += 1
        self._generated += 1
        self._listener.first_token(now, job)
        if job.produced < job.outputs:
            self._push(job)
        else:
            self._leave_seat(job)
            self._listener.ended(now, job)

    def _poke(self, now: float) -> None:
        """Something came: start, or cut a run of decode steps at its next boundary."""
        if self._landing:
            return
        if not self._run:
            self._start(now)
        elif self._run > 1:
            done = self._steps_within((now - self._began) * 1000)
            if done + 1 < self._run:
                self._run = done + 1
                self._schedule(self._run_time_ms(self._run))

    def _start(self, now: float) -> None:
        self._began = now
        if self.giving:
            self._give(now)
        self._admit()
        rows = self._rows
        extra_ms = self._decode_ms[len(rows)] + self._row_key_ms * self.context if rows else 0.0
        if self.prefills:
            self._run = 1
            self._schedule(self._build(extra_ms) + max(0.0, extra_ms - (self._decode_fixed_ms if rows else 0.0)))
        elif rows:
            self._run = 1 if self._joining else max(1, rows[0][0] - self._steps)
            self._schedule(self._run_time_ms(self._run))

    def _schedule(self, ms: float) -> None:
        self._version += 1
        self._listener.at(self._began + ms / 1000, self, self._version)

    def _admit(self) -> None:
        while self.waiting and len(self._rows) + self.num_own < self.hardware.max_num_seqs:
            job = self.waiting[0]
            wanted = job.prompt + job.outputs
            if self.reserved + wanted > self.hardware.kv_tokens and self.reserved:
                return
            self.waiting.popleft()
            self.reserved += wanted
            if job.left:
                self.prefills.append(job)
                self.num_own += 1
            else:
                self._push(job)
                self._joining.append(job)

    def _push(self, job: Job) -> None:
        self._order += 1
        heapq.heappush(self._rows, (self._steps + job.outputs - job.produced, self._order, job))
        self.context += job.prompt + job.produced - 1

    def _leave_seat(self, job: Job) -> None:
        self.reserved -= job.prompt + job.outputs

    def _build(self, extra_ms: float) -> float:
        """Fill one step with chunks: its prefill part in ms."""
        total, keys_ms = 0, 0.0
        most_tokens = self.profile.max_step_tokens - len(self._rows)
        most_ms = self.max_step_ms - extra_ms
        table = self._prefill_ms
        for job in self.prefills:
            wanted = min(job.left, most_tokens - total)
            done = job.done
            if wanted <= 0:
                break

            def ms(num: int, done: int = done, total: int = total, keys_ms: float = keys_ms) -> float:
                return table[total + num] + keys_ms + self._key_ms * num * (done + (num + 1) / 2)

            if ms(wanted) > most_ms:
                low, high = 0, wanted
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if ms(middle) <= most_ms else (low, middle)
                wanted = low if total else max(low, min(wanted, MIN_CHUNK))
            if not wanted:
                break
            keys_ms += self._key_ms * wanted * (done + (wanted + 1) / 2)
            total += wanted
            self._chunks.append((job, wanted))
            if wanted < job.left:
                break
        return table[total] + keys_ms

    def _run_time_ms(self, steps: int) -> float:
        """The next `steps` decode steps; each row sees one key more in each."""
        num = len(self._rows)
        keys = steps * self.context + num * steps * (steps - 1) / 2
        return steps * self._decode_ms[num] + self._row_key_ms * keys

    def _steps_within(self, ms: float) -> int:
        num = len(self._rows)
        a = self._row_key_ms * num / 2
        b = self._decode_ms[num] + self._row_key_ms * self.context - a
        if a < 1e-12:
            return int(ms / b) if b > 0.0 else 0
        return int((math.sqrt(b * b + 4 * a * ms) - b) / (2 * a))

    # ---- leaving a role

    def _give(self, now: float) -> None:
        """Every row finishes here or goes, by predicted cost (cluster/worker/giving_away.py)."""
        self.giving = False
        step_ms = self._decode_ms[len(self._rows)] + self._row_key_ms * self.context
        stay: list[tuple[int, int, Job]] = []
        gone: list[Job] = []
        for end, order, job in self._rows:
            job.produced = job.outputs - (end - self._steps)
            asked_left = job.asked - job.produced
            move_ms = MOVE_MS + (job.prompt + job.produced) * self.profile.kv_token_bytes / MOVE_BYTES_PER_MS
            if asked_left * step_ms <= min(move_ms, MAX_FINISH_MS):
                stay.append((end, order, job))
            else:
                gone.append(job)
                self.context -= job.prompt + job.produced - 1
                self._leave_seat(job)
        heapq.heapify(stay)
        self._rows = stay
        self._listener.gave(now, self, gone)
