"""Which keeper an address means: host:port is the controller's own map, redis:// or rediss:// a Redis or Valkey."""

from __future__ import annotations

from cluster.registry.registry import Registry, RegistryClient


def connect(address: str) -> Registry:
    """A client of the registry at `address`; it connects when first used."""
    if not is_redis(address):
        return RegistryClient(address)
    from cluster.registry.redis_registry import RedisRegistry  # half of a worker's import time, for those who use it

    return RedisRegistry(address)


def is_redis(address: str) -> bool:
    """Whether `address` is a Redis URL."""
    return address.startswith(("redis://", "rediss://"))
