from cluster.rpc.pb import messages_pb2 as _messages_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SwitchRequest(_message.Message):
    __slots__ = ("incarnation", "expected_epoch", "role", "timeout_ms", "seal")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    expected_epoch: int
    role: _messages_pb2.Role
    timeout_ms: int
    seal: int
    def __init__(self, incarnation: _Optional[str] = ..., expected_epoch: _Optional[int] = ..., role: _Optional[_Union[_messages_pb2.Role, str]] = ..., timeout_ms: _Optional[int] = ..., seal: _Optional[int] = ...) -> None: ...

class SwitchReply(_message.Message):
    __slots__ = ("outcome", "reason", "info", "moved", "finished_in_place", "duration_ms", "canary_ms", "seal")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    CANARY_MS_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    reason: str
    info: _messages_pb2.WorkerInfo
    moved: int
    finished_in_place: int
    duration_ms: float
    canary_ms: float
    seal: int
    def __init__(self, outcome: _Optional[str] = ..., reason: _Optional[str] = ..., info: _Optional[_Union[_messages_pb2.WorkerInfo, _Mapping]] = ..., moved: _Optional[int] = ..., finished_in_place: _Optional[int] = ..., duration_ms: _Optional[float] = ..., canary_ms: _Optional[float] = ..., seal: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "dispatch", "abort", "release", "batch", "taken", "seal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    dispatch: Dispatch
    abort: Abort
    release: Release
    batch: RouterBatch
    taken: int
    seal: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., dispatch: _Optional[_Union[Dispatch, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., batch: _Optional[_Union[RouterBatch, _Mapping]] = ..., taken: _Optional[int] = ..., seal: _Optional[int] = ...) -> None: ...

class RouterBatch(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[RouterMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[RouterMessage, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "seed", "outputs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    seed: int
    outputs: bytes
    def __init__(self, index: _Optional[int] = ..., seed: _Optional[int] = ..., outputs: _Optional[bytes] = ...) -> None: ...

class Dispatch(_message.Message):
    __slots__ = ("request_id", "attempt", "incarnation", "epoch", "prompt", "choices", "sampling", "cache_salt", "remaining_ms", "sources", "priority", "moved", "adapters", "media_hashes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_HASHES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    incarnation: str
    epoch: int
    prompt: bytes
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    sampling: _messages_pb2.Sampling
    cache_salt: bytes
    remaining_ms: int
    sources: _containers.RepeatedCompositeFieldContainer[_messages_pb2.Source]
    priority: int
    moved: bool
    adapters: _containers.RepeatedScalarFieldContainer[str]
    media_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., incarnation: _Optional[str] = ..., epoch: _Optional[int] = ..., prompt: _Optional[bytes] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., sampling: _Optional[_Union[_messages_pb2.Sampling, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., remaining_ms: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[_messages_pb2.Source, _Mapping]]] = ..., priority: _Optional[int] = ..., moved: _Optional[bool] = ..., adapters: _Optional[_Iterable[str]] = ..., media_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "heartbeat", "batch", "num_read", "seal")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    NUM_READ_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    welcome: _messages_pb2.WorkerInfo
    heartbeat: Heartbeat
    batch: Batch
    num_read: int
    seal: int
    def __init__(self, welcome: _Optional[_Union[_messages_pb2.WorkerInfo, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., num_read: _Optional[int] = ..., seal: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("info", "load", "step_count", "step_age_ms", "peers")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    info: _messages_pb2.WorkerInfo
    load: _messages_pb2.Load
    step_count: int
    step_age_ms: int
    peers: _containers.RepeatedCompositeFieldContainer[PeerRate]
    def __init__(self, info: _Optional[_Union[_messages_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_messages_pb2.Load, _Mapping]] = ..., step_count: _Optional[int] = ..., step_age_ms: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[PeerRate, _Mapping]]] = ...) -> None: ...

class PeerRate(_message.Message):
    __slots__ = ("peer_id", "transport", "gb_per_s", "latency_ms")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    transport: str
    gb_per_s: float
    latency_ms: float
    def __init__(self, peer_id: _Optional[str] = ..., transport: _Optional[str] = ..., gb_per_s: _Optional[float] = ..., latency_ms: _Optional[float] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("request_id", "attempt", "tokens", "news", "failed", "source_failed", "cache", "prompt_scores", "moved")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FAILED_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    tokens: Tokens
    news: News
    failed: Failed
    source_failed: SourceFailed
    cache: CacheNews
    prompt_scores: PromptScores
    moved: Moved
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., news: _Optional[_Union[News, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., source_failed: _Optional[_Union[SourceFailed, _Mapping]] = ..., cache: _Optional[_Union[CacheNews, _Mapping]] = ..., prompt_scores: _Optional[_Union[PromptScores, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("first_position", "logprobs")
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_position: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_messages_pb2.TokenLogprobs]
    def __init__(self, first_position: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_messages_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("choice", "position", "token_ids", "logprobs", "finish_reason", "stop_token", "num_cached_tokens", "path")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    choice: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_messages_pb2.TokenLogprobs]
    finish_reason: str
    stop_token: int
    num_cached_tokens: int
    path: str
    def __init__(self, choice: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_messages_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_token: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class News(_message.Message):
    __slots__ = ("stage", "computed_tokens", "queue_ms")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    computed_tokens: int
    queue_ms: int
    def __init__(self, stage: _Optional[str] = ..., computed_tokens: _Optional[int] = ..., queue_ms: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("held_tokens",)
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    held_tokens: int
    def __init__(self, held_tokens: _Optional[int] = ...) -> None: ...

class SourceFailed(_message.Message):
    __slots__ = ("source_id", "source_incarnation", "reason")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    source_incarnation: str
    reason: str
    def __init__(self, source_id: _Optional[str] = ..., source_incarnation: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CacheNews(_message.Message):
    __slots__ = ("reset", "stored", "evicted")
    RESET_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    reset: bool
    stored: bytes
    evicted: bytes
    def __init__(self, reset: _Optional[bool] = ..., stored: _Optional[bytes] = ..., evicted: _Optional[bytes] = ...) -> None: ...
