"""When a process that ended is started again: at once, then later and later, and at start not for ever. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a process that ran this long begins anew with the first pause
MAX_FAILED_STARTS = 3  # of a process that has never been ready


@dataclass(kw_only=True)
class _Record:
    started: float
    failures: int = 0
    ready_once: bool = False
    due: float | None = None


class Restarts:
    """One record per process id. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def on_started(self, process_id: str, now: float) -> None:
        """The process was started."""
        record = self._records.setdefault(process_id, _Record(started=now))
        record.started, record.due = now, None

    def on_ready(self, process_id: str) -> None:
        """The process serves: from now on it is restarted for ever."""
        self._records[process_id].ready_once = True

    def waits(self, process_id: str) -> bool:
        """True between on_ended and the next on_started."""
        return self._records[process_id].due is not None

    def on_ended(self, process_id: str, now: float) -> float | None:
        """The process ended: seconds until it is due again, or None if there is no point (it never became ready)."""
        record = self._records[process_id]
        if now - record.started >= STEADY_S:
            record.failures = 0
        record.failures += 1
        if not record.ready_once and record.failures >= MAX_FAILED_STARTS:
            return None
        pause = min(FIRST_PAUSE_S * 2.0 ** (record.failures - 1), LONGEST_PAUSE_S)
        record.due = now + pause
        return pause

    def due(self, now: float) -> list[str]:
        """The processes to start now; each is due until on_started."""
        return [name for name, record in self._records.items() if record.due is not None and record.due <= now]
