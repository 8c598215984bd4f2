"""Connections with delay: each direction keeps its order; an end that closes or dies is seen by the other.

Like gRPC over TCP: nothing is lost, doubled or reordered within a connection while it stands. What is sent into a
partition arrives when it ends; a connection that is cut for longer than the keepalive takes breaks at both ends, each
for itself. Between connections any order is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from cluster.sim.clock import VirtualClock
from cluster.sim.process import SimProcess

MANY_CONNECTIONS = 48  # closed ones are forgotten when there are so many
KEEPALIVE_S = 3.0  # ping every second, 2 s for its answer (cluster/rpc/channel.py)


@dataclass(kw_only=True, eq=False, slots=True)
class End:
    """One end of a connection: whose it is and what it does with what arrives. `on_closed` comes at most once."""

    process: SimProcess
    on_message: Callable[[Any], None]
    on_closed: Callable[[], None]
    open: bool = True
    last_arrival: float = 0.0

    def receive(self, message: Any) -> None:
        """A message arrives: it is handled now, or when the process goes on; lost if this end has closed by then."""
        process = self.process
        if process.frozen:
            process.post(self.receive, message)
        elif process.alive and self.open:
            self.on_message(message)

    def hear_closed(self) -> None:
        """Nothing more comes."""
        if self.open:
            self.open = False
            self.on_closed()


class Connection:
    """Two ends, 0 (who opened it) and 1."""

    def __init__(self, network: Network, ends: tuple[End, End]) -> None:
        self.ends = ends
        self.held_until = 0.0  # nothing of it arrives before, in either direction
        self._network = network

    def send(self, side: int, message: Any, num_bytes: int = 0, *, urgent: bool = False) -> None:
        """Send from one end. Lost if either end has closed by then. `urgent` overtakes what went before."""
        sender, receiver = self.ends[side], self.ends[1 - side]
        if sender.open:
            network = self._network
            network.deliver(self, 1 - side, num_bytes, urgent, receiver.receive, message)
            if network.doubled is not None and network.doubled(sender.process, message):
                network.deliver(self, 1 - side, num_bytes, False, receiver.receive, message)

    def close(self, side: int) -> None:
        """Close from one end; the other hears of it after what was sent before."""
        if self.ends[side].open:
            self.ends[side].open = False
            self._deliver_end(1 - side)

    def cut(self) -> None:
        """The network breaks it: both ends hear of it."""
        for side in (0, 1):
            self._deliver_end(side)

    def time_out(self) -> None:
        """Both ends give up waiting for an answer to their ping, each when it runs."""
        for end in self.ends:
            if end.process.alive:
                end.process.post(end.hear_closed)

    def _deliver_end(self, side: int) -> None:
        end = self.ends[side]
        self._network.deliver(self, side, 0, False, end.process.post, end.hear_closed)


class Network:
    """Makes connections. Delays are seconds; `bytes_per_s` slows big messages down.

    `doubled(sender, message)`: whether a message is sent twice. `calm_at`: nothing is held or cut from then on.
    """

    def __init__(
        self, clock: VirtualClock, rng: Random, *, delay_s: float, jitter_s: float, bytes_per_s: float
    ) -> None:
        self.clock = clock
        self.calm_at = 0.0
        self.doubled: Callable[[SimProcess, Any], bool] | None = None
        self._rng = rng
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._bytes_per_s = bytes_per_s
        self._connections: list[Connection] = []
        self._cuts: list[tuple[str, str, float]] = []  # (from, to, until), by the names of processes
        self._slow: list[tuple[str, float, float]] = []  # (name, until, up to this many seconds more)

    def deliver(
        self, connection: Connection, side: int, num_bytes: int, urgent: bool, arrive: Callable[[Any], None], what: Any
    ) -> None:
        """Let something that leaves now arrive at one end of a connection. `urgent` overtakes what went before."""
        end, now = connection.ends[side], self.clock.now
        at = now + self._delay_s + self._rng.random() * self._jitter_s + num_bytes / self._bytes_per_s
        if now < self.calm_at:
            at = self._later(at, connection.ends[1 - side].process, end.process, connection.held_until)
        if not urgent:
            if at < end.last_arrival:
                at = end.last_arrival
            end.last_arrival = at
        self.clock.at(at, arrive, what)

    def _later(self, at: float, sender: SimProcess, receiver: SimProcess, held_until: float) -> float:
        """When it arrives with what is wrong at the moment."""
        now = self.clock.now
        for name, until, extra_s in self._slow:
            if now < until and name in (sender.name, receiver.name):
                at += self._rng.random() * extra_s
        return max(at, held_until, self._cut_until(sender.name, receiver.name))

    def _cut_until(self, sender: str, receiver: str) -> float:
        now, last = self.clock.now, 0.0
        for one, two, until in self._cuts:
            if one == sender and two == receiver and until > now and until > last:
                last = until
        return last

    def partition(self, one: str, two: str, for_s: float, *, both_ways: bool) -> None:
        """Nothing from process `one` to `two` arrives for a while (and back). Long ones break the connections."""
        self._trouble(for_s)
        until = self.clock.now + for_s
        self._cuts += [(one, two, until), (two, one, until)] if both_ways else [(one, two, until)]
        for connection in self._connections:
            self._watch_keepalive(connection)

    def slow_down(self, name: str, extra_s: float, for_s: float) -> None:
        """Everything from and to a process takes up to extra_s longer."""
        self._trouble(for_s)
        self._slow.append((name, self.clock.now + for_s, extra_s))

    def hold(self, connection: Connection, for_s: float) -> None:
        """Other connections overtake this one."""
        self._trouble(for_s)
        connection.held_until = self.clock.now + for_s

    def _trouble(self, for_s: float) -> None:
        self.calm_at = max(self.calm_at, self.clock.now + for_s)

    def connect(self, opener: End, other: End) -> Connection:
        """Connect two ends. One to a dead process closes after the usual delay."""
        connection = Connection(self, (opener, other))
        if len(self._connections) >= MANY_CONNECTIONS:
            self._connections = [old for old in self._connections if old.ends[0].open or old.ends[1].open]
        self._connections.append(connection)
        if not other.process.alive:
            connection.close(1)
        elif self._cuts:
            self._watch_keepalive(connection)
        return connection

    def connections_of(self, process: SimProcess) -> list[Connection]:
        """Its open ones."""
        return [c for c in self._connections if any(end.process is process and end.open for end in c.ends)]

    def _watch_keepalive(self, connection: Connection) -> None:
        """A ping crosses both ways, so one direction is enough to break the connection."""
        names = [end.process.name for end in connection.ends]
        until = max(self._cut_until(*names), self._cut_until(*reversed(names)))
        at = self.clock.now + KEEPALIVE_S
        if until > at:
            self.clock.at(at, connection.time_out)

    def process_died(self, process: SimProcess) -> None:
        """Close every end of a process."""
        for connection in self._connections:
            for side, end in enumerate(connection.ends):
                if end.process is process:
                    connection.close(side)
