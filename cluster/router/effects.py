"""What the dispatcher (router/dispatch.py) wants done. Pure like the worker's machines; see cluster/worker/effects.py.

Dispatcher
  on_submit(now, Submit)                     a validated, admitted, tokenised request
  on_cancel(now, request_id)                 the client left, a stop string matched, the deadline passed
  on_worker_up(now, WorkerInfo)              the link said Welcome
  on_worker_down(now, worker_id)             the link broke
  on_heartbeat(now, Heartbeat)
  on_entries(now, worker_id, tuple[Entry, ...])
  on_timer(now); next_timer() -> seconds | None
"""

from __future__ import annotations

import msgspec

from cluster.types import Path, PromptScores, RouterMessage, Stage, Tokens
from engine.request import SamplingParams


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the HTTP side hands it over. `deadline` is monotonic seconds; one seed per choice.

    Lower `priority` is sooner.
    """

    request_id: str
    prompt: bytes
    params: SamplingParams
    seeds: tuple[int, ...]
    deadline: float
    cache_salt: bytes = b""
    priority: int = 0


class ToWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Send a message down the link of a worker."""

    worker_id: str
    message: RouterMessage


class Deliver(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted tokens of one choice, each position exactly once and in order."""

    tokens: Tokens
    path: Path | None = None


class DeliverScores(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs of the prompt's tokens, each position exactly once and in order, before any Deliver."""

    scores: PromptScores


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """News for people and for the SSE comment line."""

    request_id: str
    stage: Stage
    worker_id: str | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The request is over: every choice finished (code None), or it failed with a code of the catalogue. Sent once."""

    request_id: str
    code: str | None = None
    message: str = ""


class DropLink(msgspec.Struct, frozen=True, kw_only=True):
    """This worker is not to be trusted any more (silent or hung): break its link and connect anew."""

    worker_id: str
    reason: str


RouterEffect = ToWorker | Deliver | DeliverScores | Progress | Ended | DropLink
