"""Every message between processes ends with a digest of itself: TCP's 16 bits let one wrong byte in 65,000 through.

A wrong byte in a Dispatch or a FetchOpen is another prompt, one in a batch another token: nobody would notice. The
seal is the last field of each message (fixed64 15: xxh3 of all the bytes before it), so it stays plain protobuf. Pieces
go without: they are large, and each field of theirs is fenced or under the blocks' own checksums.

A broken message is read as None, which no reader takes for a message: the stream is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import xxhash
from google.protobuf.message import DecodeError
from grpc import aio

from cluster.rpc.pb import kv_source_pb2

_log = logging.getLogger(__name__)
_TAG = bytes([15 << 3 | 1])
_SEAL_BYTES = 9
Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]


def sealed(body: bytes) -> bytes:
    """A serialized message with its seal."""
    return body + _TAG + xxhash.xxh3_64_digest(body)


def is_whole(data: bytes) -> bool:
    """Whether a message ends with the seal of what comes before it."""
    end = len(data) - _SEAL_BYTES
    if end < 0 or data[end : end + 1] != _TAG:  # first, because a piece has megabytes
        return False
    return data[end + 1 :] == xxhash.xxh3_64_digest(memoryview(data)[:end])


def _serializer(plain: Serializer) -> Serializer:
    def serialize(message: Any) -> bytes:
        body = plain(message)
        return body if _is_piece(message) else sealed(body)

    return serialize


def _deserializer(plain: Deserializer) -> Deserializer:
    def deserialize(data: bytes) -> Any:
        if is_whole(data):
            return plain(data)
        try:
            message = plain(data)
        except DecodeError:
            message = None
        if _is_piece(message):
            return message
        _log.warning("a message of %d bytes is not what was sent", len(data))
        return None

    return deserialize


def _is_piece(message: object) -> bool:
    return isinstance(message, kv_source_pb2.FetchReply) and message.WhichOneof("kind") == "piece"


class SealedChannel:
    """A channel for generated stubs whose messages are sealed both ways."""

    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel

    def stream_stream(
        self, method: str, request_serializer: Serializer, response_deserializer: Deserializer, **options: Any
    ) -> Any:
        """See aio.Channel."""
        write, read = _serializer(request_serializer), _deserializer(response_deserializer)
        return self._channel.stream_stream(method, write, read, **options)

    def unary_unary(
        self, method: str, request_serializer: Serializer, response_deserializer: Deserializer, **options: Any
    ) -> Any:
        """See aio.Channel."""
        write, read = _serializer(request_serializer), _deserializer(response_deserializer)
        return self._channel.unary_unary(method, write, read, **options)


class SealedServer:
    """A server for generated `add_..._to_server` functions whose messages are sealed both ways."""

    def __init__(self, server: aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Left out: what is registered by name, sealed, comes next."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """See aio.Server."""
        replaced = {
            name: handler._replace(
                request_deserializer=_deserializer(handler.request_deserializer),
                response_serializer=_serializer(handler.response_serializer),
            )
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, replaced),))
