"""One HTTP request inside the cluster.

1. `open`: admitted or refused (429), its deadline armed, one Submit per prompt handed to the dispatcher.
2. `receive`: the dispatcher's effects go into the inbox; TTFT and ITL are taken here, where tokens arrive.
3. `take`: the answering task gets what has arrived as text; a failure is raised.
4. `close`: whatever still runs is cancelled at its decode worker, the place in the queue is given back. Always, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.errors import ERRORS, NeapError, RequestError, UnavailableError
from cluster.metrics import RouterMetrics
from cluster.router.admission import Admission
from cluster.router.answer import ChoiceText, Delta, PromptPart
from cluster.router.effects import Deliver, DeliverScores, Ended, Progress, Submit
from cluster.router.inbox import Arrival, Inbox
from cluster.router.openai.answers import Usage
from cluster.router.plan import Plan
from cluster.router.turn import Turn
from cluster.traffic import TrafficWindow
from cluster.types import Path

TOKEN_BYTES = 4  # of a prompt: int32 each
CallEffect = Deliver | DeliverScores | Progress | Ended


class Cluster(Protocol):
    """Where requests go (workers.py; a stub in tests)."""

    def submit(self, submit: Submit, receive: Callable[[CallEffect], None]) -> None:
        """Run a request; its effects come to `receive`, none after `cancel`."""
        ...

    def cancel(self, request_id: str) -> None:
        """Drop a request now. Unknown ids are ignored."""
        ...


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What every call of a router shares. `clock` is monotonic seconds."""

    cluster: Cluster
    admission: Admission
    metrics: RouterMetrics
    clock: Callable[[], float]
    max_blocked_bytes: int
    turn: Turn = field(default_factory=Turn)
    traffic: TrafficWindow = field(default_factory=TrafficWindow)


class Call:
    """See the module's text. `on_overflow` is called when the client doesn't read; it must break the connection."""

    def __init__(
        self,
        plan: Plan,
        choice_text: Callable[[int], ChoiceText],
        context: CallContext,
        *,
        started: float,
        on_overflow: Callable[[], None],
    ):
        self.plan = plan
        self.path: Path | None = None
        self.gone = False
        self.inbox = Inbox(max_blocked_bytes=context.max_blocked_bytes, on_overflow=self._overflow)
        self._context = context
        self._started = started
        self._on_overflow = on_overflow
        self._choices = [choice_text(index) for index in range(plan.num_choices)]
        self._num_open = [plan.params.n] * len(plan.prompts)
        self._cached: list[int | None] = [None] * len(plan.prompts)
        self._prompts = _PromptParts(plan) if plan.shows_prompt else None
        self._first_token_at: dict[int, float] = {}
        self._running_tokens: dict[int, int] = {}  # by choice that has begun and not ended
        self._last_token_at: dict[int, float] = {}
        self._expired = False
        self._admitted = False
        self._has_begun = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def turn(self) -> Turn:
        """What is to be done once more in this turn of the loop."""
        return self._context.turn

    @property
    def done(self) -> bool:
        """Every choice has ended well."""
        return not any(self._num_open)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.plan.num_prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(cached or 0 for cached in self._cached),
        )

    def open(self) -> None:
        """Enter the queue and start. Raises UnavailableError overloaded, RequestError deadline_exceeded."""
        context, plan = self._context, self.plan
        now = context.clock()
        if plan.deadline <= now:
            raise RequestError("deadline_exceeded")
        for prompt in plan.prompts:
            context.traffic.on_request(now, len(prompt) // TOKEN_BYTES)
        refused = context.admission.admit(now, plan.request_id, len(plan.prompts))
        if refused is not None:
            raise UnavailableError("overloaded", retry_after_s=refused.retry_after_s)
        self._admitted = True
        self._count_load()
        context.metrics.prompt_tokens.inc(plan.num_prompt_tokens)
        self._timer = asyncio.get_running_loop().call_later(plan.deadline - now, self._expire)
        for index, prompt in enumerate(plan.prompts):
            submit = Submit(
                request_id=plan.sub_id(index),
                prompt=prompt,
                params=plan.params,
                seeds=plan.seeds[index],
                deadline=plan.deadline,
                cache_salt=plan.cache_salt,
                priority=plan.priority,
            )
            context.cluster.submit(submit, self._receiver(index))

    def _receiver(self, index: int) -> Callable[[CallEffect], None]:
        return lambda effect: self.receive(index, effect)

    def receive(self, prompt_index: int, effect: CallEffect) -> None:
        """An effect of the dispatcher for one prompt."""
        if isinstance(effect, Progress):
            if effect.stage != "queued":
                self._begun()
            return
        if isinstance(effect, Deliver):
            self._note_tokens(prompt_index, effect)
        self.inbox.put(prompt_index, effect)

    def _note_tokens(self, prompt_index: int, effect: Deliver) -> None:
        if not self._has_begun:
            self._begun()
        metrics, traffic, tokens = self._context.metrics, self._context.traffic, effect.tokens
        if not tokens.token_ids:
            return
        now = self._context.clock()
        choice = prompt_index * self.plan.params.n + tokens.choice
        num_tokens = len(tokens.token_ids)  # several where the link lags
        if not self._last_token_at:
            metrics.ttft.observe(now - self._started)
            traffic.on_first_token(now, (now - self._started) * 1000, tokens.num_cached_tokens)
        if choice in self._last_token_at:
            metrics.itl.observe((now - self._last_token_at[choice]) / num_tokens, num_tokens)
        else:
            self._first_token_at[choice] = now
            self._running_tokens[choice] = 0
            traffic.on_begin()
        self._last_token_at[choice] = now
        metrics.generation_tokens.inc(num_tokens)
        if choice in self._running_tokens:
            self._running_tokens[choice] += num_tokens
            traffic.on_tokens(now, num_tokens)

    def _note_end(self, choice: int, num_tokens: int) -> None:
        first, last = self._first_token_at.get(choice), self._last_token_at.get(choice)
        tpot_ms = None
        if first is not None and last is not None and num_tokens > 1:
            tpot_ms = (last - first) * 1000 / (num_tokens - 1)
        if choice in self._running_tokens:
            self._context.traffic.on_end(self._context.clock(), self._running_tokens.pop(choice), tpot_ms)

    def _begun(self) -> None:
        if not self._has_begun:
            self._has_begun = self._context.admission.begun(self.plan.request_id)
            self._count_load()

    def _count_load(self) -> None:
        self._context.metrics.queued.set(self._context.admission.num_queued)
        self._context.metrics.running.set(self._context.admission.num_running)

    async def take(self) -> list[Delta]:
        """What has arrived since the last call, as text; waits. Raises NeapError when the request failed.

        Check `gone` after it: then nobody is left to answer.
        """
        return self._read(await self.inbox.take())

    def take_now(self) -> list[Delta]:
        """The same without waiting."""
        return self._read(self.inbox.take_now())

    def _read(self, arrivals: list[Arrival]) -> list[Delta]:
        deltas: list[Delta] = []
        if self.gone:
            return deltas
        for prompt_index, item in arrivals:
            if isinstance(item, Deliver):
                deltas += self._add(prompt_index, item)
            elif isinstance(item, DeliverScores):
                if self._prompts is not None:
                    self._prompts.take(prompt_index, item)
            elif item.code is not None or self._num_open[prompt_index]:
                raise failure(item.code or "internal_error")
        if self._expired and not self.done:
            raise RequestError("deadline_exceeded")
        return deltas

    def _add(self, prompt_index: int, item: Deliver) -> list[Delta]:
        tokens = item.tokens
        choice = self._choices[prompt_index * self.plan.params.n + tokens.choice]
        self._note_path(item.path or tokens.path)
        if self._cached[prompt_index] is None:
            self._cached[prompt_index] = tokens.num_cached_tokens
            self._context.metrics.cached_tokens.inc(tokens.num_cached_tokens)
        if tokens.finish_reason == "abort":
            raise failure("internal_error")
        deltas = choice.add_each(tokens)
        if self._prompts is not None and deltas:
            self._prompts.attach(prompt_index, deltas[0])
        if deltas and (reason := deltas[-1].finish_reason) is not None:
            self._context.metrics.finished.labels(reason).inc()
            self._note_end(prompt_index * self.plan.params.n + tokens.choice, choice.num_tokens)
            self._num_open[prompt_index] -= 1
            if not self._num_open[prompt_index]:
                # a stop string is seen only here; D would go on. If D ended it, this is ignored
                self._context.cluster.cancel(self.plan.sub_id(prompt_index))
        return deltas

    def _note_path(self, path: Path | None) -> None:
        if path is not None:
            if self.path is None:
                self._context.metrics.paths.labels(path).inc()
            self.path = path

    def _expire(self) -> None:
        self._expired = True
        self._cancel_all()
        self.inbox.wake()

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self.inbox.wake()

    def _overflow(self) -> None:
        self._context.metrics.errors.labels("slow_client").inc()
        self.gone = True
        self.close()
        self._on_overflow()

    def _cancel_all(self) -> None:
        for index in range(len(self.plan.prompts)):
            self._context.cluster.cancel(self.plan.sub_id(index))

    def close(self) -> None:
        """Give everything back. Later calls do nothing."""
        if not self._admitted:
            return
        self._admitted = False
        if self._timer is not None:
            self._timer.cancel()
        self._cancel_all()
        self.inbox.close()
        now = self._context.clock()
        for num_tokens in self._running_tokens.values():  # begun, and never to end
            self._context.traffic.on_end(now, num_tokens, None)
        self._context.admission.leave(now, self.plan.request_id)
        self._count_load()
        self._context.metrics.e2e.observe(now - self._started)


class _PromptParts:
    """What the answers say of their prompts, while it comes in."""

    def __init__(self, plan: Plan):
        self._parts = [
            PromptPart(
                text=plan.echo[index] if plan.echo else "",
                token_ids=tuple(np.frombuffer(prompt, dtype="<i4").tolist()),
            )
            for index, prompt in enumerate(plan.prompts)
        ]
        self._is_scored = plan.params.prompt_logprobs is not None
        self._told: set[int] = set()

    def take(self, prompt_index: int, item: DeliverScores) -> None:
        """More logprobs of a prompt."""
        self._parts[prompt_index].logprobs.extend(item.scores.logprobs)

    def attach(self, prompt_index: int, first: Delta) -> None:
        """Give a choice's first Delta its prompt. Raises UnavailableError if the logprobs are not all here."""
        if first.choice in self._told:
            return
        part = self._parts[prompt_index]
        if self._is_scored and len(part.logprobs) != len(part.token_ids) - 1:
            raise failure("internal_error")
        self._told.add(first.choice)
        first.prompt = part


def failure(code: str) -> NeapError:
    """The error of a code that the dispatcher gave; its words come from the catalogue. An unknown code is our fault."""
    kind = ERRORS.get(code)
    if kind is None:
        return UnavailableError("internal_error")
    return UnavailableError(code) if kind.status in (429, *range(500, 600)) else RequestError(code)
