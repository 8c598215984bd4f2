"""Switch requests and replies to protobuf and back."""

from __future__ import annotations

from typing import get_args

from cluster.rpc.convert import info_from_pb, info_to_pb
from cluster.rpc.pb import messages_pb2 as m
from cluster.rpc.pb import worker_pb2 as w
from cluster.rpc.wire_error import WireError
from cluster.types import SwitchOutcome, SwitchReply, SwitchRequest
from engine.config import Role

_ROLES: dict[Role | None, m.Role] = {None: m.ROLE_UNSPECIFIED, "prefill": m.ROLE_PREFILL, "decode": m.ROLE_DECODE}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_OUTCOMES: dict[str, SwitchOutcome] = {outcome: outcome for outcome in get_args(SwitchOutcome)}


def switch_request_to_pb(request: SwitchRequest) -> w.SwitchRequest:
    """See SwitchRequest in proto/worker.proto."""
    return w.SwitchRequest(
        incarnation=request.incarnation,
        expected_epoch=request.expected_epoch,
        role=_ROLES[request.role],
        timeout_ms=request.timeout_ms,
    )


def switch_request_from_pb(pb: w.SwitchRequest) -> SwitchRequest:
    """Raises WireError for a role that this version does not know."""
    if not isinstance(pb, w.SwitchRequest):
        raise WireError("a broken message")
    if pb.role not in _ROLES_BACK:
        raise WireError(f"role {pb.role}")
    return SwitchRequest(
        incarnation=pb.incarnation,
        expected_epoch=pb.expected_epoch,
        role=_ROLES_BACK[pb.role],
        timeout_ms=pb.timeout_ms,
    )


def switch_reply_to_pb(reply: SwitchReply) -> w.SwitchReply:
    """See SwitchReply in proto/worker.proto."""
    return w.SwitchReply(
        outcome=reply.outcome,
        reason=reply.reason,
        info=info_to_pb(reply.info),
        moved=reply.moved,
        finished_in_place=reply.finished_in_place,
        duration_ms=reply.duration_ms,
        canary_ms=reply.canary_ms,
    )


def switch_reply_from_pb(pb: w.SwitchReply) -> SwitchReply:
    """Raises WireError for an outcome that this version does not know."""
    if not isinstance(pb, w.SwitchReply):
        raise WireError("a broken message")
    if pb.outcome not in _OUTCOMES:
        raise WireError(f"a switch that ended as {pb.outcome!r}")
    return SwitchReply(
        outcome=_OUTCOMES[pb.outcome],
        reason=pb.reason,
        info=info_from_pb(pb.info),
        moved=pb.moved,
        finished_in_place=pb.finished_in_place,
        duration_ms=pb.duration_ms,
        canary_ms=pb.canary_ms,
    )
