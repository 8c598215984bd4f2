"""What the dispatcher keeps of one request: accepted outputs per choice, the current attempt, and a short history."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from cluster.router.decision import Decision
from cluster.router.effects import Submit
from cluster.router.kv_index import PrefixHint
from cluster.types import Choice, Dispatch, Path, PromptScores, SourceRef, Tokens, WorkerInfo

MAX_HISTORY = 16
Verdict = Literal["accept", "duplicate", "gap"]


class HistoryItem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a request, for `explain`. `at` is monotonic seconds."""

    at: float
    event: str
    worker_id: str = ""
    attempt: int = 0


class ChoiceState(msgspec.Struct, kw_only=True, eq=False):
    """One continuation: what was accepted, whatever the attempt."""

    index: int
    seed: int
    outputs: list[int] = []
    finished: bool = False


class Tracked(msgspec.Struct, kw_only=True, eq=False):
    """One live request."""

    request_id: str  # the server's id
    submit: Submit
    choices: dict[int, ChoiceState]
    submitted_at: float
    attempt: int = 0
    worker_id: str | None = None  # of the current attempt; None while it waits
    prefiller_id: str | None = None  # who computes its prompt: its first source, or the decode worker itself
    decision: Decision | None = None  # why it is there
    hint: PrefixHint | None = None  # who held its prefix then
    retry_at: float = 0.0
    num_retries: int = 0  # refused or busy, since it was last accepted
    numerics_class: str = ""  # of the worker that made its last tokens
    avoid: set[str] = set()
    answered: bool = False  # any token of the current attempt was accepted
    path: Path | None = None
    num_scores: int = 0  # prompt tokens after the first whose logprobs were accepted
    history: deque[HistoryItem] = msgspec.field(default_factory=lambda: deque(maxlen=MAX_HISTORY))

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return len(self.submit.prompt) // 4

    @property
    def num_outputs(self) -> int:
        """Accepted tokens of all choices."""
        return sum([len(choice.outputs) for choice in self.choices.values()])

    @property
    def finished(self) -> bool:
        """Every choice is done."""
        return not [choice for choice in self.choices.values() if not choice.finished]

    @property
    def is_scored(self) -> bool:
        """Prompt logprobs need every position's logits: the decode worker computes the whole prompt itself."""
        return self.submit.params.prompt_logprobs is not None

    @property
    def num_unfinished(self) -> int:
        """Choices that are not done."""
        return len([choice for choice in self.choices.values() if not choice.finished])

    def unfinished(self) -> tuple[Choice, ...]:
        """What a decode worker is to continue, with everything accepted so far."""
        return tuple(
            [
                Choice(
                    index=choice.index,
                    seed=choice.seed,
                    outputs=np.array(choice.outputs, dtype="<i4").tobytes() if choice.outputs else b"",
                )
                for choice in self.choices.values()
                if not choice.finished
            ]
        )

    def dispatch(
        self, now: float, decoder: WorkerInfo, sources: Sequence[SourceRef], *, moved: bool = False
    ) -> Dispatch:
        """The message of the current attempt."""
        submit = self.submit
        return Dispatch(
            request_id=self.request_id,
            attempt=self.attempt,
            incarnation=decoder.incarnation,
            epoch=decoder.epoch,
            prompt=submit.prompt,
            choices=self.unfinished(),
            params=submit.params,
            remaining_ms=max(1, math.ceil((submit.deadline - now) * 1000)),  # ours passes first
            sources=tuple(sources),
            cache_salt=submit.cache_salt,
            priority=submit.priority,
            moved=moved,
        )

    def judge(self, tokens: Tokens) -> Verdict:
        """Whether tokens of the current attempt come at exactly the next position of their choice."""
        choice = self.choices.get(tokens.choice)
        if choice is None:
            return "gap"
        known = len(choice.outputs)
        if tokens.position == known and not choice.finished:
            return "accept"
        return "duplicate" if tokens.position + len(tokens.token_ids) <= known else "gap"

    def accept(self, tokens: Tokens) -> None:
        """Append what `judge` accepted."""
        choice = self.choices[tokens.choice]
        choice.outputs.extend(tokens.token_ids)
        choice.finished = tokens.finish_reason is not None
        self.answered = True
        self.path = tokens.path or self.path

    def accept_scores(self, scores: PromptScores) -> PromptScores | None:
        """What of these is new: a later attempt tells the prompt's logprobs from the start. None: some are missing."""
        num_known = self.num_scores + 1 - scores.first_position
        if num_known < 0:
            return None
        fresh = replace(scores, first_position=self.num_scores + 1, logprobs=scores.logprobs[num_known:])
        self.num_scores += len(fresh.logprobs)
        return fresh

    def note(self, at: float, event: str, worker_id: str = "") -> None:
        """Add to the history."""
        self.history.append(HistoryItem(at=at, event=event, worker_id=worker_id, attempt=self.attempt))


def track(submit: Submit, now: float) -> Tracked:
    """A new request; choice i has seed i."""
    choices = {index: ChoiceState(index=index, seed=seed) for index, seed in enumerate(submit.seeds)}
    return Tracked(request_id=submit.request_id, submit=submit, choices=choices, submitted_at=now)
