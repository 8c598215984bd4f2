"""Connections with delay: each direction keeps its order; an end that closes or dies is seen by the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from cluster.sim.clock import VirtualClock
from cluster.sim.process import SimProcess


@dataclass(kw_only=True, eq=False)
class End:
    """One end of a connection: whose it is and what it does with what arrives. `on_closed` comes at most once."""

    process: SimProcess
    on_message: Callable[[Any], None]
    on_closed: Callable[[], None]
    open: bool = True
    last_arrival: float = 0.0


class Connection:
    """Two ends, 0 (who opened it) and 1."""

    def __init__(self, network: Network, ends: tuple[End, End]) -> None:
        self.ends = ends
        self._network = network

    def send(self, side: int, message: Any, num_bytes: int = 0) -> None:
        """Send from one end. Lost if either end has closed by the time it arrives."""
        if self.ends[side].open:
            self._deliver(1 - side, lambda: self._receive(1 - side, message), num_bytes)

    def close(self, side: int) -> None:
        """Close from one end; the other hears of it after what was sent before."""
        if self.ends[side].open:
            self.ends[side].open = False
            self._deliver(1 - side, lambda: self._closed(1 - side), 0)

    def cut(self) -> None:
        """The network breaks it: both ends hear of it."""
        for side in (0, 1):
            self._deliver(side, lambda side=side: self._closed(side), 0)  # type: ignore[misc]

    def _deliver(self, side: int, run: Callable[[], None], num_bytes: int) -> None:
        end = self.ends[side]
        end.last_arrival = max(end.last_arrival, self._network.arrival(num_bytes))
        self._network.clock.at(end.last_arrival, lambda: end.process.post(run))

    def _receive(self, side: int, message: Any) -> None:
        if self.ends[side].open:
            self.ends[side].on_message(message)

    def _closed(self, side: int) -> None:
        end = self.ends[side]
        if end.open:
            end.open = False
            end.on_closed()


class Network:
    """Makes connections. Delays are seconds; `bytes_per_s` slows big messages down."""

    def __init__(
        self, clock: VirtualClock, rng: Random, *, delay_s: float, jitter_s: float, bytes_per_s: float
    ) -> None:
        self.clock = clock
        self._rng = rng
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._bytes_per_s = bytes_per_s
        self._connections: list[Connection] = []

    def arrival(self, num_bytes: int) -> float:
        """When a message that is sent now arrives."""
        jitter_s = self._rng.random() * self._jitter_s
        return self.clock.now + self._delay_s + jitter_s + num_bytes / self._bytes_per_s

    def connect(self, opener: End, other: End) -> Connection:
        """Connect two ends. One to a dead process closes after the usual delay."""
        connection = Connection(self, (opener, other))
        self._connections = [old for old in self._connections if old.ends[0].open or old.ends[1].open]
        self._connections.append(connection)
        if not other.process.alive:
            connection.close(1)
        return connection

    def process_died(self, process: SimProcess) -> None:
        """Close every end of a process."""
        for connection in self._connections:
            for side, end in enumerate(connection.ends):
                if end.process is process:
                    connection.close(side)
