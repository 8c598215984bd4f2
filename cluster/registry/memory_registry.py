"""The registry's map: worker id -> what the worker last said of itself, forgotten when it stops saying it.

Pure: time comes in as an argument (seconds of a monotonic clock), so it runs unchanged under a virtual clock.

    known incarnation:  the statement with the highest epoch wins; the same epoch refreshes
    new incarnation:    replaces the old one, and the old one is never believed again (a process that was stopped and
                        continues after its successor started must not take the name back)
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.types import WorkerInfo

MAX_FORMER = 16  # incarnations per worker id that are remembered as gone


@dataclass(frozen=True, kw_only=True)
class _Entry:
    info: WorkerInfo
    expires: float


class MemoryRegistry:
    """The map. `version` grows whenever `workers` would answer something else."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._former: dict[str, list[str]] = {}
        self.version = 0

    def put(self, info: WorkerInfo, *, ttl_s: float, now: float) -> bool:
        """Believe `info` for ttl_s seconds. False if something newer is known: then nothing changes."""
        self.expire(now)
        if info.incarnation in self._former.get(info.worker_id, ()):
            return False
        known = self._entries.get(info.worker_id)
        if known is not None and known.info.incarnation == info.incarnation:
            if info.epoch < known.info.epoch:
                return False
        elif known is not None:
            self._retire(known.info)
        if known is None or known.info != info:
            self.version += 1
        self._entries[info.worker_id] = _Entry(info=info, expires=now + ttl_s)
        return True

    def remove(self, worker_id: str, incarnation: str, *, now: float) -> bool:
        """Forget the worker if this incarnation is the known one, and never believe that incarnation again."""
        self.expire(now)
        known = self._entries.get(worker_id)
        if known is None or known.info.incarnation != incarnation:
            return False
        self._retire(known.info)
        del self._entries[worker_id]
        self.version += 1
        return True

    def expire(self, now: float) -> bool:
        """Forget what nobody repeated in time. An incarnation that comes back afterwards is believed again."""
        late = [worker_id for worker_id, entry in self._entries.items() if entry.expires <= now]
        for worker_id in late:
            del self._entries[worker_id]
        self.version += bool(late)
        return bool(late)

    def next_expiry(self) -> float | None:
        """When `expire` will next have something to do, if nobody repeats itself."""
        return min((entry.expires for entry in self._entries.values()), default=None)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Everything believed now, by worker id."""
        return tuple(entry.info for _, entry in sorted(self._entries.items()))

    def _retire(self, info: WorkerInfo) -> None:
        former = self._former.setdefault(info.worker_id, [])
        former.append(info.incarnation)
        del former[:-MAX_FORMER]
