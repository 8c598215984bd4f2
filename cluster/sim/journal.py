"""The event log of a simulation: one line per message, in order, so that two runs can be compared word for word."""

from __future__ import annotations

from typing import Any

from cluster.router.effects import Deliver, ToWorker
from cluster.types import Dispatch, FetchNews, FetchOpen, News, Piece, Tokens
from cluster.worker.effects import OpenFetch, SendEntry, SendFetch, SendTaken, StartCopy, ToEngine
from engine.messages import PullClosed, Reserve


def describe(thing: Any) -> str:
    """A short, complete enough, deterministic text for a message or effect."""
    name = type(thing).__name__
    match thing:
        case ToEngine():
            return f"{name} {describe(thing.command)}"
        case ToWorker():
            return f"{name} {thing.worker_id} {describe(thing.message)}"
        case Deliver():
            return f"{name} {describe(thing.tokens)}"
        case Reserve():
            return f"{name} {thing.add.request_id}"
        case PullClosed():
            return f"{name} {thing.request_id} {thing.num_computed_tokens}"
        case SendEntry():
            return f"{name} {thing.link_id} {describe(thing.entry)}"
        case SendFetch():
            return f"{name} {thing.call_id} {describe(thing.reply)}"
        case OpenFetch():
            return f"{name} {thing.source.worker_id} {describe(thing.open)}"
        case SendTaken():
            return f"{name} {thing.taken.call_id} {thing.taken.piece_index}"
        case FetchOpen():
            return f"{name} {thing.call_id} [{thing.start}, {thing.end})"
        case Piece():
            return f"{name} {thing.index} block {thing.first_block} to token {thing.end_tokens}"
        case StartCopy():
            return f"{name} {thing.copy_id} {thing.target_block_ids}"
        case Tokens():
            at = f"{thing.request_id}/{thing.attempt} choice {thing.choice} at {thing.position}"
            return f"{name} {at} {thing.token_ids} {thing.finish_reason or ''} {thing.path or ''}"
        case News():
            return f"{name} {thing.request_id}/{thing.attempt} {thing.stage} {thing.computed_tokens} {thing.queue_ms}"
        case FetchNews():
            return f"{name} {thing.computed_tokens} {thing.queue_ms}"
        case Dispatch():
            return f"{name} {thing.request_id}/{thing.attempt} to {thing.incarnation} {thing.remaining_ms} ms"
    label = getattr(thing, "request_id", None) or getattr(thing, "call_id", None) or getattr(thing, "worker_id", "")
    return f"{name} {label} {getattr(thing, 'code', None) or ''}".rstrip()


class Journal:
    """Lines of text with their time. `entries` keeps (time, who, what) for tests that look for one."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, str, str]] = []

    def note(self, now: float, who: str, what: str) -> None:
        """Add a line."""
        self.entries.append((now, who, what))

    def lines(self) -> list[str]:
        """Everything so far."""
        return [f"{now:.6f} {who} {what}" for now, who, what in self.entries]

    def has(self, who: str, *words: str) -> bool:
        """Whether one line of `who` holds all the words."""
        return any(actor == who and all(word in what for word in words) for _, actor, what in self.entries)
