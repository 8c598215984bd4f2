"""The registry in Redis (or Valkey), for several routers and controllers: the same rules as memory_registry.py.

    {prefix}:ids                 sorted set: worker ids by when they were last put (seconds)
    {prefix}:worker:ID           hash: incarnation, epoch, info (WorkerInfo as protobuf); expires with its time-to-live
    {prefix}:former:ID           list: incarnations that were replaced or removed, not believed again for FORMER_S
    {prefix}:changes             channel: told after every change

Each rule is one Lua script, so writers need no lock. A reader polls as well: entries that expire tell nobody, and
messages are lost with a connection. Redis is a map and no authority: when it is away, what was seen last holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.registry.memory_registry import MAX_FORMER
from cluster.registry.registry import CALL_TIMEOUT_S, RECONNECT_S, WATCH_REPEAT_S, RegistryLostError
from cluster.rpc.convert import WireError, info_from_pb, info_to_pb
from cluster.rpc.pb import messages_pb2 as pb
from cluster.types import WorkerInfo

PREFIX = "neap"
FORMER_S = 86_400  # worker ids may be names of pods: nothing of one is kept for ever

# KEYS: entry, former, ids; ARGV: worker id, incarnation, epoch, info, ttl ms, MAX_FORMER, channel, FORMER_S
_PUT = """
local entry, former = KEYS[1], KEYS[2]
if redis.call('LPOS', former, ARGV[2]) then return 0 end
local known = redis.call('HMGET', entry, 'incarnation', 'epoch', 'info')
if known[1] == ARGV[2] then
  if tonumber(ARGV[3]) < tonumber(known[2]) then return 0 end
elseif known[1] then
  redis.call('RPUSH', former, known[1])
  redis.call('LTRIM', former, -tonumber(ARGV[6]), -1)
end
redis.call('EXPIRE', former, ARGV[8])
redis.call('HSET', entry, 'incarnation', ARGV[2], 'epoch', ARGV[3], 'info', ARGV[4])
redis.call('PEXPIRE', entry, ARGV[5])
local now = redis.call('TIME')[1]
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - ARGV[8])
if known[3] ~= ARGV[4] then redis.call('PUBLISH', ARGV[7], ARGV[1]) end
return 1
"""

# KEYS: entry, former; ARGV: worker id, incarnation, MAX_FORMER, channel, FORMER_S
_REMOVE = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[2] then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('LTRIM', KEYS[2], -tonumber(ARGV[3]), -1)
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""


class RedisRegistry:
    """Implements registry.Registry at `url` (redis://[:password@]host:port/db, rediss:// for TLS)."""

    def __init__(self, url: str, *, prefix: str = PREFIX) -> None:
        self.address = url
        self._prefix = prefix
        self._client: Redis | None = None

    async def put(self, info: WorkerInfo, ttl_ms: int) -> None:
        """Publish `info` for ttl_ms. Raises RegistryLostError."""
        keys = (*self._keys(info.worker_id), f"{self._prefix}:ids")
        wire = info_to_pb(info).SerializeToString(deterministic=True)
        rules = (MAX_FORMER, self._channel, FORMER_S)
        await self._run(_PUT, keys, (info.worker_id, info.incarnation, info.epoch, wire, ttl_ms, *rules))

    async def remove(self, worker_id: str, incarnation: str) -> None:
        """Take this incarnation out. Raises RegistryLostError."""
        rules = (MAX_FORMER, self._channel, FORMER_S)
        await self._run(_REMOVE, self._keys(worker_id), (worker_id, incarnation, *rules))

    async def workers(self) -> tuple[WorkerInfo, ...]:
        """The map now, by worker id. Raises RegistryLostError."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return (await self._read())[0]
        except (RedisError, OSError, TimeoutError) as error:
            raise self._lost(error) from error

    async def watch(self) -> AsyncIterator[tuple[WorkerInfo, ...]]:
        """The whole map at once and after each change (and every 2 s); waits out lost connections for ever."""
        pause = RECONNECT_S[0]
        while True:
            changes = self._open().pubsub(ignore_subscribe_messages=True)
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await changes.subscribe(self._channel)
                while True:
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        workers, expires_s = await self._read()
                    pause = RECONNECT_S[0]
                    yield workers
                    await changes.get_message(timeout=max(0.01, min(WATCH_REPEAT_S, expires_s)))
            except (RedisError, OSError, TimeoutError):
                pause = min(2 * pause, RECONNECT_S[1])
            finally:
                await changes.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close every connection. The registry can be used again; it then connects anew."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    @property
    def _channel(self) -> str:
        return f"{self._prefix}:changes"

    def _keys(self, worker_id: str) -> tuple[str, str]:
        return f"{self._prefix}:worker:{worker_id}", f"{self._prefix}:former:{worker_id}"

    def _open(self) -> Redis:
        if self._client is None:
            self._client = Redis.from_url(
                self.address,
                socket_connect_timeout=CALL_TIMEOUT_S,
                health_check_interval=0,
                retry=Retry(NoBackoff(), 1),  # of a connection that has died meanwhile; more is decided by the callers
            )
        return self._client

    async def _run(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._open().eval(script, len(keys), *keys, *arguments)
        except (RedisError, OSError, TimeoutError) as error:
            raise self._lost(error) from error

    async def _read(self) -> tuple[tuple[WorkerInfo, ...], float]:
        """The map, and the seconds until its first entry expires. An entry that makes no sense is passed over."""
        names: list[Any] = list(await self._open().zrange(f"{self._prefix}:ids", 0, -1))
        ids = sorted(name.decode() for name in names)
        async with self._open().pipeline(transaction=False) as pipe:
            for worker_id in ids:
                entry = self._keys(worker_id)[0]
                pipe.hget(entry, "info")
                pipe.pttl(entry)
            answers = await pipe.execute()
        known = [(wire, ttl_ms) for wire, ttl_ms in zip(answers[::2], answers[1::2], strict=True) if wire is not None]
        workers = tuple(info for wire, _ in known if (info := _parse(wire)) is not None)
        return workers, min((ttl_ms / 1000 for _, ttl_ms in known), default=WATCH_REPEAT_S)

    def _lost(self, error: BaseException) -> RegistryLostError:
        where = self.address.rpartition("@")[2]  # without a password
        return RegistryLostError(f"registry at {where}: {type(error).__name__}")


def _parse(wire: bytes) -> WorkerInfo | None:
    try:
        return info_from_pb(pb.WorkerInfo.FromString(wire))
    except (DecodeError, WireError):
        return None
