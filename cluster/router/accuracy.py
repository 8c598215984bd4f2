"""How good predictions were, and the constants that they learn from it. Pure, bounded, robust against outliers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LEARNT_FROM = 33  # first tokens of a kind: the median of what predictions were short of
FEWEST = 5  # before that, nothing was learnt
REMEMBERED = 512
FIRST_GUESS_OUTPUTS = 128.0
_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors |predicted - real| / real of the last predictions: medians, and how many they are of."""

    num_ttft: int
    ttft_p50: float
    num_tpot: int
    tpot_p50: float


class Accuracy:
    """What one router learns from its first tokens and ends."""

    def __init__(self) -> None:
        self.mean_outputs = FIRST_GUESS_OUTPUTS
        self._short: dict[str, deque[float]] = {}
        self._overheads: dict[str, float] = {}
        self._ttft: deque[float] = deque(maxlen=REMEMBERED)
        self._tpot: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def overheads(self) -> Mapping[str, float]:
        """By kind of placement: what predictions were lately short of, in ms; may be below 0."""
        return dict(self._overheads)

    def first_token(self, kind: str, *, predicted_ms: float, overhead_ms: float, real_ms: float) -> None:
        """A first token came. `predicted_ms` includes `overhead_ms`."""
        if real_ms > 0.0:
            self._ttft.append(abs(predicted_ms - real_ms) / real_ms)
        short = self._short.setdefault(kind, deque(maxlen=LEARNT_FROM))
        short.append(real_ms - (predicted_ms - overhead_ms))
        if len(short) >= FEWEST:
            self._overheads[kind] = median(short)

    def end(self, *, num_outputs: int, predicted_tpot_ms: float | None, real_tpot_ms: float | None) -> None:
        """An answer is complete."""
        self.mean_outputs += (num_outputs - self.mean_outputs) * _SHARE
        if predicted_tpot_ms is not None and real_tpot_ms:
            self._tpot.append(abs(predicted_tpot_ms - real_tpot_ms) / real_tpot_ms)

    def errors(self) -> Errors:
        """Of the last REMEMBERED predictions."""
        return Errors(
            num_ttft=len(self._ttft),
            ttft_p50=median(self._ttft),
            num_tpot=len(self._tpot),
            tpot_p50=median(self._tpot),
        )


def median(values: Iterable[float]) -> float:
    """The middle one (the upper of two); 0 of none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
