"""The one home of the conversions between cluster/types.py and protobuf for KVSource.Fetch; see rpc/convert.py."""

from __future__ import annotations

from cluster.rpc.convert import WireError, check_tokens, source_from_pb, source_to_pb
from cluster.rpc.pb import kv_source_pb2 as k
from cluster.types import (
    FetchAccepted,
    FetchBusy,
    FetchMoved,
    FetchNews,
    FetchOfferedAll,
    FetchOpen,
    FetchRefused,
    FetchReply,
    FetchTaken,
    LocalMemory,
    Piece,
    Transport,
)

_TRANSPORTS: dict[str, Transport] = {"local": "local", "grpc": "grpc"}
_OPEN_PLAIN = (
    *("call_id", "request_id", "attempt", "source_incarnation", "receiver_id", "receiver_incarnation", "identity"),
    *("kv_fingerprint", "tokens", "start", "end", "max_compute_tokens", "remaining_ms", "cache_salt"),
)
_PIECE_PLAIN = (
    *("call_id", "source_incarnation", "index", "first_block", "end_tokens", "first_layer", "num_layers", "dtype"),
    *("checksum_algorithm", "payload"),
)


def open_to_pb(message: FetchOpen) -> k.FetchClientMessage:
    return k.FetchClientMessage(
        open=k.FetchOpen(transports=message.transports, **{name: getattr(message, name) for name in _OPEN_PLAIN})
    )


def open_from_pb(pb: k.FetchClientMessage) -> FetchOpen:
    """The first message of a call."""
    if pb.WhichOneof("kind") != "open":
        raise WireError("a call begins with open")
    o = pb.open
    if o.adapters or o.media_hashes:
        raise WireError("adapters and media are not supported by this worker")
    check_tokens(o.tokens, "tokens")
    if not o.call_id or not 0 <= o.start < o.end <= len(o.tokens) // 4:
        raise WireError(f"fetch of [{o.start}, {o.end}) of {len(o.tokens) // 4} tokens")
    return FetchOpen(
        transports=tuple(_TRANSPORTS[name] for name in o.transports if name in _TRANSPORTS),
        **{name: getattr(o, name) for name in _OPEN_PLAIN},
    )


def taken_to_pb(taken: FetchTaken) -> k.FetchClientMessage:
    return k.FetchClientMessage(taken=k.FetchTaken(piece_index=taken.piece_index))


def taken_from_pb(call_id: str, pb: k.FetchClientMessage) -> FetchTaken:
    """Any later message of a call."""
    if pb.WhichOneof("kind") != "taken":
        raise WireError("only taken follows open")
    return FetchTaken(call_id=call_id, piece_index=pb.taken.piece_index)


def _accepted_to_pb(reply: FetchAccepted) -> k.FetchAccepted:
    local = reply.local
    return k.FetchAccepted(
        cached_tokens=reply.cached_tokens,
        end_tokens=reply.end_tokens,
        queue_ms=reply.queue_ms,
        transport=reply.transport,
        local=k.LocalMemory(path=local.path, nonce=local.nonce, num_blocks=local.num_blocks) if local else None,
    )


def _accepted_from_pb(pb: k.FetchAccepted) -> FetchAccepted:
    if pb.transport not in _TRANSPORTS:
        raise WireError(f"unknown transport {pb.transport!r}")
    local = None
    if pb.HasField("local"):
        local = LocalMemory(path=pb.local.path, nonce=pb.local.nonce, num_blocks=pb.local.num_blocks)
    return FetchAccepted(
        cached_tokens=pb.cached_tokens,
        end_tokens=pb.end_tokens,
        queue_ms=pb.queue_ms,
        transport=_TRANSPORTS[pb.transport],
        local=local,
    )


def _piece_to_pb(piece: Piece) -> k.FetchReply:
    """Filled in place: a message that is passed to another one's constructor is copied, payload and all."""
    reply = k.FetchReply()
    pb = reply.piece
    for name in _PIECE_PLAIN:
        setattr(pb, name, getattr(piece, name))
    pb.shape.extend(piece.shape)
    pb.checksums.extend(piece.checksums)
    pb.block_ids.extend(piece.block_ids)
    return reply


def _piece_from_pb(pb: k.Piece) -> Piece:
    return Piece(
        shape=tuple(pb.shape),
        checksums=tuple(pb.checksums),
        block_ids=tuple(pb.block_ids),
        **{name: getattr(pb, name) for name in _PIECE_PLAIN},
    )


def fetch_reply_to_pb(reply: FetchReply) -> k.FetchReply:
    if isinstance(reply, Piece):
        return _piece_to_pb(reply)
    if isinstance(reply, FetchNews):
        return k.FetchReply(news=k.FetchNews(computed_tokens=reply.computed_tokens, queue_ms=reply.queue_ms))
    if isinstance(reply, FetchAccepted):
        return k.FetchReply(accepted=_accepted_to_pb(reply))
    if isinstance(reply, FetchBusy):
        return k.FetchReply(busy=k.FetchBusy(retry_ms=reply.retry_ms))
    if isinstance(reply, FetchMoved):
        return k.FetchReply(moved=k.FetchMoved(to=source_to_pb(reply.to) if reply.to else None))
    if isinstance(reply, FetchRefused):
        return k.FetchReply(refused=k.FetchRefused(code=reply.code, message=reply.message))
    return k.FetchReply(offered_all=k.FetchOfferedAll())


def fetch_reply_from_pb(pb: k.FetchReply) -> FetchReply:
    kind = pb.WhichOneof("kind")
    if kind == "piece":
        return _piece_from_pb(pb.piece)
    if kind == "news":
        return FetchNews(computed_tokens=pb.news.computed_tokens, queue_ms=pb.news.queue_ms)
    if kind == "accepted":
        return _accepted_from_pb(pb.accepted)
    if kind == "busy":
        return FetchBusy(retry_ms=pb.busy.retry_ms)
    if kind == "moved":
        return FetchMoved(to=source_from_pb(pb.moved.to) if pb.moved.HasField("to") else None)
    if kind == "refused":
        return FetchRefused(code=pb.refused.code, message=pb.refused.message)
    if kind == "offered_all":
        return FetchOfferedAll()
    raise WireError("a fetch reply of no kind")
