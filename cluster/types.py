"""What the parts of the cluster say to each other.

Protobuf exists only on the wire; cluster/rpc/convert.py is the one place that turns these into it and back. The state
machines (router/dispatch.py, worker/decode.py, worker/prefill.py) take and return these and nothing else, so they run
unchanged over gRPC and under the virtual clock. Times `now` are seconds of a monotonic clock; the wire carries only
remaining milliseconds. Token ids are int32 little-endian bytes.

Messages are Structs: several are made for each step of a request, and a frozen dataclass takes eight times as long.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.config import Role
from engine.kv.prefix_cache import SHORT_KEY_BYTES
from engine.messages import Load
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.scheduler.profile import Profile

WorkerState = Literal["starting", "ready", "draining", "switching", "verifying", "failed"]
Transport = Literal["local", "grpc"]
Path = Literal["prefill-decode", "decode-only", "prefill-decode+local"]
Stage = Literal["queued", "prefilling", "transferring", "waiting"]
SourceFailure = Literal["broken", "silent", "refused", "spoiled", "protocol"]

HEARTBEAT_S = 0.5  # workers send one this often, on every link
NEWS_S = 0.5  # a source sends news at least this often
SILENCE_S = 2.0  # no news for this long: the peer is suspected
CACHE_KEY_BYTES = SHORT_KEY_BYTES  # of a block's chained hash, on the link
OBSERVER_LAG_S = 1.0  # an observer that itself slept longer than this resets its timers first


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is; see WorkerInfo in proto/messages.proto for every field."""

    worker_id: str
    incarnation: str
    epoch: int
    role: Role
    state: WorkerState
    address: str
    model: str = ""
    identity: str = ""
    kv_fingerprint: str = ""
    numerics_class: str = ""
    block_size: int = 16
    max_model_len: int = 0
    max_num_seqs: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pool: str = ""
    node: str = ""
    pid: int = 0
    profile: Profile = msgspec.field(default_factory=Profile)


class SourceRef(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that may be asked for KV. max_compute_tokens: -1 all it takes, 0 only what it holds."""

    worker_id: str
    incarnation: str
    address: str
    max_compute_tokens: int = -1


# ---- the link, router -> worker


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation of a prompt; `outputs` were accepted from earlier attempts."""

    index: int
    seed: int
    outputs: bytes = b""


class Dispatch(msgspec.Struct, frozen=True, kw_only=True):
    """A request, or its continuation, for one decode worker (named by incarnation and epoch)."""

    request_id: str
    attempt: int
    incarnation: str
    epoch: int
    prompt: bytes
    choices: tuple[Choice, ...]
    params: SamplingParams
    remaining_ms: int
    sources: tuple[SourceRef, ...] = ()
    cache_salt: bytes = b""
    priority: int = 0
    moved: bool = False  # given away by another worker: not to be moved again before its first token here


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Drop a request. Overtakes prompts."""

    request_id: str
    attempt: int


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """The router no longer needs what a moved request left behind."""

    request_id: str
    attempt: int


RouterMessage = Dispatch | AbortRequest | Release

# ---- the link, worker -> router


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one choice. `position` counts outputs from 0. `path` comes with the first tokens of an attempt."""

    request_id: str
    attempt: int
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    path: Path | None = None


class News(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request stands before its first token."""

    request_id: str
    attempt: int
    stage: Stage
    computed_tokens: int = 0
    queue_ms: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt is over at this worker. `code` is of cluster/errors.py, or "refused" / "busy": dispatch again."""

    request_id: str
    attempt: int
    code: str
    message: str = ""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """The worker gives the request away: no more tokens of this attempt come, at whatever position it stands.

    KV of its first `held_tokens` tokens stays pinned there until Release, the deadline, or the link's end.
    """

    request_id: str
    attempt: int
    held_tokens: int = 0


class SourceFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A source failed this attempt's decode worker, which goes on without it."""

    request_id: str
    attempt: int
    source_id: str
    source_incarnation: str
    reason: SourceFailure


class CacheNews(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that came into, and left, a worker's prefix cache: CACHE_KEY_BYTES of each chained hash, concatenated.

    With `reset`, `stored` is all that it holds. It belongs to no request.
    """

    reset: bool = False
    stored: bytes = b""
    evicted: bytes = b""
    request_id: str = ""
    attempt: int = 0


class PromptScores(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs of prompt tokens [first_position, ...), in order and before any Tokens. Position 0 has none."""

    request_id: str
    attempt: int
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


Entry = Tokens | PromptScores | News | Failed | Moved | SourceFailed | CacheNews


class PeerRate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a worker's KV reaches a peer: latency_ms + bytes / (gb_per_s * 1e6) milliseconds."""

    peer_id: str
    transport: Transport
    gb_per_s: float
    latency_ms: float


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """Sent by the I/O side of a worker, engine hung or not. step_age_ms is 0 when no step runs."""

    info: WorkerInfo
    load: Load = msgspec.field(default_factory=Load)
    step_count: int = 0
    step_age_ms: int = 0
    peers: tuple[PeerRate, ...] = ()


# ---- KVSource.Fetch


class FetchOpen(msgspec.Struct, frozen=True, kw_only=True):
    """First message of a call; see proto/kv_source.proto."""

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
    remaining_ms: int
    cache_salt: bytes = b""
    transports: tuple[Transport, ...] = ("local", "grpc")


class LocalMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The source's KV memory for a same-host receiver (engine/kv/memory.py)."""

    path: str
    nonce: bytes
    num_blocks: int


class FetchAccepted(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int
    end_tokens: int
    queue_ms: int
    transport: Transport
    local: LocalMemory | None = None


class FetchBusy(msgspec.Struct, frozen=True, kw_only=True):
    retry_ms: int


class FetchMoved(msgspec.Struct, frozen=True, kw_only=True):
    """Not here any more; without `to` the receiver asks its next source."""

    to: SourceRef | None = None


class FetchRefused(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class FetchNews(msgspec.Struct, frozen=True, kw_only=True):
    computed_tokens: int
    queue_ms: int


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Some blocks of the sequence, ready to be read. Fenced by (call_id, source_incarnation); one checksum per block.

    The machines make it without payload; the gRPC connector fills `payload` in at the source.
    """

    call_id: str
    source_incarnation: str
    index: int
    first_block: int
    end_tokens: int
    num_layers: int
    dtype: str
    shape: tuple[int, ...]
    checksum_algorithm: str
    checksums: tuple[int, ...]
    block_ids: tuple[int, ...] = ()
    payload: bytes = b""
    first_layer: int = 0


class FetchOfferedAll(msgspec.Struct, frozen=True, kw_only=True):
    """Every piece was sent. The blocks stay pinned until the receiver ends the call."""


FetchReply = FetchAccepted | FetchBusy | FetchMoved | FetchRefused | FetchNews | Piece | FetchOfferedAll


class FetchTaken(msgspec.Struct, frozen=True, kw_only=True):
    """All pieces up to this index have landed at the receiver."""

    call_id: str
    piece_index: int


# ---- Switch


class SwitchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Change the role; with `role` None give everything away and stay draining. Refused unless both fences match."""

    incarnation: str
    expected_epoch: int
    role: Role | None
    timeout_ms: int = 10_000


SwitchOutcome = Literal["switched", "drained", "rolled_back", "refused"]


class SwitchReply(msgspec.Struct, frozen=True, kw_only=True):
    """How a switch ended. Durations in milliseconds from the decision to the publication; `canary_ms` is part of it."""

    outcome: SwitchOutcome
    info: WorkerInfo
    reason: str = ""
    moved: int = 0
    finished_in_place: int = 0
    duration_ms: float = 0.0
    canary_ms: float = 0.0
