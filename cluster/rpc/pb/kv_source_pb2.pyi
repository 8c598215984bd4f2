from cluster.rpc.pb import messages_pb2 as _messages_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchClientMessage(_message.Message):
    __slots__ = ("open", "taken", "seal")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    open: FetchOpen
    taken: FetchTaken
    seal: int
    def __init__(self, open: _Optional[_Union[FetchOpen, _Mapping]] = ..., taken: _Optional[_Union[FetchTaken, _Mapping]] = ..., seal: _Optional[int] = ...) -> None: ...

class FetchOpen(_message.Message):
    __slots__ = ("call_id", "request_id", "attempt", "source_incarnation", "receiver_id", "receiver_incarnation", "identity", "kv_fingerprint", "tokens", "start", "end", "max_compute_tokens", "cache_salt", "remaining_ms", "transports", "adapters", "media_hashes")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MAX_COMPUTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_HASHES_FIELD_NUMBER: _ClassVar[int]
    call_id: str
    request_id: str
    attempt: int
    source_incarnation: str
    receiver_id: str
    receiver_incarnation: str
    identity: str
    kv_fingerprint: str
    tokens: bytes
    start: int
    end: int
    max_compute_tokens: int
    cache_salt: bytes
    remaining_ms: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedScalarFieldContainer[str]
    media_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, call_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source_incarnation: _Optional[str] = ..., receiver_id: _Optional[str] = ..., receiver_incarnation: _Optional[str] = ..., identity: _Optional[str] = ..., kv_fingerprint: _Optional[str] = ..., tokens: _Optional[bytes] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., max_compute_tokens: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., remaining_ms: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[str]] = ..., media_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FetchTaken(_message.Message):
    __slots__ = ("piece_index",)
    PIECE_INDEX_FIELD_NUMBER: _ClassVar[int]
    piece_index: int
    def __init__(self, piece_index: _Optional[int] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("accepted", "busy", "moved", "refused", "news", "piece", "offered_all", "seal")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    OFFERED_ALL_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    accepted: FetchAccepted
    busy: FetchBusy
    moved: FetchMoved
    refused: FetchRefused
    news: FetchNews
    piece: Piece
    offered_all: FetchOfferedAll
    seal: int
    def __init__(self, accepted: _Optional[_Union[FetchAccepted, _Mapping]] = ..., busy: _Optional[_Union[FetchBusy, _Mapping]] = ..., moved: _Optional[_Union[FetchMoved, _Mapping]] = ..., refused: _Optional[_Union[FetchRefused, _Mapping]] = ..., news: _Optional[_Union[FetchNews, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ..., offered_all: _Optional[_Union[FetchOfferedAll, _Mapping]] = ..., seal: _Optional[int] = ...) -> None: ...

class FetchAccepted(_message.Message):
    __slots__ = ("cached_tokens", "end_tokens", "queue_ms", "transport", "local")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    end_tokens: int
    queue_ms: int
    transport: str
    local: LocalMemory
    def __init__(self, cached_tokens: _Optional[int] = ..., end_tokens: _Optional[int] = ..., queue_ms: _Optional[int] = ..., transport: _Optional[str] = ..., local: _Optional[_Union[LocalMemory, _Mapping]] = ...) -> None: ...

class LocalMemory(_message.Message):
    __slots__ = ("path", "nonce", "num_blocks")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    path: str
    nonce: bytes
    num_blocks: int
    def __init__(self, path: _Optional[str] = ..., nonce: _Optional[bytes] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class FetchBusy(_message.Message):
    __slots__ = ("retry_ms",)
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    retry_ms: int
    def __init__(self, retry_ms: _Optional[int] = ...) -> None: ...

class FetchMoved(_message.Message):
    __slots__ = ("to",)
    TO_FIELD_NUMBER: _ClassVar[int]
    to: _messages_pb2.Source
    def __init__(self, to: _Optional[_Union[_messages_pb2.Source, _Mapping]] = ...) -> None: ...

class FetchRefused(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class FetchNews(_message.Message):
    __slots__ = ("computed_tokens", "queue_ms")
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    computed_tokens: int
    queue_ms: int
    def __init__(self, computed_tokens: _Optional[int] = ..., queue_ms: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("call_id", "source_incarnation", "index", "first_block", "end_tokens", "first_layer", "num_layers", "dtype", "shape", "checksum_algorithm", "checksums", "payload", "block_ids", "hidden_state")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    call_id: str
    source_incarnation: str
    index: int
    first_block: int
    end_tokens: int
    first_layer: int
    num_layers: int
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    checksum_algorithm: str
    checksums: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    hidden_state: bytes
    def __init__(self, call_id: _Optional[str] = ..., source_incarnation: _Optional[str] = ..., index: _Optional[int] = ..., first_block: _Optional[int] = ..., end_tokens: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., checksum_algorithm: _Optional[str] = ..., checksums: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ..., block_ids: _Optional[_Iterable[int]] = ..., hidden_state: _Optional[bytes] = ...) -> None: ...

class FetchOfferedAll(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
