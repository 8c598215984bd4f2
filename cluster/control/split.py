"""How much of what comes a split of the workers into roles can do: its pressure. Pure arithmetic; see planner.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cluster.control.capacity import Array, Capacity
from cluster.control.observation import Observation, WorkerSeen

NOT_SHORT = 0.9  # pressure of prefilling below which decode workers have little of it to do


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sums over the workers of a split, or of several splits at once: requests per second.

    `prefill` is the usable part (Capacity.usable_shares), `local` what the decode workers could prefill besides.
    """

    decode: Array
    local: Array
    prefill: Array


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Requests per second that want decoding, and prefilling."""

    decode: float
    prefill: float

    def pressure(self, split: Split) -> Array:
        """What is needed over what the split can do; infinite where it can do nothing of something."""
        with np.errstate(divide="ignore", invalid="ignore"):
            decode, remote = self.sides(split)
            spilt = (decode * split.local + self.prefill) / (split.local + split.prefill)
        spilt = np.where(split.local > 0.0, spilt, np.maximum(remote, decode))
        return np.where(remote <= decode, decode, np.where(np.isfinite(decode), spilt, np.inf))

    def sides(self, split: Split) -> tuple[Array, Array]:
        """Pressure of decoding, and of prefilling where nothing is prefilled by decode workers."""
        with np.errstate(divide="ignore", invalid="ignore"):
            decode = np.where(split.decode > 0.0, self.decode / split.decode, np.inf)
            remote = np.where(split.prefill > 0.0, self.prefill / split.prefill, np.inf)
        return decode, remote


def needs_of(observation: Observation, horizon_s: float) -> Needs:
    """Arrivals, and what is queued, to be worked off within the horizon."""
    traffic = observation.traffic
    new_tokens = max(1.0, traffic.mean_prompt_tokens * (1.0 - traffic.cached_share))
    waiting, queued_tokens = 0, 0
    for worker in observation.workers:
        queued_tokens += worker.load.queued_tokens
        waiting += worker.load.num_waiting if worker.info.role == "decode" else 0
    queued = queued_tokens / new_tokens
    return Needs(
        decode=traffic.requests_per_s + (waiting + traffic.num_queued) / horizon_s,
        prefill=traffic.requests_per_s + (queued + traffic.num_queued) / horizon_s,
    )


def held_rows(needs: Needs, now: Split, ready: tuple[WorkerSeen, ...], capacity: Capacity) -> Needs:
    """The same, where decoding needs at least the share of its capacity that its rows take of those it has.

    Answers that have become longer show there long before their ends show in the traffic. Not while prefill is short:
    then decode workers hold rows because they prefill themselves.
    """
    _, remote = needs.sides(now)
    index = [i for i, w in enumerate(ready) if w.info.role == "decode"]
    most = float(capacity.rows[index].sum())
    if float(remote) >= NOT_SHORT or most <= 0.0:
        return needs
    held = sum(ready[i].mean_rows for i in index) / most * float(now.decode)
    return replace(needs, decode=max(needs.decode, held))


class Splits:
    """The splits that can be reached from the present one. `is_prefill`: who prefills now, of all ready workers."""

    def __init__(self, capacity: Capacity, is_prefill: np.ndarray, *, may_spill: bool) -> None:
        self._capacity = capacity
        self._is_prefill = is_prefill
        self._local = capacity.local if may_spill else np.zeros_like(capacity.local)
        self._shares = capacity.usable_shares(len(is_prefill))

    def now(self) -> Split:
        """The split as it is."""
        return self.after(np.zeros(0, dtype=np.intp))

    def after(self, changed: np.ndarray) -> Split:
        """The split after these workers (indices) have changed sides."""
        is_prefill = self._is_prefill.copy()
        is_prefill[changed] = ~is_prefill[changed]
        capacity = self._capacity
        num = int((capacity.prefill[is_prefill] > 0.0).sum())
        return Split(
            decode=np.array(capacity.decode[~is_prefill].sum()),
            local=np.array(self._local[~is_prefill].sum()),
            prefill=np.array(self._shares[num] * capacity.prefill[is_prefill].sum()),
        )

    def along(self, order: np.ndarray) -> Split:
        """The splits after none, one, two, ... of these workers, all of one side, have changed it. [len(order) + 1]"""
        if not len(order):
            return _one_more_axis(self.now())
        to_prefill, capacity, here = not self._is_prefill[order[0]], self._capacity, self._is_prefill
        sign = 1.0 if to_prefill else -1.0

        def sums(base: float, values: Array) -> Array:
            """`base`, and after each change."""
            return base + np.concatenate(([0.0], np.cumsum(values)))

        able = capacity.prefill > 0.0
        num = sums(float((here & able).sum()), sign * able[order].astype(np.float64)).round().astype(np.intp)
        prefill = sums(float(capacity.prefill[here].sum()), sign * capacity.prefill[order])
        decode = sums(float(capacity.decode[~here].sum()), -sign * capacity.decode[order])
        local = sums(float(self._local[~here].sum()), -sign * self._local[order])
        return Split(
            decode=_no_dust(decode), local=_no_dust(local), prefill=np.where(num > 0, self._shares[num] * prefill, 0.0)
        )


def _one_more_axis(split: Split) -> Split:
    return Split(decode=split.decode[None], local=split.local[None], prefill=split.prefill[None])


def _no_dust(values: Array) -> Array:
    """What rounding has left of a sum that is zero, is zero."""
    return np.where(values < 1e-9 * np.abs(values).max(initial=0.0), 0.0, values)
