"""The caller's end of Worker.Switch: one call to one worker, with a deadline, over a channel of its own.

The worker ends every switch within its timeout, rollback included; the call waits a little longer than that. A call
that breaks says nothing about the switch: it goes on at the worker, whose next heartbeat tells how it ended.
"""

from __future__ import annotations

from grpc import aio

from cluster.rpc.channel import open_channel
from cluster.rpc.convert import WireError
from cluster.rpc.convert_switch import switch_reply_from_pb, switch_request_to_pb
from cluster.rpc.link import describe
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.seal import SealedChannel
from cluster.types import SwitchReply, SwitchRequest

GRACE_S = 3.0  # beyond the worker's own timeout: the rollback, and the way there and back


class SwitchCallError(ConnectionError):
    """No reply came; whether the worker switches is not known. The message is for people."""


async def call_switch(address: str, request: SwitchRequest) -> SwitchReply:
    """Ask the worker at `address` (host:port) to switch, and wait for the end. Raises SwitchCallError."""
    channel = open_channel(address)
    timeout_s = request.timeout_ms / 1000 + GRACE_S
    try:
        reply = await pb_grpc.WorkerStub(SealedChannel(channel)).Switch(
            switch_request_to_pb(request), timeout=timeout_s
        )
        return switch_reply_from_pb(reply)
    except aio.AioRpcError as error:
        raise SwitchCallError(f"the worker at {address}: {describe(error)}") from error
    except WireError as error:
        raise SwitchCallError(f"the worker at {address} answered {error}") from error
    finally:
        await channel.close(None)
