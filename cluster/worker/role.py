"""A worker's role and how it changes, without I/O. The worker runs a switch to its end, with or without a controller.

    ready -> draining -> switching -> verifying -> ready                    the epoch grows at EVERY transition
      ^         |            |            |
      +---------+------------+------------+   rolled back: timeout, wrong canary (old role, a new epoch)

1. `on_switch`: incarnation and expected epoch must be ours, and no switch under way ("refused").
2. draining: the machines of the old role give away or finish what they have (worker/machine.py); then `on_quiet`.
   With role None that is all: the worker stays "draining" until a switch to a role brings it back.
3. switching: SetRole to the rank; prefix cache, weights and graphs stay as they are.
4. verifying: a canary through the new role's own path, against what it gave when the worker started: for "decode" a
   greedy text, for "prefill" the checksums of a served prompt, under a cache salt of its own, so that it is computed.
5. ready: published with the next epoch, and the reply.

Before the first "ready" both canaries run once, and what they give is the known digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from msgspec.structs import replace

from cluster.timers import Timers
from cluster.types import SwitchOutcome, SwitchReply, SwitchRequest, WorkerInfo, WorkerState
from cluster.worker.effects import Publish, RoleEffect, SendSwitchReply, ToEngine
from engine.config import Role
from engine.messages import (
    Abort,
    Add,
    EndServe,
    NewTokens,
    RoleSet,
    Serve,
    ServeBusy,
    ServeDone,
    ServedPiece,
    SetRole,
    StepEvents,
)
from engine.request import SamplingParams

LEARN_S = 60.0
CANARY_TOKENS = 2  # a prefill step and a decode step
MAX_TIMEOUT_S = 300.0
_PREFIX = "c:"  # of every engine id and call id of a canary
_SERVED = (ServedPiece, ServeDone, ServeBusy)  # a union would be made anew for each reply
Digest = tuple[int, ...]


@dataclass(kw_only=True)
class _Canary:
    """One run of the canary. `digest` grows; the tokens of a text, or the checksums of a prompt's blocks."""

    name: str
    role: Role
    started_at: float
    digest: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class _Switch:
    """The switch under way."""

    call_id: str
    request: SwitchRequest
    old_role: Role
    started_at: float
    canary_ms: float = 0.0


class RoleMachine:
    """Every decision about the role. `info` is what the worker publishes; nobody else changes role, state or epoch."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self._known: dict[Role, Digest] = {}
        self._canary: _Canary | None = None
        self._to_learn: list[Role] = []
        self._switch: _Switch | None = None
        self._num_canaries = 0
        self._retired = False
        self._timers: Timers[str] = Timers()
        self.next_timer = self._timers.next  # the absolute monotonic second at which on_timer is to be called, or None

    @property
    def leaving(self) -> Role | None:
        """The role whose work is to be given away now, while draining."""
        return self._switch.old_role if self._switch is not None and self.info.state == "draining" else None

    @property
    def gives_all_away(self) -> bool:
        """Whether the worker drains without a new role."""
        return self._switch is not None and self._switch.request.role is None

    # ---- what happens

    def begin(self, now: float) -> list[RoleEffect]:
        """The rank is warm: learn what the canaries give, then be ready."""
        self._to_learn = ["prefill", "decode"]
        self._timers.set("learn", now + LEARN_S)
        return self._learn_next(now)

    def on_switch(self, now: float, call_id: str, request: SwitchRequest) -> list[RoleEffect]:
        """Step 1. Exactly one SendSwitchReply follows, at once or when it is over."""
        self._timers.note(now)
        if trouble := self._trouble(request):
            return [self._reply(call_id, "refused", trouble)]
        self._switch = _Switch(call_id=call_id, request=request, old_role=self.info.role, started_at=now)
        self._timers.set("timeout", now + min(MAX_TIMEOUT_S, request.timeout_ms / 1000))
        return [self._publish("draining")]

    def on_quiet(self, now: float) -> list[RoleEffect]:
        """Nothing of the old role is left here."""
        switch = self._switch
        assert switch is not None and self.info.state == "draining", "asked for by `leaving`"
        if switch.request.role is None:
            self._switch = None
            self._timers.clear("timeout")
            return [self._replied(now, switch, "drained")]
        return [self._publish("switching"), ToEngine(command=SetRole(role=switch.request.role))]

    def retire(self, now: float) -> list[RoleEffect]:
        """The process is about to end: no role is taken any more."""
        effects = self._abandon(now, "the worker shuts down")
        self._retired = True
        return [*effects, self._publish("draining")]

    def on_events(self, now: float, events: StepEvents) -> list[RoleEffect]:
        """What one step of the rank brought."""
        self._timers.note(now)
        effects: list[RoleEffect] = []
        if self._canary is None and self._switch is None:
            return effects  # most often
        for reply in events.replies:
            if isinstance(reply, RoleSet):
                effects += self._on_role_set(now, reply)
            elif isinstance(reply, _SERVED) and self._is_canary(reply.call_id):
                effects += self._on_served(now, reply)
        for tokens in events.tokens:
            if self._is_canary(tokens.request_id):
                effects += self._on_tokens(now, tokens)
        return effects

    def on_timer(self, now: float) -> list[RoleEffect]:
        """To be called when next_timer() has come; earlier does no harm."""
        effects: list[RoleEffect] = []
        for kind in self._timers.due(now):
            if kind == "timeout":
                effects += self._abandon(now, f"not over in time ({self.info.state})")
            elif self._to_learn:  # the rank answers nothing: it is given up elsewhere; no switch without a digest
                self._to_learn = []
                effects += [*self._end_canary(), self._publish("ready")]
        return effects

    # ---- inside

    def _trouble(self, request: SwitchRequest) -> str:
        info = self.info
        if request.incarnation != info.incarnation:
            return f"this is {info.worker_id} {info.incarnation}, not {request.incarnation}"
        if request.expected_epoch != info.epoch:
            return f"the epoch is {info.epoch}, not {request.expected_epoch}"
        if self._retired:
            return "the worker shuts down"
        drained = info.state == "draining" and self._switch is None and request.role is not None
        if info.state != "ready" and not drained:
            return f"the worker is {info.state}"
        if request.role is not None and request.role not in self._known:
            return "the canary is not known"
        if request.role == info.role and info.state == "ready":
            return f"it is a {info.role} worker already"
        return ""

    def _on_role_set(self, now: float, reply: RoleSet) -> list[RoleEffect]:
        switch = self._switch
        if switch is None or self.info.state != "switching" or reply.role != switch.request.role:
            return []
        return [self._publish("verifying"), *self._start_canary(now, reply.role)]

    def _on_tokens(self, now: float, tokens: NewTokens) -> list[RoleEffect]:
        assert self._canary is not None, "checked by the caller"
        self._canary.digest.extend(tokens.token_ids)
        if tokens.error is not None:
            return self._canary_over(now, ())
        return self._canary_over(now, tuple(self._canary.digest)) if tokens.finish_reason is not None else []

    def _on_served(self, now: float, reply: ServedPiece | ServeDone | ServeBusy) -> list[RoleEffect]:
        assert self._canary is not None, "checked by the caller"
        if isinstance(reply, ServedPiece):
            self._canary.digest.extend(reply.checksums)
            return []
        digest = tuple(self._canary.digest) if isinstance(reply, ServeDone) else ()
        return [ToEngine(command=EndServe(call_id=reply.call_id)), *self._canary_over(now, digest)]

    def _canary_over(self, now: float, digest: Digest) -> list[RoleEffect]:
        canary, self._canary = self._canary, None
        assert canary is not None, "checked by the caller"
        if self._to_learn:
            if digest:
                self._known[canary.role] = digest
            self._to_learn.remove(canary.role)
            return self._learn_next(now)
        switch = self._switch
        if switch is None or self.info.state != "verifying":
            return []
        switch.canary_ms = (now - canary.started_at) * 1000
        if digest != self._known[canary.role]:
            return self._abandon(now, "the canary gave something else than at the start")
        self._switch = None
        self._timers.clear("timeout")
        published = self._publish("ready", role=canary.role)
        return [published, self._replied(now, switch, "switched")]

    def _abandon(self, now: float, reason: str) -> list[RoleEffect]:
        """Back to the old role, whatever was reached."""
        switch, self._switch = self._switch, None
        if switch is None:
            return []
        self._timers.clear("timeout")
        effects = self._end_canary()
        if self.info.state in ("switching", "verifying"):
            effects.append(ToEngine(command=SetRole(role=switch.old_role)))
        return [*effects, self._publish("ready"), self._replied(now, switch, "rolled_back", reason)]

    # ---- canaries

    def _learn_next(self, now: float) -> list[RoleEffect]:
        if self._to_learn:
            return self._start_canary(now, self._to_learn[0])
        self._timers.clear("learn")
        return [self._publish("ready", new_epoch=False)]

    def _start_canary(self, now: float, role: Role) -> list[RoleEffect]:
        self._num_canaries += 1
        name = f"{_PREFIX}{self._num_canaries}"
        self._canary = _Canary(name=name, role=role, started_at=now)
        tokens = canary_tokens(self.info)
        salt = f"canary {self.info.incarnation} {self._num_canaries}".encode()
        if role == "prefill":
            end = len(tokens) // 4
            return [ToEngine(command=Serve(call_id=name, tokens=tokens, start=0, end=end, cache_salt=salt))]
        params = SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True)
        add = Add(request_id=name, prompt=tokens, params=params, seed=0, cache_salt=salt, priority=-(1 << 30))
        return [ToEngine(command=add)]

    def _end_canary(self) -> list[RoleEffect]:
        canary, self._canary = self._canary, None
        if canary is None:
            return []
        command = EndServe(call_id=canary.name) if canary.role == "prefill" else Abort(request_id=canary.name)
        return [ToEngine(command=command)]

    def _is_canary(self, name: str) -> bool:
        return self._canary is not None and name == self._canary.name

    # ---- what is said

    def _publish(self, state: WorkerState, *, role: Role | None = None, new_epoch: bool = True) -> Publish:
        info = self.info
        self.info = replace(info, state=state, role=role or info.role, epoch=info.epoch + new_epoch)
        return Publish(info=self.info)

    def _replied(self, now: float, switch: _Switch, outcome: SwitchOutcome, reason: str = "") -> SendSwitchReply:
        ms = (now - switch.started_at) * 1000
        return self._reply(switch.call_id, outcome, reason, duration_ms=ms, canary_ms=switch.canary_ms)

    def _reply(
        self, call_id: str, outcome: SwitchOutcome, reason: str, *, duration_ms: float = 0.0, canary_ms: float = 0.0
    ) -> SendSwitchReply:
        reply = SwitchReply(
            outcome=outcome, info=self.info, reason=reason, duration_ms=duration_ms, canary_ms=canary_ms
        )
        return SendSwitchReply(call_id=call_id, reply=reply)


def canary_tokens(info: WorkerInfo) -> bytes:
    """Two blocks and a bit of token ids that spread over the vocabulary, int32: enough for a partial block, too."""
    num_tokens = 2 * info.block_size + 3
    if info.max_model_len:
        num_tokens = max(2, min(num_tokens, info.max_model_len - CANARY_TOKENS - 1))
    return _spread_ids(num_tokens, max(1, info.vocab_size or 256))


@lru_cache(maxsize=16)
def _spread_ids(num_tokens: int, vocab_size: int) -> bytes:
    ids = (np.arange(num_tokens, dtype=np.int64) * 7919 + 11) % vocab_size
    return ids.astype("<i4").tobytes()
