"""What the worker's state machines want done. The shell (worker/service.py, or sim/ on the virtual clock) does it.

The machines are pure: each call takes `now` (monotonic seconds) and a message and returns effects, in order. The shell
talks to WorkerMachine (worker/machine.py), which hands on to these two and adds begin(now), on_switch(now, call_id,
SwitchRequest) and retire(now).

    DecodeMachine (worker/decode.py)                        PrefillMachine (worker/prefill.py)
      on_dispatch(now, link_id, Dispatch)                     on_fetch(now, FetchOpen)
      on_abort(now, link_id, AbortRequest | Release)          on_taken(now, FetchTaken)
      on_link_broken(now, link_id)                            on_call_broken(now, call_id)   (also: the receiver closed)
      on_events(now, StepEvents)                              on_events(now, StepEvents); on_timer(now)
      on_fetch_reply(now, call_id, FetchReply)                next_timer() -> seconds | None
      on_fetch_broken(now, call_id)   (ended by the source or the network)
      on_local_unavailable(now, call_id)   (Accepted names a memory that cannot be opened here: instead of the reply)
      on_copied(now, copy_id, ok)
      on_timer(now); next_timer() -> seconds | None     (absolute, of the same clock as `now`)
Both see every StepEvents and pick what is theirs by request id or call id. Unknown ids are late news: ignored.

Structs, not dataclasses: several are made for every message, and a frozen dataclass takes several times as long.
"""

from __future__ import annotations

import msgspec

from cluster.types import Entry, FetchOpen, FetchReply, FetchTaken, Piece, SourceRef, SwitchReply, WorkerInfo
from engine.messages import Command


class ToEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Send a command to the rank."""

    command: Command


class SendEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Put an entry into a router's outbox (coalesced: one message per engine step)."""

    link_id: str
    entry: Entry


# ---- receiver side


class OpenFetch(msgspec.Struct, frozen=True, kw_only=True):
    """Call KVSource.Fetch at `source`."""

    source: SourceRef
    open: FetchOpen


class SendTaken(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the source which pieces have landed."""

    taken: FetchTaken


class CloseFetch(msgspec.Struct, frozen=True, kw_only=True):
    """End the call from our side, whatever its state. No on_fetch_* for it arrives after this."""

    call_id: str


class StartCopy(msgspec.Struct, frozen=True, kw_only=True):
    """Copy a piece into our blocks and verify its checksums; ends in exactly one on_copied(copy_id, ok), however late.

    target_block_ids[i] takes the piece's i-th block; -1: skip that block (we hold it already).
    """

    copy_id: int
    piece: Piece
    target_block_ids: tuple[int, ...]


# ---- source side


class SendFetch(msgspec.Struct, frozen=True, kw_only=True):
    """Send a reply on a served call (the connector adds payload to pieces)."""

    call_id: str
    reply: FetchReply


class EndCall(msgspec.Struct, frozen=True, kw_only=True):
    """End a served call from our side (after Busy, Moved, Refused, or when the receiver is cut off)."""

    call_id: str


# ---- the role


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """Role, state or epoch changed: tell every router and the registry now."""

    info: WorkerInfo


class SendSwitchReply(msgspec.Struct, frozen=True, kw_only=True):
    """A switch is over, or refused. The caller may be gone."""

    call_id: str
    reply: SwitchReply


RoleEffect = ToEngine | Publish | SendSwitchReply
Effect = (
    ToEngine
    | SendEntry
    | OpenFetch
    | SendTaken
    | CloseFetch
    | StartCopy
    | SendFetch
    | EndCall
    | Publish
    | SendSwitchReply
)
