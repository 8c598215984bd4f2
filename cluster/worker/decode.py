"""The decode worker's side of a request, without I/O: fences, the pull of the prompt's KV, tokens up, aborts down.

Life cycle of a request at its decode worker:
1. `on_dispatch`: the attempt must be new, incarnation and epoch ours ("refused"), the numbers sane, and there must be
   room ("busy" at once; the router knows where else to go).
2. worker/pull.py brings the prompt's KV, or finds that it is not worth it. Meanwhile News go up at least every NEWS_S.
3. `run`: every choice is in the rank's running batch; further choices hit the blocks that the first one brought.
4. `on_events`: new tokens go up with (attempt, choice, position). The last choice's end is the request's end.
5. Abort, broken link, deadline or failure, at any time: Abort to the rank and CloseFetch at once; a reservation gets
   its PullClosed only when every started copy has reported.

Effects come in the order in which they are to be done. `next_timer` is an absolute monotonic second.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import replace

from cluster.errors import BUSY, ERRORS, REFUSED
from cluster.timers import Timers
from cluster.types import (
    NEWS_S,
    AbortRequest,
    Dispatch,
    Failed,
    FetchReply,
    Path,
    PromptScores,
    Release,
    Tokens,
    WorkerInfo,
)
from cluster.worker.admission import decode_capacity, dispatch_trouble
from cluster.worker.decode_request import TOKEN_BYTES, DecodeRequest, TimerKey
from cluster.worker.effects import Effect, SendEntry, ToEngine
from cluster.worker.giving_away import GivingAway
from cluster.worker.pull import Puller
from engine.kv.layout import KVLayout
from engine.messages import (
    Abort,
    Add,
    Load,
    NewTokens,
    NoSpace,
    Paused,
    Probed,
    PromptLogprobs,
    PullClosed,
    Reserved,
    StepEvents,
)
from engine.request import FinishReason

REMEMBERED_ATTEMPTS = 8192
_PREFIX = "d:"  # of every engine id of this machine
_OF_PULLS = (Probed, Reserved, NoSpace)  # a union would be made anew for each reply


class DecodeMachine:
    """Every decision of a worker as decode worker; see cluster/worker/effects.py for the calls and effects.

    `info` may be replaced by the shell when state or epoch change. `counters` counts what did not go as planned.
    `checksum_algorithm` is the rank's; None accepts any that a source names.
    """

    def __init__(self, info: WorkerInfo, layout: KVLayout, checksum_algorithm: str | None = None) -> None:
        self.info = info
        self.counters: Counter[str] = Counter()
        self.handoff_ms: deque[float] = deque(maxlen=1024)  # last piece to first token
        self._layout = layout
        self._timers: Timers[TimerKey] = Timers()
        self.next_timer = self._timers.next  # the absolute monotonic second at which on_timer is to be called, or None
        self._requests: dict[str, DecodeRequest] = {}
        self._by_engine_id: dict[str, DecodeRequest] = {}
        self._attempts: OrderedDict[str, int] = OrderedDict()
        self._num_names = 0
        self._load = Load()
        self._giving = GivingAway(self._drop)
        self._num_finished = 0
        self._puller = Puller(info, layout, checksum_algorithm, self._timers, self.counters, self)

    # ---- from the routers

    def on_dispatch(self, now: float, link_id: str, dispatch: Dispatch) -> list[Effect]:
        """Step 1."""
        self._timers.note(now)
        if dispatch.attempt <= self._attempts.get(dispatch.request_id, -1):
            self.counters["stale_dispatches"] += 1
            return []  # before the fences: to refuse the duplicate of an attempt that runs would end that attempt
        if (dispatch.incarnation, dispatch.epoch) != (self.info.incarnation, self.info.epoch):
            return [self._failure(link_id, dispatch, REFUSED, "another incarnation or epoch")]
        if self.info.state != "ready":
            return [self._failure(link_id, dispatch, REFUSED, f"the worker is {self.info.state}")]
        effects: list[Effect] = []
        if (older := self._requests.get(dispatch.request_id)) is not None:
            effects += self._drop(older)
        self._remember(dispatch.request_id, dispatch.attempt)
        if trouble := dispatch_trouble(dispatch, self.info):
            return [*effects, self._failure(link_id, dispatch, *trouble)]
        if self.num_live >= decode_capacity(self.info):
            self.counters["busy"] += 1
            return [*effects, self._failure(link_id, dispatch, BUSY, "no room")]
        request = DecodeRequest(
            link_id=link_id,
            dispatch=dispatch,
            deadline=now + dispatch.remaining_ms / 1000,
            adds=(),
            sources=deque(dispatch.sources),
        )
        self._requests[dispatch.request_id] = request
        self.rename(request)
        self._timers.set((dispatch.request_id, "deadline"), request.deadline)
        self._timers.set((dispatch.request_id, "news"), now + NEWS_S)
        return [*effects, *self._puller.begin(now, request)]

    def on_abort(self, now: float, link_id: str, abort: AbortRequest | Release) -> list[Effect]:
        """Drop an attempt, and every older one; one that has not arrived yet (aborts overtake) will be ignored."""
        self._timers.note(now)
        request = self._requests.get(abort.request_id)
        if request is not None and request.link_id != link_id:
            return []
        self._remember(abort.request_id, abort.attempt)
        if request is None or request.dispatch.attempt > abort.attempt:
            return []
        self.counters["aborts"] += 1
        return self._drop(request)

    def on_link_broken(self, now: float, link_id: str) -> list[Effect]:
        """A router is gone, and with it its requests."""
        self._timers.note(now)
        mine = [request for request in self._requests.values() if request.link_id == link_id]
        self.counters["lost_with_link"] += len(mine)
        return [effect for request in mine for effect in self._drop(request)]

    # ---- from sources, copies, and the clock

    def on_fetch_reply(self, now: float, call_id: str, reply: FetchReply) -> list[Effect]:
        """A message of a source."""
        self._timers.note(now)
        return self._puller.on_fetch_reply(now, call_id, reply)

    def on_fetch_broken(self, now: float, call_id: str) -> list[Effect]:
        """A call was ended by the source or the network."""
        self._timers.note(now)
        return self._puller.on_fetch_broken(now, call_id)

    def on_local_unavailable(self, now: float, call_id: str) -> list[Effect]:
        """The memory named by Accepted(local) cannot be opened here: that source is called again, over gRPC."""
        self._timers.note(now)
        return self._puller.on_local_unavailable(now, call_id)

    def on_copied(self, now: float, copy_id: int, ok: bool) -> list[Effect]:
        """A copy ended; `ok` means that it was whole and its checksums passed. Exactly once per StartCopy."""
        self._timers.note(now)
        return self._puller.on_copied(now, copy_id, ok)

    def on_timer(self, now: float) -> list[Effect]:
        """To be called when next_timer() has come; earlier does no harm."""
        effects: list[Effect] = []
        for request_id, kind in self._timers.due(now):
            request = self._requests.get(request_id)
            if request is None:
                continue  # an earlier timer of this round ended it
            if kind == "deadline":
                gone = request.given_away
                effects += self._drop(request) if gone else self.fail(request, "deadline_exceeded", "")
            elif kind == "news":
                effects.append(self._news(now, request))
            else:
                effects += self._puller.on_timer(now, request, kind)
        return effects

    # ---- from the rank

    def on_events(self, now: float, events: StepEvents) -> list[Effect]:
        """What one step of the rank brought."""
        self._timers.note(now)
        self._load = events.load
        effects: list[Effect] = []
        for reply in events.replies:
            if isinstance(reply, _OF_PULLS) and reply.request_id.startswith(_PREFIX):
                effects += self._on_reply(now, reply)
            elif isinstance(reply, PromptLogprobs):
                effects += self._on_scores(reply)
        for tokens in events.tokens:
            if tokens.request_id.startswith(_PREFIX):
                effects += self._on_tokens(now, tokens)
        for reply in events.replies:  # after the tokens: those of the last step belong to the request still
            if isinstance(reply, Paused) and (paused := self._by_engine_id.get(reply.request_id)) is not None:
                effects += self._giving.on_paused(paused, reply)
        return effects + self._puller.on_free_blocks(events.load.num_free_blocks)

    def _on_reply(self, now: float, reply: Probed | Reserved | NoSpace) -> list[Effect]:
        request = self._by_engine_id.get(reply.request_id)
        if request is not None and request.pulling:
            return self._puller.on_reply(now, request, reply)
        if not isinstance(reply, Reserved):
            return []
        # the abort overtook the Reserve in the rings: nothing was ever copied, so close what it reserved
        gone = (Abort(request_id=reply.request_id), PullClosed(request_id=reply.request_id, num_computed_tokens=0))
        return [ToEngine(command=command) for command in gone]

    def _on_scores(self, reply: PromptLogprobs) -> list[Effect]:
        request = self._by_engine_id.get(reply.request_id)
        if request is None or reply.request_id not in request.running:
            return []
        entry = PromptScores(
            request_id=request.request_id,
            attempt=request.dispatch.attempt,
            first_position=reply.first_position,
            logprobs=reply.logprobs,
        )
        return [SendEntry(link_id=request.link_id, entry=entry)]

    def _on_tokens(self, now: float, tokens: NewTokens) -> list[Effect]:
        request = self._by_engine_id.get(tokens.request_id)
        if request is None or tokens.request_id not in request.running:
            over = tokens.finish_reason is not None or tokens.error is not None
            return [] if over else [ToEngine(command=Abort(request_id=tokens.request_id))]
        if tokens.error is not None:
            code = tokens.error if tokens.error in ERRORS else "internal_error"
            return self.fail(request, code, "")
        if tokens.finish_reason is FinishReason.ABORT:
            return self.fail(request, "internal_error", "The engine dropped the request.")
        choice = request.running[tokens.request_id]
        first = choice not in request.answered
        if not request.answered:
            self._timers.clear((request.request_id, "news"))
            if request.closed_at is not None:
                self.handoff_ms.append((now - request.closed_at) * 1000)
        request.answered.add(choice)
        request.num_outputs = tokens.first_position + len(tokens.token_ids)
        entry = Tokens(
            request_id=request.request_id,
            attempt=request.dispatch.attempt,
            choice=choice,
            position=tokens.first_position,
            token_ids=tokens.token_ids,
            logprobs=tokens.logprobs,
            finish_reason=tokens.finish_reason,
            stop_token=tokens.stop_token,
            num_cached_tokens=self._num_cached(request, tokens),
            path=request.path if first else None,
        )
        held, request.held = request.held, ()
        if tokens.finish_reason is not None:
            del request.running[tokens.request_id]
            if not request.running:
                self._num_finished += 1
                self._forget(request)
        effects: list[Effect] = [SendEntry(link_id=request.link_id, entry=entry)]
        if held:
            effects += [ToEngine(command=add) for add in held]
        if tokens.finish_reason is not None:
            return effects + self._giving.on_finished(request)
        return effects + (self._giving.consider(request, self.info.profile, self._load) if first else [])

    # ---- giving requests away (giving_away.py says which)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is left here but what is pinned for other workers."""
        return all(request.given_away for request in self._requests.values())

    @property
    def tally(self) -> tuple[int, int]:
        """Requests given away, and requests finished here, ever."""
        return self._giving.num_moved, self._num_finished

    def give_away(self, now: float) -> list[Effect]:
        """Let every request finish here or move, whichever is sooner, until `keep`."""
        self._timers.note(now)
        self._giving.active = True
        profile, load = self.info.profile, self._load
        return [
            effect
            for request in list(self._requests.values())
            for effect in self._giving.consider(request, profile, load)
        ]

    def keep(self) -> None:
        """Give away no more; what has been paused is given away still."""
        self._giving.active = False

    # ---- what a pull reports (PullOwner)

    def run(self, now: float, request: DecodeRequest, path: Path, pulled: bool) -> list[Effect]:
        """The pull is over: every choice runs; with `pulled` the first one is at the rank already."""
        request.path = path
        request.closed_at = now if pulled else None
        request.running = {add.request_id: add.choice for add in request.adds}
        self.counters[path] += 1
        if path != "prefill-decode" and request.num_calls:
            self.counters["computed_here_after_all"] += 1
        adds = request.adds[1 if pulled else 0 :]
        if request.dispatch.params.prompt_logprobs is not None and not pulled:
            adds, request.held = adds[:1], adds[1:]
        return [ToEngine(command=add) for add in adds]

    def fail(self, request: DecodeRequest, code: str, message: str) -> list[Effect]:
        """End a request with an error."""
        self.counters[f"failed_{code}"] += 1
        return [*self._drop(request), self._failure(request.link_id, request.dispatch, code, message)]

    def rename(self, request: DecodeRequest) -> None:
        """Give a request new engine ids; what the rank still has under the old ones is not this request any more."""
        for add in request.adds:
            del self._by_engine_id[add.request_id]
        self._num_names += 1
        dispatch = request.dispatch
        # the prompt's logprobs are the same for all choices: the first one tells them
        others = dispatch.params
        if others.prompt_logprobs is not None:
            others = replace(others, prompt_logprobs=None)
        request.adds = tuple(
            Add(
                request_id=f"{_PREFIX}{dispatch.request_id}:{dispatch.attempt}:{self._num_names}:{choice.index}",
                prompt=dispatch.prompt,
                params=others if i else dispatch.params,
                seed=choice.seed,
                choice=choice.index,
                outputs=choice.outputs,
                cache_salt=dispatch.cache_salt,
                priority=dispatch.priority,
            )
            for i, choice in enumerate(dispatch.choices)
        )
        for add in request.adds:
            self._by_engine_id[add.request_id] = request

    # ---- inside

    @property
    def num_live(self) -> int:
        """Choices that are at this worker, running or on their way."""
        return len(self._by_engine_id)

    def status(self) -> tuple[DecodeRequest, ...]:
        """The live requests."""
        return tuple(self._requests.values())

    def _drop(self, request: DecodeRequest) -> list[Effect]:
        effects: list[Effect]
        if request.pulling:
            effects = self._puller.drop(request)
        else:
            effects = [ToEngine(command=Abort(request_id=engine_id)) for engine_id in request.running]
        self._forget(request)
        return effects

    def _forget(self, request: DecodeRequest) -> None:
        del self._requests[request.request_id]
        for add in request.adds:
            del self._by_engine_id[add.request_id]
        self._timers.clear((request.request_id, "deadline"))
        self._timers.clear((request.request_id, "news"))

    def _remember(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = max(attempt, self._attempts.get(request_id, -1))
        self._attempts.move_to_end(request_id)
        if len(self._attempts) > REMEMBERED_ATTEMPTS:
            self._attempts.popitem(last=False)

    def _num_cached(self, request: DecodeRequest, tokens: NewTokens) -> int:
        if request.path == "decode-only":
            return tokens.num_cached_tokens
        num_prompt = len(request.dispatch.prompt) // TOKEN_BYTES
        return min(num_prompt, max(request.num_cached, request.source_cached))

    def _news(self, now: float, request: DecodeRequest) -> Effect:
        self._timers.set((request.request_id, "news"), now + NEWS_S)
        return SendEntry(link_id=request.link_id, entry=request.news())

    def _failure(self, link_id: str, dispatch: Dispatch, code: str, message: str) -> Effect:
        message = message or (ERRORS[code].message if code in ERRORS else "")
        failed = Failed(request_id=dispatch.request_id, attempt=dispatch.attempt, code=code, message=message)
        return SendEntry(link_id=link_id, entry=failed)
