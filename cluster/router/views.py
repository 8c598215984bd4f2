"""What policies and predictions see: plain numbers of one moment, as the router knows them, so they may be old.

Structs, not dataclasses: every dispatch makes one of each worker, and a frozen dataclass takes six times as long.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.types import PeerRate, WorkerInfo
from engine.scheduler.profile import Scales


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's load: its last heartbeat and what was sent since, and what it may hold of one request's prompt."""

    info: WorkerInfo
    num_sequences: int  # as decode worker: running, pulling, waiting, or on their way
    queued_tokens: int  # prompt tokens that it still has to compute, for others or itself
    context_tokens: int = 0  # keys that its running requests see, in all
    backlog_ms: float = 0.0  # predicted time of those prompt tokens
    cached_tokens: int = 0  # of this request's prompt, by the KV index: a hint
    num_free_blocks: int | None = None  # None: not told yet
    scales: Scales = (1.0, 1.0)  # prefill, decode: real milliseconds over its profile's
    avoid: frozenset[str] = frozenset()  # as decode worker: sources that failed it lately
    rates: dict[str, PeerRate] = {}  # as source: by receiver

    @property
    def has_row(self) -> bool:
        """As decode worker: whether a row of its batch is left for one more choice."""
        return self.num_sequences < self.info.max_num_seqs


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement may depend on. `turn` counts placements of this router.

    `num_outputs` is how many tokens each choice is expected to get, from max_tokens and recent answers. `overheads` are
    what predictions were lately short of, by "alone" and "remote", in ms. Unless `may_be_alone`, a decode worker is
    left without sources only where there is none.
    """

    num_tokens: int
    num_choices: int
    turn: int
    num_outputs: float = 64.0
    overheads: Mapping[str, float] = {}
    may_be_alone: bool = True
