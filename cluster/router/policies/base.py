"""What a policy sees and says. Policies are pure: the same views, turn and random state give the same placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from cluster.types import WorkerInfo


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """A worker's load as the router knows it: its last heartbeat and what was sent since."""

    info: WorkerInfo
    num_sequences: int  # as decode worker: running, pulling, waiting, or on their way
    queued_tokens: int  # as source: prompt tokens that it still has to compute


@dataclass(frozen=True, kw_only=True)
class RequestView:
    """What a placement may depend on. `turn` counts placements of this router."""

    num_tokens: int
    num_choices: int
    turn: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Worker ids: who decodes, and whom it may ask for the prompt's KV, best first."""

    decode: str
    sources: tuple[str, ...]


class Policy(Protocol):
    """Chooses among ready workers. `decode` is never empty; `prefill` may be. Both are sorted by worker id."""

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """Where a request goes. Ties are broken by `rng`."""
        ...
