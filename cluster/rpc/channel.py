"""gRPC channels and their options: how peers are watched, how large a message may be, one shared channel per peer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpc import aio

# A link carries prompts (4 bytes a token, with the outputs of 8 choices at most); a Fetch pieces of at least one block,
# and a block of the largest model has 15 MB.
MAX_MESSAGE_BYTES = 64 << 20

_SIZES = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

# A stopped peer answers no ping: the connection breaks within 3 s. Without ping_timeout it would take 60 s, and without
# the server's half of the agreement the connection would be closed for too many pings.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

CLIENT_OPTIONS = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a peer's channel shares no connection, so closing it closes its connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # who asks again, and where, is decided by the state machines
)

SERVER_OPTIONS = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


def open_channel(address: str) -> aio.Channel:
    """A new channel to host:port; connects when first used."""
    return aio.insecure_channel(address, options=CLIENT_OPTIONS)


@dataclass(kw_only=True)
class _Shared:
    channel: aio.Channel
    num_users: int = 0


class ChannelPool:
    """One channel per address, kept open between users and dropped when it is asked to be or at the end."""

    def __init__(self, max_idle: int = 64) -> None:
        self._channels: dict[str, _Shared] = {}
        self._retired: list[aio.Channel] = []
        self._max_idle = max_idle

    @contextmanager
    def use(self, address: str) -> Iterator[aio.Channel]:
        """The channel to `address`, which stays open at least as long as the context."""
        shared = self._channels.pop(address, None) or _Shared(channel=open_channel(address))
        self._channels[address] = shared  # the most recently used is the last
        shared.num_users += 1
        try:
            yield shared.channel
        finally:
            shared.num_users -= 1
            self._retire()

    def _retire(self) -> None:
        idle = [address for address, shared in self._channels.items() if not shared.num_users]
        for address in idle[: max(0, len(idle) - self._max_idle)]:
            self._retired.append(self._channels.pop(address).channel)

    async def sweep(self) -> None:
        """Close the channels that were retired."""
        retired, self._retired = self._retired, []
        for channel in retired:
            await channel.close(None)

    async def close(self) -> None:
        """Close everything."""
        self._retired += [shared.channel for shared in self._channels.values()]
        self._channels.clear()
        await self.sweep()
