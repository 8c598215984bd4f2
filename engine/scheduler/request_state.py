"""What the scheduler knows of one request and of one served call, and the seat that either computes in.

    Seat (row + block table):   [ 0 .... num_landed | in flight | num_computed .... ]     KV positions
    Request tokens:             [ prompt | outputs (landed) | num_sampling in flight ]

A request without a seat waits; preemption takes the seat and keeps the landed outputs. One whose KV is pulled has a
seat without a row until it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine.kv.prefix_cache import LITTLE_INT32, HashChain
from engine.request import SamplingParams
from engine.scheduler.batch import IntArray, RowStart


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """The facts of the loaded model that decide admission and ends. `identity` keys the prefix cache."""

    identity: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


_LITTLE_UINT32 = np.dtype("<u4")
_NO_TOKENS = np.zeros(0, dtype=np.int32)


def parse_tokens(data: bytes, vocab_size: int) -> IntArray:
    """int32 [n] from little-endian bytes. Raises ValueError for a torn array or an id outside the vocabulary."""
    if not data:
        return _NO_TOKENS
    if largest_id(data) >= vocab_size:
        raise ValueError(f"token ids must be in [0, {vocab_size})")
    return np.frombuffer(data, LITTLE_INT32).astype(np.int32)


def largest_id(data: bytes) -> int:
    """The largest of some token ids (little-endian, not none); a negative one is a huge one.

    By its place: `max()` takes three times as long over a short array. Raises ValueError for a torn one.
    """
    ids = np.frombuffer(data, _LITTLE_UINT32)
    return int(ids.item(ids.argmax()))


NO_ROW = -1  # of a seat whose prompt is pulled, until it runs


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A row and its block table. Counts are tokens whose KV is scheduled (`num_computed`) or has landed."""

    row: int
    served: bool
    block_ids: list[int]
    num_computed: int
    num_landed: int
    num_sampling: int = 0  # sampled tokens in flight (one per step in flight)
    num_told_blocks: int = 0  # entries of block_ids the runner knows
    started: bool = False  # the runner knows the row
    last_step: int = -1  # the last launched step that touches row or blocks
    closed: bool = False  # given up: what is still in flight is dropped


class Request(msgspec.Struct, kw_only=True, eq=False):
    """One own request. `max_outputs` is the counted length stop: max_tokens, context and pool, whichever is least."""

    request_id: str
    prompt: IntArray
    params: SamplingParams
    seed: int
    choice: int
    outputs: list[int]
    stop_ids: frozenset[int]
    max_outputs: int
    chain: HashChain
    arrival: int
    seat: Seat | None = None
    preempted: bool = False
    pulled: bool = False  # its first step after a pull is still to come
    priority: int = 0  # lower is sooner
    num_overtaken: int = 0  # later arrivals that were admitted before it
    urgent: bool = False  # overtaken so often that it goes before everything that is not
    num_scored: int = 0  # prompt tokens after the first whose logprobs have been told
    num_cached_tokens: int = -1  # prefix hit of the first admission; -1: not admitted yet
    held_blocks: list[int] = []  # pinned while it is paused

    @property
    def num_tokens(self) -> int:
        """Tokens known on the host."""
        return len(self.prompt) + len(self.outputs)

    @property
    def num_scheduled_tokens(self) -> int:
        """Known tokens and those being sampled."""
        return len(self.prompt) + len(self.outputs) + (self.seat.num_sampling if self.seat else 0)

    @property
    def wants_compute(self) -> bool:
        """Whether a further step can produce something it still may produce."""
        return self.num_scheduled_tokens - len(self.prompt) < self.max_outputs

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sorts requests: those that go first are first."""
        return (not self.urgent, self.priority, self.arrival)

    @property
    def queue_order(self) -> tuple[bool, int, bool, int]:
        """Sorts waiting requests: among equals, those that lost a seat come before those that never had one."""
        return (not self.urgent, self.priority, not self.preempted, self.arrival)

    @property
    def num_to_score(self) -> int:
        """Prompt tokens whose logprobs are still wanted."""
        return 0 if self.params.prompt_logprobs is None else len(self.prompt) - 1 - self.num_scored

    def tokens(self) -> IntArray:
        """int32 [num_tokens]: prompt, then landed outputs. Not to be written to."""
        if not self.outputs:
            return self.prompt
        return np.concatenate([self.prompt, np.array(self.outputs, dtype=np.int32)])

    def row_start(self, row: int) -> RowStart:
        """What the runner must know of this row."""
        return RowStart(
            row=row,
            request_id=self.request_id,
            token_ids=self.tokens(),
            num_prompt_tokens=len(self.prompt),
            params=self.params,
            seed=self.seed,
            choice=self.choice,
        )


_NO_SAMPLING = SamplingParams(temperature=0.0)


@dataclass(slots=True, kw_only=True, eq=False)
class ServedCall:
    """One Fetch that this worker serves: KV of token_ids [end], offered from block `num_offered` on."""

    call_id: str
    token_ids: IntArray
    chain: HashChain
    seat: Seat
    num_offered: int  # blocks before this one are offered, or the peer has them
    started: bool = False
    offered_all: bool = False
    end: int = field(init=False)  # tokens whose KV the peer gets

    def __post_init__(self) -> None:
        self.end = len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens not yet scheduled."""
        return self.end - self.seat.num_computed

    def tokens(self) -> IntArray:
        """int32 [end]."""
        return self.token_ids

    def row_start(self, row: int) -> RowStart:
        """What the runner must know of this row: nothing is ever sampled from it."""
        return RowStart(
            row=row,
            request_id=self.call_id,
            token_ids=self.token_ids,
            num_prompt_tokens=self.end,
            params=_NO_SAMPLING,
            seed=0,
        )


@dataclass(slots=True, kw_only=True)
class Counters:
    """Totals since start, for Load. Prefix cache counts are tokens."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Entry(msgspec.Struct, kw_only=True):
    """One row of a launched step. `seat.closed` at landing means that its result is dropped."""

    owner: Request | ServedCall
    seat: Seat
    query_len: int
    samples: bool
    scores: range | None = None  # prompt positions whose logprobs this step computes


class LaunchedStep(msgspec.Struct, kw_only=True):
    """A scheduled step that has not landed."""

    step: int
    entries: list[Entry]
