"""What a worker measured of itself, so that others can predict its milliseconds, and how that is kept fresh.

A profile is measured once, at start (engine/runner/profile.py), as two short tables. Real steps then only move two
factors, slowly: one slow step must not change where requests go, a worker that stays slower must. Torch-free and
clock-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.step_cost import StepCost

Table = tuple[tuple[int, float], ...]
Scales = tuple[float, float]  # prefill, decode: real milliseconds over the profile's

_SHARE = 0.05  # of a step's error that is believed
_MOST = 2.0  # a step that is off by more than this factor counts as off by this factor
_MOSTLY = 0.8  # a mixed step teaches what made up this share of it
_FARTHEST = 100.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Tables are (prefill tokens of a step, ms) and (decode rows of a step, ms), ascending, joined by straight lines.

    Beyond its last point a table goes on with its last slope; an empty one means that nothing is known. The two slopes
    add ms per 1000 keys: of each query token of a prefill, of each decode row. `max_step_ms` and `max_step_tokens` are
    the bounds of one step, `kv_token_bytes` what one token's KV takes on the wire.
    """

    prefill: Table = ()
    prefill_ms_per_token_kilocontext: float = 0.0
    decode: Table = ()
    decode_ms_per_row_kilocontext: float = 0.0
    max_step_ms: float = 500.0
    max_step_tokens: int = 2048
    kv_token_bytes: int = 0

    @cached_property
    def full_chunk(self) -> tuple[int, float]:
        """The largest prefill step within the bounds: its tokens, and its ms without context."""
        num_tokens = self.chunk_tokens(self.max_step_ms)
        return num_tokens, self.prefill_step_ms(num_tokens)

    @cached_property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self.prefill and self.decode)

    def prefill_step_ms(self, num_tokens: int) -> float:
        """One step of prefill tokens without context."""
        return interpolate(self.prefill, num_tokens) if num_tokens > 0 else 0.0

    def decode_step_ms(self, num_rows: int, context_tokens: float) -> float:
        """One step of decode rows that see `context_tokens` keys in all."""
        if num_rows <= 0:
            return 0.0
        return interpolate(self.decode, num_rows) + self.decode_ms_per_row_kilocontext * context_tokens / 1000

    def chunk_tokens(self, spare_ms: float) -> int:
        """The most prefill tokens that one step of `spare_ms` takes; at least 1."""
        return max(1, min(self.max_step_tokens, tokens_within(self.prefill, spare_ms, self.max_step_tokens)))

    def prefill_ms(self, num_tokens: int, num_cached: int) -> float:
        """A prompt's tokens after `num_cached` present ones, in as many steps as the bounds ask for.

        Query token i sees num_cached + i + 1 keys, so the context's part is n (cached + n / 2) keys (StepCost.row_ms).
        """
        if num_tokens <= 0:
            return 0.0
        keys = num_tokens * (num_cached + (num_tokens + 1) / 2)
        ms = self.prefill_ms_per_token_kilocontext * keys / 1000
        whole_ms = self.prefill_step_ms(num_tokens)
        if num_tokens <= self.max_step_tokens and whole_ms <= self.max_step_ms:
            return ms + whole_ms
        chunk, chunk_ms = self.full_chunk
        num_full, rest = divmod(num_tokens, chunk)
        return ms + num_full * chunk_ms + self.prefill_step_ms(rest)


def interpolate(table: Table, x: float) -> float:
    """The table's value at `x`: constant before its first point, straight on after its last. 0 for an empty table."""
    if not table:
        return 0.0
    x0, y0 = table[0]
    if x <= x0:
        return y0
    slope = 0.0
    for x1, y1 in table:
        if x1 > x0:
            slope = (y1 - y0) / (x1 - x0)
            if x <= x1:
                return y0 + slope * (x - x0)
            x0, y0 = x1, y1
    return y0 + slope * (x - x0) if slope > 0.0 else y0


def tokens_within(table: Table, ms: float, at_most: int) -> int:
    """The largest x up to `at_most` whose value is within `ms`: `interpolate` the other way round."""
    if interpolate(table, at_most) <= ms:
        return at_most
    low, high = 0, at_most
    while high - low > 1:
        middle = (low + high) // 2
        if interpolate(table, middle) <= ms:
            low = middle
        else:
            high = middle
    return low


def profile_of(
    cost: StepCost, *, max_step_ms: float, max_step_tokens: int, max_num_seqs: int, kv_token_bytes: int
) -> Profile:
    """The profile of an engine whose steps take exactly what StepCost says: the exact fake's."""
    ends = (1, max(2, max_step_tokens)), (1, max(2, max_num_seqs))
    prefill, decode = (tuple((x, cost.fixed_ms + cost.ms_per_token * x) for x in end) for end in ends)
    return Profile(
        prefill=prefill,
        prefill_ms_per_token_kilocontext=cost.ms_per_token_kilocontext,
        decode=decode,
        decode_ms_per_row_kilocontext=cost.ms_per_token_kilocontext,
        max_step_ms=max_step_ms,
        max_step_tokens=max_step_tokens,
        kv_token_bytes=kv_token_bytes,
    )


class StepTimes:
    """The two factors, moved by every real step. Whoever has a clock calls `observe`."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.scales: Scales = (1.0, 1.0)

    def observe(self, batch: ScheduledBatch, ms: float) -> None:
        """A step of this batch took `ms`."""
        if not self._profile.known or ms <= 0.0:
            return
        prefill_ms, decode_ms = self.parts(batch)
        prefill_scale, decode_scale = self.scales
        predicted = prefill_ms * prefill_scale + decode_ms * decode_scale
        if predicted <= 0.0:
            return
        ratio = min(_MOST, max(1 / _MOST, ms / predicted)) ** _SHARE
        if prefill_ms * prefill_scale >= _MOSTLY * predicted:
            prefill_scale *= ratio
        elif decode_ms * decode_scale >= _MOSTLY * predicted:
            decode_scale *= ratio
        self.scales = (_bounded(prefill_scale), _bounded(decode_scale))

    def parts(self, batch: ScheduledBatch) -> tuple[float, float]:
        """What the profile says of a batch: (prefill ms, decode ms). The fixed cost goes with the prefill if any."""
        profile, num_rows = self._profile, batch.num_decode_rows
        decode_ms = profile.decode_step_ms(num_rows, int(batch.num_computed[:num_rows].sum()))
        if num_rows == len(batch.rows):
            return 0.0, decode_ms
        lens, computed = batch.query_lens[num_rows:], batch.num_computed[num_rows:]
        keys = float((lens * (computed + (lens + 1) / 2)).sum())
        prefill_ms = profile.prefill_step_ms(int(lens.sum()))
        prefill_ms += profile.prefill_ms_per_token_kilocontext * keys / 1000
        fixed_ms = interpolate(profile.decode, 0) if num_rows else 0.0
        return prefill_ms, max(0.0, decode_ms - fixed_ms)


def alike(one: ScheduledBatch, other: ScheduledBatch) -> bool:
    """Whether two steps compute about the same."""
    return (one.num_decode_rows, one.num_tokens) == (other.num_decode_rows, other.num_tokens)


def _bounded(scale: float) -> float:
    return min(_FARTHEST, max(1 / _FARTHEST, scale))
