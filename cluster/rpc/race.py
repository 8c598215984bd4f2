"""The ends of a stream, each a coroutine of its own, live and die together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class StreamEndedError(ConnectionError):
    """A stream is over: the peer ended it, or one of our own decided to."""


async def race(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until the first ends, then cancel the others. Raises what the first one raised.

    gRPC cancels a coroutine that reads or writes a stream which is gone, or raises InvalidStateError in one that begins
    to; here that is a StreamEndedError, so that it cannot be taken for the caller's cancellation, or a fault of ours.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        if task.cancelled() or isinstance(task.exception(), asyncio.InvalidStateError):
            raise StreamEndedError("the stream is gone")
        task.result()
