"""Pairs of decode worker and source that fail are avoided for a while, then tried once (a breaker per pair).

    closed --failure--> open for OPEN_S, doubled with each failure in a row --time--> half open: one trial
    half open --first token with that source--> closed        half open --failure, or no answer for TRIAL_S--> open

Pairs are named by incarnation: a restart begins anew. No I/O, no clock of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

OPEN_S = 2.0
MAX_OPEN_S = 60.0
TRIAL_S = 10.0
MAX_PAIRS = 4096

BreakerState = Literal["closed", "open", "half-open", "trying"]


@dataclass(kw_only=True)
class _Pair:
    num_failures: int
    open_until: float
    reason: str
    source_id: str
    trying_until: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BreakerStatus:
    """A pair that has failed. `open_until` is monotonic seconds; past it the pair is half open."""

    decode_incarnation: str
    source_id: str
    num_failures: int
    reason: str
    open_until: float


class Breakers:
    """The breakers of one router. A pair is (incarnation of the decode worker, incarnation of the source)."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[str, str], _Pair] = OrderedDict()
        self._sources_of: dict[str, set[str]] = {}  # decode worker -> sources that have failed it

    def __len__(self) -> int:
        return len(self._pairs)

    def fail(self, now: float, decode: str, source: str, *, source_id: str, reason: str) -> None:
        """The decode worker said that this source failed it."""
        known = self._pairs.pop((decode, source), None)
        # several requests that fail at once, while it is open, are one failure
        counted = known.num_failures + (now >= known.open_until) if known is not None else 1
        open_s = min(MAX_OPEN_S, OPEN_S * 2.0 ** min(16, counted - 1))
        self._pairs[decode, source] = _Pair(
            num_failures=counted, open_until=now + open_s, reason=reason, source_id=source_id
        )
        self._sources_of.setdefault(decode, set()).add(source)
        if len(self._pairs) > MAX_PAIRS:
            self._remove(*next(iter(self._pairs)))

    def succeed(self, decode: str, source: str) -> None:
        """A first token came that this source had a part in."""
        if (decode, source) in self._pairs:
            self._remove(decode, source)

    def state(self, now: float, decode: str, source: str) -> BreakerState:
        """Of one pair."""
        pair = self._pairs.get((decode, source))
        if pair is None:
            return "closed"
        if now < pair.open_until:
            return "open"
        return "trying" if now < pair.trying_until else "half-open"

    def avoided(self, now: float, decode: str) -> frozenset[str]:
        """Worker ids of the sources that this decode worker is to avoid now."""
        sources = self._sources_of.get(decode)
        if not sources:
            return frozenset()
        avoided = (source for source in sources if self.state(now, decode, source) in ("open", "trying"))
        return frozenset(self._pairs[decode, source].source_id for source in avoided)

    def chosen(self, now: float, decode: str, source: str) -> None:
        """A request was sent with this source in front: the trial of a half-open pair."""
        pair = self._pairs.get((decode, source))
        if pair is not None and now >= pair.open_until:
            pair.trying_until = now + TRIAL_S

    def forget(self, incarnation: str) -> None:
        """A worker is gone."""
        for pair in [pair for pair in self._pairs if incarnation in pair]:
            self._remove(*pair)

    def _remove(self, decode: str, source: str) -> None:
        del self._pairs[decode, source]
        self._sources_of[decode].discard(source)
        if not self._sources_of[decode]:
            del self._sources_of[decode]

    def status(self) -> tuple[BreakerStatus, ...]:
        """For /status."""
        return tuple(
            BreakerStatus(
                decode_incarnation=decode,
                source_id=pair.source_id,
                num_failures=pair.num_failures,
                reason=pair.reason,
                open_until=pair.open_until,
            )
            for (decode, _), pair in self._pairs.items()
        )
