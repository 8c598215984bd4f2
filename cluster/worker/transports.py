"""Which transports a worker speaks, and with whom: its connectors, and what it asks for and offers in a call."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from cluster.transfer.connector import Connector
from cluster.transfer.grpc_connector import GrpcConnector
from cluster.transfer.local_connector import LocalConnector
from cluster.types import FetchOpen, LocalMemory, SourceRef, Transport, WorkerInfo
from engine.kv.memory import KVMemory
from engine.messages import RankReady

_MAKE: dict[Transport, type[LocalConnector] | type[GrpcConnector]] = {"local": LocalConnector, "grpc": GrpcConnector}


class Transports:
    """The transports of one worker. Raises ValueError for a name that no connector has."""

    def __init__(self, names: Iterable[str]) -> None:
        unknown = set(names) - set(_MAKE)
        if unknown:
            raise ValueError(f"transports: unknown {', '.join(sorted(unknown))}; there are {', '.join(_MAKE)}")
        self._names: tuple[Transport, ...] = tuple(name for name in _MAKE if name in set(names))
        self._memory: KVMemory | None = None
        self.connectors: dict[Transport, Connector] = {}

    @property
    def can_serve(self) -> bool:
        """Whether the rank's KV is within reach of this process."""
        return self._memory is not None

    def open(self, memory: KVMemory | None) -> None:
        """The rank's KV is mapped; None when it lies on a device."""
        self._memory = memory
        if memory is not None:
            self.connectors.update({name: _MAKE[name](memory) for name in self._names})

    def local_memory(self, ready: RankReady) -> LocalMemory | None:
        """What receivers on this host are told to open; None when this worker doesn't do that."""
        if self._memory is None or "local" not in self._names:
            return None
        return LocalMemory(path=ready.kv_path, nonce=ready.kv_nonce, num_blocks=ready.num_blocks)

    def asked(self, call: FetchOpen, source: SourceRef, me: WorkerInfo) -> FetchOpen:
        """A call of ours with the transports that we speak. "local" only where the address does not rule it out."""
        same_host = _host(source.address) == _host(me.address)
        wanted = tuple(name for name in call.transports if name in self.connectors and (name != "local" or same_host))
        return replace(call, transports=wanted)

    def offered(self, call: FetchOpen) -> FetchOpen:
        """A call to us, less the transports that we do not speak."""
        return replace(call, transports=tuple(name for name in call.transports if name in self.connectors))

    def sweep(self) -> None:
        """Let go of what was not used for long."""
        for connector in self.connectors.values():
            connector.sweep()

    def close(self) -> None:
        """Let go of everything."""
        for connector in self.connectors.values():
            connector.close()
        if self._memory is not None:
            self._memory.close()


def _host(address: str) -> str:
    return address.rpartition(":")[0]
