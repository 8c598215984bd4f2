"""What policies and predictions see: plain numbers of one moment, as the router knows them, so they may be old."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.types import PeerRate, WorkerInfo
from engine.scheduler.profile import Scales


@dataclass(frozen=True, kw_only=True)
class WorkerView:
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
    rates: Mapping[str, PeerRate] = field(default_factory=dict)  # as source: by receiver


@dataclass(frozen=True, kw_only=True)
class RequestView:
    """What a placement may depend on. `turn` counts placements of this router.

    `num_outputs` is how many tokens each choice is expected to get, from max_tokens and recent answers. `overheads` are
    what predictions were lately short of, by "alone" and "remote", in ms.
    """

    num_tokens: int
    num_choices: int
    turn: int
    num_outputs: float = 64.0
    overheads: Mapping[str, float] = field(default_factory=dict)
