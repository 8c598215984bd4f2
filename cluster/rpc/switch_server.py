"""The worker's end of Worker.Switch: one call in, one reply out; a caller that dies stops nothing.

The switch belongs to the worker: whoever asked may go away (a controller that is killed), the worker runs it to its
end. The caller's end is rpc/switch_client.py.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
from grpc import aio

from cluster.rpc.convert_switch import switch_reply_to_pb, switch_request_from_pb
from cluster.rpc.pb import worker_pb2 as pb
from cluster.rpc.wire_error import WireError
from cluster.types import SwitchReply, SwitchRequest

SwitchContext = aio.ServicerContext[pb.SwitchRequest, pb.SwitchReply]
MAX_SWITCHES = 16  # at once; all but one of them are refused by the worker anyway


class SwitchHandler(Protocol):
    """Who switches: the worker's shell. Called in the event loop."""

    async def switch(self, request: SwitchRequest) -> SwitchReply:
        """Run a switch to its end; the worker bounds it by request.timeout_ms. Is not cancelled with its caller."""
        ...


class SwitchMethod:
    """Worker.Switch over a handler; LinkServicer delegates to `serve`."""

    def __init__(self, handler: SwitchHandler) -> None:
        self._handler = handler
        self._running: set[asyncio.Task[SwitchReply]] = set()

    async def serve(self, request: pb.SwitchRequest, context: SwitchContext) -> pb.SwitchReply:
        """See Switch in proto/worker.proto."""
        try:
            wanted = switch_request_from_pb(request)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if len(self._running) >= MAX_SWITCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many switches")
        task = asyncio.get_running_loop().create_task(self._handler.switch(wanted))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return switch_reply_to_pb(await asyncio.shield(task))
