"""Every decision of one worker, without I/O: the decode machine, the prefill machine and the role machine as one.

The shell (worker/service.py over gRPC, sim/worker.py on the virtual clock) hands every input to this object and
performs the effects it returns, in order. What the three have to do with each other is here and nowhere else:

    a switch begins    the machine of the role that is left gives away what it has
    it has nothing     the role machine goes on
    every transition   all three see the new (role, state, epoch) before anything else happens
    it is rolled back  the machines take work again
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from cluster.types import (
    AbortRequest,
    Dispatch,
    FetchOpen,
    FetchReply,
    FetchTaken,
    LocalMemory,
    Release,
    SwitchRequest,
    WorkerInfo,
)
from cluster.worker.decode import DecodeMachine
from cluster.worker.effects import Effect, Publish, RoleEffect, SendSwitchReply
from cluster.worker.prefill import PrefillMachine
from cluster.worker.role import RoleMachine
from engine.kv.layout import KVLayout
from engine.messages import StepEvents


class WorkerMachine:
    """See cluster/worker/effects.py for the inputs and effects. Made when the rank is warm; `begin` comes first."""

    def __init__(self, info: WorkerInfo, layout: KVLayout, memory: LocalMemory | None, checksum_algorithm: str) -> None:
        self.role = RoleMachine(info)
        self.decode = DecodeMachine(info, layout, checksum_algorithm)
        self.prefill = PrefillMachine(info, layout, memory, checksum_algorithm)
        self._next_timers = (self.decode.next_timer, self.prefill.next_timer, self.role.next_timer)
        self._tally = (0, 0)

    @property
    def info(self) -> WorkerInfo:
        """What the worker is now."""
        return self.role.info

    @property
    def num_live(self) -> int:
        """Choices and served calls that are not over."""
        return self.decode.num_live + self.prefill.num_calls

    # ---- the role

    def begin(self, now: float) -> list[Effect]:
        """The rank is warm."""
        return self._roles(now, self.role.begin(now))

    def on_switch(self, now: float, call_id: str, request: SwitchRequest) -> list[Effect]:
        """Somebody wants another role. Exactly one SendSwitchReply follows, at once or when it is over."""
        return self._settle(now, self._roles(now, self.role.on_switch(now, call_id, request)))

    def retire(self, now: float) -> list[Effect]:
        """The process is about to end: nothing new comes, what runs finishes soon or moves."""
        effects = self._roles(now, self.role.retire(now))
        return [*effects, *self.decode.give_away(now), *self.prefill.give_away(now)]

    # ---- from routers

    def on_dispatch(self, now: float, link_id: str, dispatch: Dispatch) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_dispatch(now, link_id, dispatch))

    def on_abort(self, now: float, link_id: str, abort: AbortRequest | Release) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_abort(now, link_id, abort))

    def on_link_broken(self, now: float, link_id: str) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_link_broken(now, link_id))

    # ---- from receivers

    def on_fetch(self, now: float, call: FetchOpen) -> list[Effect]:
        """See PrefillMachine."""
        return self._settle(now, self.prefill.on_fetch(now, call))

    def on_taken(self, now: float, taken: FetchTaken) -> list[Effect]:
        """See PrefillMachine."""
        return self._settle(now, self.prefill.on_taken(now, taken))

    def on_call_broken(self, now: float, call_id: str) -> list[Effect]:
        """See PrefillMachine."""
        return self._settle(now, self.prefill.on_call_broken(now, call_id))

    # ---- from sources and copies

    def on_fetch_reply(self, now: float, call_id: str, reply: FetchReply) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_fetch_reply(now, call_id, reply))

    def on_fetch_broken(self, now: float, call_id: str) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_fetch_broken(now, call_id))

    def on_local_unavailable(self, now: float, call_id: str) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_local_unavailable(now, call_id))

    def on_copied(self, now: float, copy_id: int, ok: bool) -> list[Effect]:
        """See DecodeMachine."""
        return self._settle(now, self.decode.on_copied(now, copy_id, ok))

    # ---- from the rank and the clock

    def on_events(self, now: float, events: StepEvents) -> list[Effect]:
        """What one step of the rank brought."""
        effects = self.prefill.on_events(now, events)
        effects += self.decode.on_events(now, events)
        if of_role := self.role.on_events(now, events):
            effects += self._roles(now, of_role)
        return self._settle(now, effects)

    def on_timer(self, now: float) -> list[Effect]:
        """To be called when next_timer() has come; earlier does no harm."""
        effects = [*self.decode.on_timer(now), *self.prefill.on_timer(now)]
        return self._settle(now, [*effects, *self._roles(now, self.role.on_timer(now))])

    def next_timer(self) -> float | None:
        """The absolute monotonic second at which on_timer is to be called, or None."""
        first = None
        for next_timer in self._next_timers:
            at = next_timer()
            if first is None or (at is not None and at < first):
                first = at
        return first

    # ---- inside

    def _roles(self, now: float, effects: Iterable[RoleEffect]) -> list[Effect]:
        """Effects of the role machine, with what each transition means for the other two."""
        done: list[Effect] = []
        for effect in effects:
            if isinstance(effect, SendSwitchReply) and effect.reply.outcome != "refused":
                moved, finished = (count - before for count, before in zip(self.decode.tally, self._tally, strict=True))
                reply = replace(effect.reply, moved=moved, finished_in_place=finished)
                done.append(SendSwitchReply(call_id=effect.call_id, reply=reply))
                continue
            done.append(effect)
            if isinstance(effect, Publish):
                if effect.info.state == "draining":
                    self._tally = self.decode.tally
                self.decode.info = self.prefill.info = effect.info
                done += self._on_transition(now)
        return done

    def _on_transition(self, now: float) -> list[Effect]:
        leaving = self.role.leaving
        if leaving is None:
            if self.info.state == "ready":
                self.decode.keep()
                self.prefill.keep()
            return []
        effects: list[Effect] = []
        if leaving == "decode" or self.role.gives_all_away:
            effects += self.decode.give_away(now)
        if leaving == "prefill" or self.role.gives_all_away:
            effects += self.prefill.give_away(now)
        return effects

    def _settle(self, now: float, effects: list[Effect]) -> list[Effect]:
        """Go on with a switch as soon as nothing of the old role is left."""
        if self.role.leaving is not None and self.decode.is_quiet and self.prefill.is_quiet:
            return [*effects, *self._roles(now, self.role.on_quiet(now))]
        return effects
