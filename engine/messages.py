"""What crosses between a worker's network process and its rank: frozen msgspec messages over shared-memory rings.

Commands go down (network -> rank) and take effect at the next step boundary; aborts have a ring of their own and are
read first, so they overtake prompts. Events go up: at most one `StepEvents` per step, which carries everything that
the step caused. The same messages drive the engine in one process (`LLM`, the virtual-clock cluster), unencoded.

Life cycle of a request that pulls its prompt's KV (owner of the target blocks: the rank's block manager):

    Probe -> Probed                 how much of the prompt the prefix cache holds now (nothing is pinned)
    Reserve -> Reserved | NoSpace   all blocks of the prompt at once; matched ones READY, the others LOADING
    Commit* ->                      blocks whose copy finished and whose checksum passed become READY (and cached)
    PullClosed ->                   no copy will write any more: the request runs from num_computed_tokens on
    Abort   ->                      while a pull is open its LOADING blocks turn QUARANTINED until PullClosed
A request without a pull is one `Add`. Further choices of the same prompt are `Add`s after the first one's PullClosed:
they hit the prefix cache.

A request that is to go on elsewhere: Pause -> Paused -> (a peer's Serve reads its blocks) -> Abort.

Life cycle of a served call (this worker is the source):

    Serve -> Serving | ServeBusy ; ServedPiece* ; ServeDone (all offered, still pinned) ; EndServe -> (unpinned)
"""

from __future__ import annotations

import msgspec

from engine.config import Role
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.scheduler.profile import Profile


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of all messages: encoded as arrays whose first element is the class name."""


class Add(_Message, frozen=True):
    """Run a request. `prompt` and `outputs` are int32 little-endian token ids; outputs come from an earlier attempt.

    Lower `priority` is sooner.
    """

    request_id: str
    prompt: bytes
    params: SamplingParams
    seed: int
    choice: int = 0
    outputs: bytes = b""
    cache_salt: bytes = b""
    priority: int = 0


class Probe(_Message, frozen=True):
    """Ask how many tokens of `tokens` (int32 le) the prefix cache holds. Answered by Probed."""

    request_id: str
    tokens: bytes
    cache_salt: bytes = b""


class Reserve(_Message, frozen=True):
    """Allocate every block of the request's known tokens for a pull. Answered by Reserved or NoSpace."""

    add: Add


class Commit(_Message, frozen=True):
    """Blocks [first_block, first_block + len(checksums)) of the request's table landed and their checksums passed."""

    request_id: str
    first_block: int
    checksums: tuple[int, ...]


class PullClosed(_Message, frozen=True):
    """All copies of this pull have reached their terminal state. Tokens [0, num_computed_tokens) hold valid KV."""

    request_id: str
    num_computed_tokens: int


class Abort(_Message, frozen=True):
    """Drop a request now, whatever its state. Unknown ids are ignored (it may have finished)."""

    request_id: str


class Pause(_Message, frozen=True):
    """Compute no more of a request, but keep its blocks pinned until Abort. Answered by Paused, unless it ends first.

    Steps in flight land first: every token of the request is in an event before Paused, or in the same one.
    """

    request_id: str


class SetRole(_Message, frozen=True):
    """Spend the next steps as a worker of this role does. Answered by RoleSet."""

    role: Role


class Serve(_Message, frozen=True):
    """Compute and pin the KV of tokens[:end] for a peer, offering from `start` on; compute at most max_compute_tokens.

    `start` is a multiple of the block size. max_compute_tokens -1 means as many as it takes.
    """

    call_id: str
    tokens: bytes
    start: int
    end: int
    max_compute_tokens: int = -1
    cache_salt: bytes = b""


class EndServe(_Message, frozen=True):
    """The call ended (success, cancel, deadline, broken connection: all the same): unpin."""

    call_id: str


class Shutdown(_Message, frozen=True):
    """Leave the engine loop after the current step."""


Command = Add | Probe | Reserve | Commit | PullClosed | Abort | Pause | SetRole | Serve | EndServe | Shutdown


class Paused(_Message, frozen=True):
    """A request computes no more; KV of its first num_held_tokens stays pinned, in whole blocks of the prefix cache."""

    request_id: str
    num_held_tokens: int


class RoleSet(_Message, frozen=True):
    role: Role


class Probed(_Message, frozen=True):
    request_id: str
    num_cached_tokens: int


class Reserved(_Message, frozen=True):
    """The request's block table: block i holds tokens [i * block_size, ...). The first num_cached_tokens are READY."""

    request_id: str
    block_ids: tuple[int, ...]
    num_cached_tokens: int


class NoSpace(_Message, frozen=True):
    """Not enough free blocks now. `never` when even an empty pool would not do."""

    request_id: str
    never: bool = False


class Serving(_Message, frozen=True):
    """Accepted: KV of [0, cached_tokens) is present, [.., end_tokens) will be; queued_tokens are ahead of it.

    end_tokens may be below the asked end when max_compute_tokens is short. `started` in later news: compute has begun.
    """

    call_id: str
    cached_tokens: int
    end_tokens: int
    queued_tokens: int


class ServeBusy(_Message, frozen=True):
    """The source cannot take the call: its quota is used up, or (never) it would never fit."""

    call_id: str
    never: bool = False


class ServedPiece(_Message, frozen=True):
    """Blocks ready to be read: entries first_block.. of the sequence, ending at token end_tokens.

    The last block is partial when end_tokens is not a multiple of the block size; its checksum is then over the
    valid tokens only (KVMemory.partial, C order).
    """

    call_id: str
    first_block: int
    block_ids: tuple[int, ...]
    checksums: tuple[int, ...]
    end_tokens: int


class ServeDone(_Message, frozen=True):
    """Every piece has been offered. Blocks stay pinned until EndServe."""

    call_id: str


class NewTokens(_Message, frozen=True):
    """Tokens of one request from one step. `first_position` counts outputs from 0 (outputs of earlier attempts too).

    A request ends with exactly one message that has a finish_reason; `error` is a catalogue code if it failed.
    """

    request_id: str
    first_position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0


class PromptLogprobs(_Message, frozen=True):
    """Logprobs of prompt tokens [first_position, first_position + len(logprobs)), in order; position 0 has none.

    All of them come before the request's first NewTokens.
    """

    request_id: str
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


class ServeProgress(_Message, frozen=True):
    """News of a served call: tokens computed so far, tokens ahead of it in the queue."""

    call_id: str
    computed_tokens: int
    queued_tokens: int


class Load(_Message, frozen=True):
    """The rank's load after a step; rides on every heartbeat. Who pulls has its prompt computed elsewhere."""

    num_running: int = 0
    num_waiting: int = 0
    num_served: int = 0
    queued_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_referenced_blocks: int = 0
    num_quarantined_blocks: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    context_tokens: int = 0
    prefill_scale: float = 1.0
    decode_scale: float = 1.0
    num_paused: int = 0
    num_pulling: int = 0

    @property
    def num_assigned(self) -> int:
        """Requests that are or will be decoded here."""
        return self.num_running + self.num_waiting + self.num_pulling


class StepEvents(_Message, frozen=True):
    """Everything one step caused. `num_tokens` 0 means only commands were answered.

    `stored` and `evicted`: short keys of the prefix cache (engine/kv/prefix_cache.py), if the rank records them.
    """

    step: int
    num_tokens: int
    replies: tuple[
        Probed
        | Reserved
        | NoSpace
        | Paused
        | RoleSet
        | PromptLogprobs
        | Serving
        | ServeBusy
        | ServeProgress
        | ServedPiece
        | ServeDone,
        ...,
    ] = ()
    tokens: tuple[NewTokens, ...] = ()
    load: Load = msgspec.field(default_factory=Load)
    stored: bytes = b""
    evicted: bytes = b""


class RankReady(_Message, frozen=True):
    """The first message up: how to map the KV memory, and what this engine is."""

    kv_path: str
    kv_nonce: bytes
    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    kv_dtype: str
    identity: str
    numerics_class: str
    checksum_algorithm: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    profile: Profile = msgspec.field(default_factory=Profile)


class RankProgress(_Message, frozen=True):
    """Start-up news. stage: "load", "warmup". done/total in bytes for load, in shapes for warm-up."""

    stage: str
    done: int
    total: int


class RankFailed(_Message, frozen=True):
    """The rank cannot go on; it exits after this. `message` is for people."""

    message: str


Event = StepEvents | RankReady | RankProgress | RankFailed
