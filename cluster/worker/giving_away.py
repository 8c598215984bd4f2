"""What becomes of a decode worker's requests when it has to give them away: finish here, or move, by predicted cost.

queued, pulling          given away at once, nothing is held; one that was just moved here goes on to its first token
running, nearly done     finishes here, where that is predicted to take less than a move
running                  Pause every choice; when the last is paused, Moved: its KV stays pinned until Release
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cluster.types import Moved
from cluster.worker.decode_request import TOKEN_BYTES, DecodeRequest
from cluster.worker.effects import Effect, SendEntry, ToEngine
from engine.messages import Load, Pause, Paused
from engine.scheduler.profile import Profile

MOVE_MS = 25.0  # of a move, beside its bytes: two messages, a step boundary at either end, a block computed again
MOVE_BYTES_PER_MS = 1e6
MAX_FINISH_MS = 1000.0

Fate = Literal["move", "finish", "wait"]


class GivingAway:
    """While `active`, each request is considered: all at the start, one that was just moved here at its first token.

    `drop` ends what a request does here and forgets it. `num_moved` counts the requests that were given away.
    """

    def __init__(self, drop: Callable[[DecodeRequest], list[Effect]]) -> None:
        self.active = False
        self.num_moved = 0
        self._drop = drop

    def consider(self, request: DecodeRequest, profile: Profile, load: Load) -> list[Effect]:
        """Decide on one request, once."""
        if not self.active or request.pausing or fate(request, profile, load) != "move":
            return []
        if request.running and not request.held:
            request.pausing = True
            return [ToEngine(command=Pause(request_id=engine_id)) for engine_id in request.running]
        return [*self._drop(request), self._moved(request, 0)]

    def on_paused(self, request: DecodeRequest, reply: Paused) -> list[Effect]:
        """A choice computes no more."""
        if reply.request_id not in request.running:
            return []
        request.paused[reply.request_id] = reply.num_held_tokens
        return self._hand_over(request)

    def on_finished(self, request: DecodeRequest) -> list[Effect]:
        """A choice came to its end: it may have been the last one that was waited for."""
        return self._hand_over(request) if request.running else []

    def _hand_over(self, request: DecodeRequest) -> list[Effect]:
        if request.given_away or not request.pausing or request.running.keys() - request.paused.keys():
            return []
        request.given_away = True
        return [self._moved(request, max(request.paused.values()))]

    def _moved(self, request: DecodeRequest, held_tokens: int) -> Effect:
        self.num_moved += 1
        attempt = request.dispatch.attempt
        entry = Moved(request_id=request.request_id, attempt=attempt, held_tokens=held_tokens)
        return SendEntry(link_id=request.link_id, entry=entry)


def fate(request: DecodeRequest, profile: Profile, load: Load) -> Fate:
    """What is best for one request now. "wait": ask again at its first token here."""
    if request.dispatch.moved and not request.answered:
        return "wait"
    if not request.running or request.held:
        return "move"
    rows = max(1, load.num_running)
    step_ms = profile.decode_step_ms(rows, load.context_tokens) * (load.decode_scale or 1.0)
    left = (request.dispatch.params.max_tokens or request.num_outputs) - request.num_outputs
    num_tokens = len(request.dispatch.prompt) // TOKEN_BYTES + request.num_outputs
    move_ms = MOVE_MS + num_tokens * profile.kv_token_bytes / MOVE_BYTES_PER_MS
    return "finish" if left * step_ms <= min(move_ms, MAX_FINISH_MS) else "move"
