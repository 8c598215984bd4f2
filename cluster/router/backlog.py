"""Prefill work that a worker has to do, in predicted milliseconds: ours by request, everybody else's by heartbeats.

Work is done first come first served, one millisecond in a millisecond. Only the first request's work shrinks with time;
the others start when it is reported done. So an error stays with one request and does not add up.
"""

from __future__ import annotations

import msgspec


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's part. `ms` is predicted."""

    num_tokens: int
    ms: float


class Backlog:
    """The backlog of one worker. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}
        self._num_tokens = 0
        self._ms = 0.0
        self._head_since = 0.0
        self._others_tokens = 0
        self._others_ms = 0.0
        self._told_at = 0.0

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of ours and of others."""
        return self._num_tokens + self._others_tokens

    def ms(self, now: float) -> float:
        """Predicted time until new work would begin."""
        others = max(0.0, self._others_ms - (now - self._told_at) * 1000) if self._others_ms else 0.0
        if not self._works:
            return others
        head = next(iter(self._works.values()))
        done = min(head.ms, max(0.0, (now - self._head_since) * 1000 - others))
        return max(0.0, self._ms - done) + others

    def add(self, now: float, request_id: str, work: Work) -> None:
        """A prompt was sent."""
        self.remove(now, request_id)
        if not self._works:
            self._head_since = now
        self._works[request_id] = work
        self._num_tokens += work.num_tokens
        self._ms += work.ms

    def remove(self, now: float, request_id: str) -> None:
        """Its first token came, or it is over. Unknown ids are fine."""
        work = self._works.get(request_id)
        if work is None:
            return
        if next(iter(self._works)) == request_id:
            self._head_since = now
        del self._works[request_id]
        self._num_tokens -= work.num_tokens
        self._ms = self._ms - work.ms if self._works else 0.0

    def hear(self, now: float, queued_tokens: int, ms_per_token: float) -> None:
        """A heartbeat: what is beyond ours is others'."""
        self._others_tokens = max(0, queued_tokens - self._num_tokens)
        self._others_ms = self._others_tokens * ms_per_token
        self._told_at = now

    def clear(self) -> None:
        """The link broke: nothing of ours is there any more."""
        self._works = {}
        self._num_tokens, self._ms = 0, 0.0
