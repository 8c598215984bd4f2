"""What a policy says. Policies are pure: the same views, turn and random state give the same placement."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

import msgspec

from cluster.router.predict import Prediction
from cluster.router.views import RequestView, WorkerView


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Worker ids: who decodes, and whom it may ask for the prompt's KV, best first.

    No sources with `alone` is a choice; without it, there were none. `why` is for people. `considered` are the
    predictions that were compared, the chosen one first; empty for policies that don't predict.
    """

    decode: str
    sources: tuple[str, ...]
    alone: bool = False
    why: str = ""
    considered: tuple[Prediction, ...] = ()


class Policy(Protocol):
    """Chooses among ready workers. `decode` is never empty; `prefill` may be. Both are sorted by worker id.

    With `wants_cache` the views' `cached_tokens` are filled in, which costs a hash per cached block.
    """

    name: str
    wants_cache: bool

    def place(
        self, request: RequestView, decode: Sequence[WorkerView], prefill: Sequence[WorkerView], rng: Random
    ) -> Placement:
        """Where a request goes. Ties are broken by `rng`. Sources that the decode worker is to avoid come last."""
        ...


def share(view: WorkerView) -> float:
    """How much of its batch a decode worker has in use, 1.0 and more when it is full."""
    return view.num_sequences / max(1, view.info.max_num_seqs)


def rows_in_words(view: WorkerView) -> str:
    """For `why`."""
    return f"{view.num_sequences} of {view.info.max_num_seqs} rows in use"


def ranked(decode: WorkerView, sources: Sequence[str]) -> tuple[str, ...]:
    """Ids in the given order, those that failed this decode worker lately last."""
    if not decode.avoid:
        return tuple(sources)
    return (*(i for i in sources if i not in decode.avoid), *(i for i in sources if i in decode.avoid))
