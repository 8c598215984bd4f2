"""What a worker measured of itself and of its peers, to protobuf and back (see rpc/convert.py)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

from cluster.rpc.pb import messages_pb2 as m
from cluster.rpc.pb import worker_pb2 as w
from cluster.rpc.wire_error import WireError
from cluster.types import PeerRate, Transport
from engine.scheduler.profile import Profile, Table

_TRANSPORTS: dict[str, Transport] = {name: name for name in get_args(Transport)}
_PEER_PLAIN = ("peer_id", "transport", "gb_per_s", "latency_ms")
_MAX_POINTS = 32
_PROFILE_PLAIN = (
    *("prefill_ms_per_token_kilocontext", "decode_ms_per_row_kilocontext"),
    *("max_step_ms", "max_step_tokens", "kv_token_bytes"),
)


def profile_to_pb(profile: Profile) -> m.Profile | None:
    """None when nothing was measured."""
    if not profile.known:
        return None
    return m.Profile(
        prefill=[m.Point(count=count, ms=ms) for count, ms in profile.prefill],
        decode=[m.Point(count=count, ms=ms) for count, ms in profile.decode],
        **{name: getattr(profile, name) for name in _PROFILE_PLAIN},
    )


def profile_from_pb(pb: m.Profile) -> Profile:
    """Raises WireError for tables that are none."""
    tables: dict[str, Table] = {
        "prefill": tuple((point.count, point.ms) for point in pb.prefill),
        "decode": tuple((point.count, point.ms) for point in pb.decode),
    }
    for name, table in tables.items():
        counts = [count for count, _ in table]
        if len(counts) > _MAX_POINTS or any(after <= before for before, after in pairwise(counts)):
            raise WireError(f"a profile whose {name} table does not ascend")
        if not all(0.0 <= ms < math.inf for _, ms in table):
            raise WireError(f"a profile whose {name} table is not of milliseconds")
    if not all(tables.values()):
        return Profile()
    plain: dict[str, Any] = {name: getattr(pb, name) for name in _PROFILE_PLAIN}
    return Profile(prefill=tables["prefill"], decode=tables["decode"], **plain)


def peer_to_pb(peer: PeerRate) -> w.PeerRate:
    return w.PeerRate(**{name: getattr(peer, name) for name in _PEER_PLAIN})


def peer_from_pb(pb: w.PeerRate) -> PeerRate:
    """Raises WireError for a rate that is none."""
    if pb.transport not in _TRANSPORTS or not (0.0 < pb.gb_per_s < math.inf and 0.0 <= pb.latency_ms < math.inf):
        raise WireError(f"a peer's rate {pb.gb_per_s} GB/s, {pb.latency_ms} ms over {pb.transport!r}")
    return PeerRate(
        peer_id=pb.peer_id,
        transport=_TRANSPORTS[pb.transport],
        gb_per_s=pb.gb_per_s,
        latency_ms=pb.latency_ms,
    )
