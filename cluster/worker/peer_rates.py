"""How fast this worker's KV reaches each peer, learnt from real pieces: from sending one to hearing that it landed.

milliseconds of a piece = latency + bytes / rate, fitted by medians (Theil and Sen), so that a receiver that once had
no room, or a copy that once was stuck, changes nothing. Pure and bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import combinations

from cluster.types import PeerRate, Transport

MAX_PEERS = 64
LEARNT_FROM = 16  # pieces of one peer
_APART = 1.25  # two pieces say something of the rate if their sizes differ by this factor
_LEAST_MS = 1e-3


class PeerRates:
    """The last pieces of each peer and transport."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[str, Transport], deque[tuple[int, float]]] = OrderedDict()
        self._fitted: dict[tuple[str, Transport], PeerRate] = {}

    def observe(self, peer_id: str, transport: Transport, num_bytes: int, ms: float) -> None:
        """A piece that travelled alone took so long."""
        key = (peer_id, transport)
        pieces = self._pieces.setdefault(key, deque(maxlen=LEARNT_FROM))
        pieces.append((num_bytes, max(ms, _LEAST_MS)))
        self._pieces.move_to_end(key)
        self._fitted.pop(key, None)
        if len(self._pieces) > MAX_PEERS:
            oldest, _ = self._pieces.popitem(last=False)
            self._fitted.pop(oldest, None)

    def rates(self) -> tuple[PeerRate, ...]:
        """Every peer that was served lately. Fits anew only what has changed."""
        for key, pieces in self._pieces.items():
            if key not in self._fitted:
                self._fitted[key] = fit(*key, list(pieces))
        return tuple(self._fitted[key] for key in self._pieces)  # the last used come last


def fit(peer_id: str, transport: Transport, pieces: list[tuple[int, float]]) -> PeerRate:
    """The line through pieces of (bytes, ms). Pieces of one size say nothing of latency: all of it is rate then."""
    slopes = [
        (ms_b - ms_a) / (bytes_b - bytes_a)
        for (bytes_a, ms_a), (bytes_b, ms_b) in combinations(pieces, 2)
        if max(bytes_a, bytes_b) > _APART * min(bytes_a, bytes_b)
    ]
    slope = _median(slopes) if slopes else 0.0
    if slope <= 0.0:
        slope = sum(ms for _, ms in pieces) / max(1, sum(num_bytes for num_bytes, _ in pieces))
    latency_ms = max(0.0, _median([ms - slope * num_bytes for num_bytes, ms in pieces]))
    return PeerRate(peer_id=peer_id, transport=transport, gb_per_s=1e-6 / slope, latency_ms=latency_ms)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
