"""One engine's loop body, without a thread or a clock: commands in, steps through the runner, one StepEvents out.

    1. submitted commands take effect: aborts first, then in order
    2. schedule the next step
    3. what the commands are answered with, and the calls that start now, leave at once (`announce`): a peer that
       probes and reserves would wait a whole step for each answer
    4. launch the step, and land one: this one (steps_in_flight 0) or the one before it (1)
    5. everything else that this caused leaves in ONE StepEvents

Whatever goes wrong while one command is handled ends that command's request only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from engine.messages import (
    Abort,
    Add,
    Command,
    Commit,
    EndServe,
    Load,
    NewTokens,
    NoSpace,
    Pause,
    Paused,
    Probe,
    Probed,
    PromptLogprobs,
    PullClosed,
    Reserve,
    Reserved,
    RoleSet,
    Serve,
    ServeBusy,
    SetRole,
    Shutdown,
    StepEvents,
)
from engine.request import FinishReason
from engine.scheduler.batch import Runner, ScheduledBatch, StepHandle
from engine.scheduler.landing import Landed
from engine.scheduler.scheduler import Scheduler, ended
from engine.scheduler.served import ServeNews
from engine.scheduler.step_cost import StepCost

_log = logging.getLogger(__name__)
_Reply = Probed | Reserved | NoSpace | Paused | RoleSet | ServeNews


class EngineCore:
    """Drives a scheduler and a runner. Not thread-safe: submit and step from one thread."""

    def __init__(self, *, scheduler: Scheduler, runner: Runner, steps_in_flight: int = 0) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.shutdown_asked = False
        self.last_step_cost_s = 0.0  # predicted, of the step launched last: a virtual clock advances by it
        self.last_batch: ScheduledBatch | None = None  # what `step` launched last, for whoever times it
        self._steps_in_flight = steps_in_flight
        self._commands: deque[Command] = deque()
        self._handles: deque[StepHandle] = deque()
        self._stalled = False  # nothing could be scheduled: only a command or a landing changes that
        self._num_steps = 0
        self._num_started = 0
        self._replies: list[_Reply] = []
        self._tokens: list[NewTokens] = []

    @property
    def step_cost(self) -> StepCost:
        """The cost model that plans steps."""
        return self.scheduler.step_cost

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something now."""
        return bool(self._commands or self._handles) or (not self._stalled and self.scheduler.has_unfinished)

    def submit(self, command: Command) -> None:
        """Queue a command for the next step boundary."""
        self._commands.append(command)

    def load(self) -> Load:
        """The load as of the last step boundary."""
        return self.scheduler.load()

    def step(self, announce: Callable[[StepEvents], None] | None = None) -> StepEvents | None:
        """Run one round of the life cycle above; None if there was nothing to do. Without `announce` 3 is part of 5."""
        num_commands = self._handle_commands()
        batch = self.scheduler.schedule()
        self._stalled = batch is None
        self.last_batch = batch
        will_wait = batch is not None or bool(self._handles)
        if announce is not None and will_wait and self._has_answers():
            announce(self._events(None))
        if batch is not None:
            self.last_step_cost_s = batch.predicted_ms / 1000
            self._handles.append(self.runner.launch(batch))
        landed = self._land(launched=batch is not None)
        if not num_commands and batch is None and landed is None:
            return None
        return self._events(landed)

    def _has_answers(self) -> bool:
        """Whether somebody waits for what is known before the step runs."""
        num_started, self._num_started = self._num_started, self.scheduler.num_served_started
        return bool(self._replies or self._tokens) or num_started != self._num_started

    def _events(self, landed: Landed | None) -> StepEvents:
        scheduler, tokens = self.scheduler, self._tokens
        replies: list[_Reply | PromptLogprobs] = [*self._replies, *scheduler.take_news()]
        self._replies, self._tokens = [], []
        if landed is not None:
            replies += landed.replies
            tokens += landed.tokens
        stored, evicted = scheduler.blocks.cache.take_changes()
        return StepEvents(
            step=self._num_steps,
            num_tokens=landed.num_tokens if landed is not None else 0,
            replies=tuple(replies),
            tokens=tuple(tokens),
            load=scheduler.load(),
            stored=stored,
            evicted=evicted,
        )

    def _land(self, launched: bool) -> Landed | None:
        """Keep a just launched step in flight if that is allowed; land the oldest otherwise."""
        keep = self._steps_in_flight if launched else 0
        if len(self._handles) <= keep:
            return None
        result = self._handles.popleft().wait()
        self._num_steps += 1
        self._stalled = False
        return self.scheduler.update(result, self.runner)

    def _handle_commands(self) -> int:
        """Apply what was submitted, aborts first: they overtake prompts."""
        if not self._commands:
            return 0
        commands = aborts_first(self._commands)
        self._commands.clear()
        for command in commands:
            try:
                self._handle(command)
            except Exception as error:
                _log.warning("%s failed: %s", type(command).__name__, error, exc_info=True)
                self._fail(command, error)
        return len(commands)

    def _handle(self, command: Command) -> None:
        scheduler = self.scheduler
        match command:
            case Add():
                self._tokens += scheduler.add(command)
            case Probe():
                self._replies.append(scheduler.probe(command))
            case Reserve():
                self._replies.append(scheduler.reserve(command))
            case Commit():
                scheduler.commit(command)
            case PullClosed():
                scheduler.pull_closed(command)
            case Abort():
                scheduler.abort(command)
            case Pause():
                self._replies += scheduler.pause(command)
            case SetRole():
                scheduler.role = command.role
                self._replies.append(RoleSet(role=command.role))
            case Serve():
                self._replies += scheduler.serve(command)
            case EndServe():
                scheduler.end_serve(command)
            case Shutdown():
                self.shutdown_asked = True

    def _fail(self, command: Command, error: Exception) -> None:
        """End the one request whose command could not be handled."""
        code = "invalid_value" if isinstance(error, ValueError) else "internal_error"
        match command:
            case Add() | Commit() | PullClosed():
                self.scheduler.abort(Abort(request_id=command.request_id))
                self._tokens.append(ended(command.request_id, FinishReason.ABORT, error=code))
            case Probe():
                self._replies.append(Probed(request_id=command.request_id, num_cached_tokens=0))
            case Reserve():
                self._replies.append(NoSpace(request_id=command.add.request_id, never=True))
            case Serve():
                self._replies.append(ServeBusy(call_id=command.call_id, never=True))
            case Pause():
                pass  # logged; the request runs on, and whoever asked hears nothing, as of one that ended
            case _:
                raise error


def aborts_first(submitted: Iterable[Command]) -> list[Command]:
    """Aborts, then the rest in order, without the requests that an abort submitted after them has undone."""
    commands = list(submitted)
    if not [command for command in commands if isinstance(command, Abort)]:
        return commands
    aborts: list[Command] = []
    others: list[Command] = []
    for command in commands:
        if isinstance(command, Abort):
            aborts.append(command)
            others = [other for other in others if _opened_id(other) != command.request_id]
        else:
            others.append(command)
    return aborts + others


def _opened_id(command: Command) -> str | None:
    match command:
        case Add():
            return command.request_id
        case Reserve():
            return command.add.request_id
    return None
