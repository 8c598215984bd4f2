"""How many requests per second each worker can do within the targets, in either role. Pure arithmetic on arrays.

Everything comes from what workers measured of themselves (engine/scheduler/profile.py), for one mean request of the
observed traffic:

    prefill   1000 / (ms of its prompt), nothing where that alone is over the TTFT target
    decode    rows / (tokens of its answer x ms of a step), at the most rows whose step is within the TPOT target
              and that fit the batch and the KV memory; memory is held for a request already while its prompt is
              computed elsewhere, so no more than places / (that time + the answer's), where a worker has as many
              places as fit its memory, and two for each row of its batch
    local     prefills by a decode worker that may not lose its TPOT over them: a prompt of p ms, spread over an answer
              of O tokens, adds n p / O to each token of n rows. With steps of a + b n the rows that keep the target T
              are then (T - a) / (b + p / O), which is as if the prompt took p T / (T - a). Nothing where a reaches T.

Queueing: of c prefill workers only a share of the time may be used, so that nine of ten prompts wait no longer than the
target leaves them (Sakasegawa's approximation of M/M/c: a mean wait of p u^(sqrt(2 (c + 1)) - 1) / (c (1 - u))).
Tables are read as Profile reads them, all workers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

from cluster.control.observation import WorkerSeen
from cluster.traffic import Traffic
from cluster.worker.admission import PLACES_PER_ROW
from engine.scheduler.profile import Profile, Table

Array = npt.NDArray[np.float64]

FIRST_GUESS_OUTPUTS = 128.0  # before an answer has ended
ATTAINABLE = (
    1.25  # a target below this many times the fastest worker's own time is taken for that: nobody could meet it
)
LOCAL_SHARE = 0.5
HELD_PROMPTS = 2.0  # a prompt waits at its source about as long as it computes, in times of a typical one
_FAR = 1e9  # a table's last point, so that its last slope goes on
_NINE_OF_TEN = math.log(10.0)  # the ninth decile of an exponential wait over its mean
_LEAST_SHARE, _MOST_SHARE = 0.2, 0.95
_BISECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """One mean request: tokens of its prompt, of those the cached ones, tokens of its answer. See Traffic for ratio."""

    prompt_tokens: float
    cached_tokens: float
    output_tokens: float
    square_ratio: float

    @property
    def new_tokens(self) -> float:
        """Tokens of the prompt that somebody has to compute."""
        return max(1.0, self.prompt_tokens - self.cached_tokens)

    @staticmethod
    def of(traffic: Traffic) -> Work | None:
        """What the traffic brought; None if nothing came."""
        if not traffic.mean_prompt_tokens:
            return None
        outputs = traffic.mean_output_tokens
        return Work(
            prompt_tokens=traffic.mean_prompt_tokens,
            cached_tokens=traffic.mean_prompt_tokens * traffic.cached_share,
            output_tokens=max(1.0, FIRST_GUESS_OUTPUTS if outputs is None else outputs),
            square_ratio=traffic.prompt_square_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Per worker, in the order given. prefill_ms: one prompt; prefill, decode, local: requests per second.

    rows: the most decode rows within the target.
    """

    prefill_ms: Array
    ms_per_token: Array  # of a prompt that is not cached
    prefill: Array
    decode: Array
    local: Array
    rows: Array
    ttft_ms: float  # the targets as they were used
    tpot_ms: float

    @property
    def typical_prefill_ms(self) -> float:
        """The mean prompt over all workers, in whatever role."""
        return _typical_ms(self.prefill, self.prefill_ms)

    def usable_shares(self, most: int) -> Array:
        """Share of the time that 0, 1, ... `most` prefill workers may be busy. Grows with their number."""
        num = np.maximum(np.arange(most + 1, dtype=np.float64), 1.0)
        exponent = np.sqrt(2.0 * (num + 1.0)) - 1.0
        one_ms = self.typical_prefill_ms
        left = max(0.0, self.ttft_ms - one_ms) / (one_ms * _NINE_OF_TEN)
        low, high = np.full_like(num, _LEAST_SHARE), np.full_like(num, _MOST_SHARE)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            fits = middle**exponent / (num * (1.0 - middle)) <= left
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return low


def capacity_of(workers: tuple[WorkerSeen, ...], work: Work, *, ttft_ms: float, tpot_ms: float) -> Capacity | None:
    """The capacity of each worker; None if none has measured itself. One that has not counts as one that has."""
    measured = _Measured.of(workers)
    if measured is None:
        return None
    one_ms = measured.prefill_ms(work)
    ttft_ms = max(ttft_ms, ATTAINABLE * float(one_ms.min()))
    decode = _Decode(measured, work)
    tpot_ms = max(tpot_ms, ATTAINABLE * float(decode.step_ms(np.ones(len(workers))).min()))
    rows = decode.rows_within(tpot_ms)
    some = np.maximum(rows, 1.0)
    step_ms = decode.step_ms(some)
    # what a prompt takes of the rows' time when the target, not the batch's size, is what bounds them
    fixed_ms = np.maximum(0.0, step_ms - decode.slope_ms(some))
    bound = rows < decode.most_rows
    stretch = np.where(bound, tpot_ms / np.maximum(tpot_ms - fixed_ms, 1e-9), 1.0)
    able = (rows >= 1.0) & ~(bound & (fixed_ms >= tpot_ms))
    prefill = np.where(one_ms <= ttft_ms, 1000.0 / np.maximum(one_ms, 1e-6), 0.0)
    answer_ms = work.output_tokens * step_ms
    held_ms = HELD_PROMPTS * _typical_ms(prefill, one_ms) + answer_ms
    ended = 1000.0 * np.minimum(rows / answer_ms, decode.places / held_ms)
    return Capacity(
        prefill_ms=one_ms,
        ms_per_token=one_ms / work.new_tokens,
        prefill=prefill,
        decode=np.where(rows >= 1.0, ended, 0.0),
        local=np.where(able, LOCAL_SHARE * 1000.0 / np.maximum(one_ms * stretch, 1e-6), 0.0),
        rows=rows,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
    )


def _typical_ms(prefill_per_s: Array, prefill_ms: Array) -> float:
    rate = float(prefill_per_s.mean())
    return 1000.0 / rate if rate > 0.0 else float(prefill_ms.min())


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What workers measured of themselves, as arrays. `plain` [workers, 9]: see _plain."""

    plain: Array
    prefill: tuple[Array, Array]
    decode: tuple[Array, Array]

    @staticmethod
    def of(workers: tuple[WorkerSeen, ...]) -> _Measured | None:
        """None if nobody has measured anything."""
        known = next((worker.info.profile for worker in workers if worker.info.profile.known), None)
        if known is None:
            return None
        profiles = [w.info.profile if w.info.profile.prefill and w.info.profile.decode else known for w in workers]
        plain = [_plain(worker, profile) for worker, profile in zip(workers, profiles, strict=True)]
        return _Measured(
            plain=as_array(plain),
            prefill=_padded(tuple([profile.prefill for profile in profiles])),
            decode=_padded(tuple([profile.decode for profile in profiles])),
        )

    def prefill_ms(self, work: Work) -> Array:
        """Profile.prefill_ms of the work's prompt, scaled, for every worker."""
        scale, slope, bound_ms, most = self.plain[:, :4].T
        x, y = self.prefill
        whole = np.full(len(scale), work.new_tokens)
        whole_ms = _interpolated(x, y, whole)
        chunk = np.maximum(1.0, np.minimum(most, np.floor(_inverse(x, y, bound_ms))))
        full, rest = np.floor(whole / chunk), whole % chunk
        chunked_ms = full * _interpolated(x, y, chunk) + np.where(rest > 0.0, _interpolated(x, y, rest), 0.0)
        keys = work.new_tokens * (work.cached_tokens + (work.new_tokens + 1.0) / 2) * work.square_ratio
        steps_ms = np.where((whole <= most) & (whole_ms <= bound_ms), whole_ms, chunked_ms)
        ms: Array = scale * (slope * keys / 1000 + steps_ms)
        return ms


def as_array(rows: list[tuple[float, ...]]) -> Array:
    """Rows of equal length as an array [rows, columns], in half the time that np.array takes."""
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.float64, count=len(rows) * len(rows[0]))
    return flat.reshape(len(rows), -1)


def _plain(worker: WorkerSeen, profile: Profile) -> tuple[float, ...]:
    """Prefill: scale, slope, ms and tokens of a step; decode: scale, slope; rows of a batch, KV blocks, block size."""
    load, info = worker.load, worker.info
    return (
        load.prefill_scale,
        profile.prefill_ms_per_token_kilocontext,
        profile.max_step_ms,
        profile.max_step_tokens,
        load.decode_scale,
        profile.decode_ms_per_row_kilocontext,
        info.max_num_seqs,
        load.num_blocks,
        info.block_size,
    )


class _Decode:
    """Decode steps of all workers, each row with the mean context of the work."""

    def __init__(self, measured: _Measured, work: Work) -> None:
        context = work.prompt_tokens + work.output_tokens / 2
        scale, slope, batch, num_blocks, block_size = measured.plain[:, 4:].T
        self._x, y = measured.decode
        self._y = scale * (y + slope * self._x * (context / 1000))
        room = num_blocks * block_size
        fitting = np.where(room > 0.0, room / max(context, 1.0), _FAR)
        batch = np.where(batch > 0.0, batch, _FAR)
        self.most_rows = np.maximum(np.floor(np.minimum(batch, fitting)), 1.0)
        self.places = np.maximum(np.floor(np.minimum(PLACES_PER_ROW * batch, fitting)), 1.0)

    def step_ms(self, rows: Array) -> Array:
        """A step of so many rows."""
        return _interpolated(self._x, self._y, rows)

    def slope_ms(self, rows: Array) -> Array:
        """What `rows` rows add to a step, by the slope where they are."""
        low = np.maximum(rows - 1.0, 0.0)
        return rows * (self.step_ms(rows + 1.0) - self.step_ms(low)) / (rows + 1.0 - low)

    def rows_within(self, ms: float) -> Array:
        """The most rows whose step is within `ms`; 0 where a single one is not."""
        return np.minimum(np.floor(_inverse(self._x, self._y, np.full(self._x.shape[1], ms))), self.most_rows)


@lru_cache(maxsize=4)  # profiles hardly ever change: to find them the same costs a tenth
def _padded(tables: tuple[Table, ...]) -> tuple[Array, Array]:
    """All tables as two arrays [points, workers]: from 0 on; the last slope goes on to a far point that fills up.

    The arrays are shared between calls, and read-only.
    """
    lens = np.fromiter(map(len, tables), dtype=np.intp, count=len(tables))
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(tables)), dtype=np.float64, count=2 * int(lens.sum()))
    ends = np.cumsum(lens)
    place = np.arange(int(lens.max()) + 1)[:, None]
    index = ends - lens + np.minimum(place, lens - 1)
    x, y = flat[0::2][index], flat[1::2][index]
    last, before = flat.reshape(-1, 2)[ends - 1], flat.reshape(-1, 2)[np.maximum(ends - 2, ends - lens)]
    dx, dy = (last - before).T
    slope = np.where(dx > 0.0, np.maximum(0.0, dy) / np.maximum(dx, 1e-9), 0.0)
    far_y = last[:, 1] + slope * (_FAR - last[:, 0])
    is_far = place >= lens
    x, y = np.where(is_far, _FAR, x), np.where(is_far, far_y, y)
    x, y = np.vstack((np.zeros_like(x[:1]), x)), np.vstack((y[:1], y))
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _interpolated(x: Array, y: Array, at: Array) -> Array:
    """The value of column i at at[i]."""
    index = np.clip((x <= at).sum(axis=0) - 1, 0, len(x) - 2)
    columns = np.arange(len(at))
    x0, y0, x1, y1 = x[index, columns], y[index, columns], x[index + 1, columns], y[index + 1, columns]
    values: Array = y0 + (y1 - y0) * np.maximum(0.0, at - x0) / np.maximum(x1 - x0, 1e-9)
    return values


def _inverse(x: Array, y: Array, ms: Array) -> Array:
    """The largest place where column i is within ms[i]; 0 if it nowhere is."""
    y = np.maximum.accumulate(y, axis=0)
    index = (y <= ms).sum(axis=0) - 1
    at = np.clip(index, 0, len(x) - 2)
    columns = np.arange(len(ms))
    x0, y0, x1, y1 = x[at, columns], y[at, columns], x[at + 1, columns], y[at + 1, columns]
    inside: Array = x0 + (x1 - x0) * np.clip((ms - y0) / np.maximum(y1 - y0, 1e-9), 0.0, 1.0)
    values: Array = np.where(index < 0, 0.0, np.where(index > at, x1, inside))
    return values
