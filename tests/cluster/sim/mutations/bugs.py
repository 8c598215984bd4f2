"""Bugs planted on purpose: what one forgotten line would do. Each is undone by monkeypatch; each must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from cluster import timers
from cluster.router.dispatch import Dispatcher
from cluster.router.recovery import Recovery
from cluster.router.tracked import Tracked
from cluster.sim import copies
from cluster.types import Dispatch, Piece
from cluster.worker.decode import DecodeMachine
from cluster.worker.giving_away import GivingAway
from cluster.worker.prefill import PrefillMachine
from cluster.worker.reservation import Reservation
from cluster.worker.role import RoleMachine
from cluster.worker.source_call import SourceCall
from engine.kv.block_manager import BlockManager
from engine.kv.prefix_cache import PrefixCache
from engine.scheduler.pulls import Pulls
from engine.scheduler.served import ServedCalls

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, kw_only=True)
class Bug:
    """`plant` puts it in; `seed` is one that was seen to catch it (others are tried when it no longer does)."""

    name: str
    plant: Callable[[Patch], None]
    seed: int


def _wrap(patch: Patch, owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by wrapper(inner, self, ...)."""
    inner = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **kwargs: wrapper(inner, self, *args, **kwargs))


def skipped_epoch_check(patch: Patch) -> None:
    """A worker takes what was dispatched to it under an older epoch."""

    def on_dispatch(inner: Any, self: DecodeMachine, now: float, link_id: str, dispatch: Dispatch) -> Any:
        return inner(self, now, link_id, replace(dispatch, epoch=self.info.epoch))

    _wrap(patch, DecodeMachine, "on_dispatch", on_dispatch)


def skipped_switch_fence(patch: Patch) -> None:
    """A switch is begun whatever epoch its sender had in mind."""

    def trouble(inner: Any, self: RoleMachine, request: Any) -> str:
        fitting = replace(request, incarnation=self.info.incarnation, expected_epoch=self.info.epoch)
        return str(inner(self, fitting))

    _wrap(patch, RoleMachine, "_trouble", trouble)


def epoch_stands_still(patch: Patch) -> None:
    """A transition keeps its epoch."""

    def publish(inner: Any, self: RoleMachine, state: Any, **kwargs: Any) -> Any:
        return inner(self, state, **{**kwargs, "new_epoch": state != "verifying"})

    _wrap(patch, RoleMachine, "_publish", publish)


def double_release(patch: Patch) -> None:
    """A seat that served a call is given back twice."""

    def release(inner: Any, self: BlockManager, block_ids: Any, *, served: bool = False) -> None:
        inner(self, block_ids, served=served)
        if served:
            inner(self, block_ids[:1], served=served)

    _wrap(patch, BlockManager, "release", release)


def lost_moved(patch: Patch) -> None:
    """A request is paused to be given away, and nobody is told."""
    patch.setattr(GivingAway, "_hand_over", lambda self, request: [])


def stale_cache_entry(patch: Patch) -> None:
    """An evicted block stays in the prefix cache under its old key."""

    def remove(inner: Any, self: PrefixCache, block_id: int) -> None:
        self._key_of.pop(block_id)

    _wrap(patch, PrefixCache, "remove", remove)


def committed_before_it_landed(patch: Patch) -> None:
    """Blocks become visible when their copy starts."""

    def start(inner: Any, self: Reservation, copy_id: int, piece: Piece) -> Any:
        effects = inner(self, copy_id, piece)
        for landing in self._order:
            landing.landed = True
        return effects

    _wrap(patch, Reservation, "start", start)


def missing_piece_fence(patch: Patch) -> None:
    """Any piece is taken for one of this call."""

    def take_piece(inner: Any, self: SourceCall, piece: Piece, *rest: Any) -> str:
        ours = replace(piece, call_id=self.call_id, source_incarnation=self.source.incarnation, index=self.next_index)
        return str(inner(self, ours, *rest))

    _wrap(patch, SourceCall, "take_piece", take_piece)


def missed_quarantine(patch: Patch) -> None:
    """Blocks that a copy may still write are free at once."""

    def quarantine(inner: Any, self: BlockManager, block_ids: Iterable[int]) -> None:
        self.release(list(block_ids))

    _wrap(patch, BlockManager, "quarantine", quarantine)
    patch.setattr(BlockManager, "end_quarantine", lambda self, block_ids: None)


def pull_closed_too_early(patch: Patch) -> None:
    """Nobody waits for copies under way."""
    patch.setattr(Reservation, "idle", property(lambda self: True))


def quarantine_ends_at_abort(patch: Patch) -> None:
    """The rank forgets the quarantine as soon as it is made."""

    def abort(inner: Any, self: Pulls, request: Any) -> None:
        inner(self, request)
        self._blocks.end_quarantine(self._quarantined.pop(request.request_id))

    _wrap(patch, Pulls, "abort", abort)


def wrong_position_accepted(patch: Patch) -> None:
    """The router takes tokens at whatever position they come."""
    patch.setattr(Tracked, "judge", lambda self, tokens: "accept")


def continuation_repeats_a_token(patch: Patch) -> None:
    """A continuation has its last accepted token twice."""

    def unfinished(inner: Any, self: Tracked) -> Any:
        return tuple(replace(choice, outputs=choice.outputs + choice.outputs[-4:]) for choice in inner(self))

    _wrap(patch, Tracked, "unfinished", unfinished)


def continuation_draws_a_new_seed(patch: Patch) -> None:
    """A later attempt samples with other noise."""

    def unfinished(inner: Any, self: Tracked) -> Any:
        return tuple(replace(choice, seed=choice.seed + (self.attempt > 1)) for choice in inner(self))

    _wrap(patch, Tracked, "unfinished", unfinished)


def abort_not_sent_down(patch: Patch) -> None:
    """The client is gone, the worker goes on."""
    patch.setattr(Dispatcher, "_abort", lambda self, request: [])


def release_lost(patch: Patch) -> None:
    """What a moved request left behind is never freed."""

    def release(inner: Any, self: Recovery, request_id: str) -> Any:
        inner(self, request_id)
        return []

    _wrap(patch, Recovery, "release", release)


def checksum_not_checked(patch: Patch) -> None:
    """What a copy brought is believed."""
    patch.setattr(copies, "verify", lambda memory, copy, piece: None)


def served_call_never_ends(patch: Patch) -> None:
    """A broken call keeps its blocks."""
    patch.setattr(PrefillMachine, "on_call_broken", lambda self, now, call_id: [])


def unpinned_when_offered(patch: Patch) -> None:
    """The source lets go of its blocks once all are offered, not once they are taken."""

    def offer(inner: Any, self: Any, call: Any, runner: Any) -> Any:
        news = inner(self, call, runner)
        if call.offered_all:
            self.end(call.call_id)
        return news

    _wrap(patch, ServedCalls, "offer", offer)


def canary_not_awaited(patch: Patch) -> None:
    """A worker is ready in its new role before the rank has taken it."""

    def on_quiet(inner: Any, self: RoleMachine, now: float) -> Any:
        effects = inner(self, now)
        if self.info.state == "switching" and self._switch is not None:
            switch, self._switch = self._switch, None
            return [self._publish("ready", role=switch.request.role), self._replied(now, switch, "switched")]
        return effects

    _wrap(patch, RoleMachine, "on_quiet", on_quiet)


def link_loss_ignored(patch: Patch) -> None:
    """A worker keeps the requests of a router that is gone."""
    patch.setattr(DecodeMachine, "on_link_broken", lambda self, now, link_id: [])


def crash_is_nobodys_fault(patch: Patch) -> None:
    """A request that was present at crashes is run again and again."""
    patch.setattr(Recovery, "crashed", lambda self, now, request, info: self.silent(request))


def observer_blames_others(patch: Patch) -> None:
    """A router that did not run itself gives up workers that it did not hear."""
    patch.setattr(timers, "OBSERVER_LAG_S", float("inf"))


BUGS = (
    Bug(name="skipped epoch check", plant=skipped_epoch_check, seed=0),
    Bug(name="skipped switch fence", plant=skipped_switch_fence, seed=3),
    Bug(name="epoch stands still", plant=epoch_stands_still, seed=0),
    Bug(name="double release", plant=double_release, seed=0),
    Bug(name="lost Moved", plant=lost_moved, seed=0),
    Bug(name="stale cache entry", plant=stale_cache_entry, seed=0),
    Bug(name="committed before it landed", plant=committed_before_it_landed, seed=0),
    Bug(name="missing piece fence", plant=missing_piece_fence, seed=0),
    Bug(name="missed quarantine", plant=missed_quarantine, seed=0),
    Bug(name="pull closed too early", plant=pull_closed_too_early, seed=0),
    Bug(name="quarantine ends at abort", plant=quarantine_ends_at_abort, seed=0),
    Bug(name="wrong position accepted", plant=wrong_position_accepted, seed=1),
    Bug(name="continuation repeats a token", plant=continuation_repeats_a_token, seed=1),
    Bug(name="continuation draws a new seed", plant=continuation_draws_a_new_seed, seed=0),
    Bug(name="abort not sent down", plant=abort_not_sent_down, seed=6),
    Bug(name="release lost", plant=release_lost, seed=0),
    Bug(name="checksum not checked", plant=checksum_not_checked, seed=1),
    Bug(name="served call never ends", plant=served_call_never_ends, seed=0),
    Bug(name="unpinned when offered", plant=unpinned_when_offered, seed=0),
    Bug(name="canary not awaited", plant=canary_not_awaited, seed=0),
    Bug(name="crash is nobody's fault", plant=crash_is_nobodys_fault, seed=14),
    Bug(name="observer blames others", plant=observer_blames_others, seed=0),
    Bug(name="link loss ignored", plant=link_loss_ignored, seed=0),
)
