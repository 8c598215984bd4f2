"""Requests of the offline API while they run: tokens become text, stop strings end a choice, Ctrl-C ends everything.

All prompts' first choices are added -> steps until all have ended; a prompt's other choices follow its first token.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from engine.core import EngineCore
from engine.messages import Abort, Add, NewTokens, PromptLogprobs
from engine.request import FinishReason
from engine.scheduler.batch import TokenLogprobs
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.stop_strings import StopStrings
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. `token_ids` includes the token that stopped it; `text` includes neither that nor a stop string.

    `logprobs` has one entry per token where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Job:
    """One choice of one prompt while it runs: its tokens so far and their text."""

    def __init__(self, add: Add, tokenizer: Tokenizer) -> None:
        self.add = add
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's tokens from the second on
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer, add.params.skip_special_tokens)
        self._stops = StopStrings(add.params.stop)
        self._text: list[str] = []

    def take(self, news: NewTokens) -> None:
        """Add what a step produced. Raises RuntimeError when the engine gave the request up."""
        assert news.first_position == len(self._token_ids), "an engine in this process loses no tokens"
        if news.error is not None:
            raise RuntimeError(f"the engine ended a request: {news.error}")
        self._logprobs += news.logprobs
        for token in news.token_ids:
            self._token_ids.append(token)
            if news.stop_token is None and self._show(self._detokenizer.push((token,))):
                self.finish_reason = FinishReason.STOP
                return
        if news.finish_reason is not None:
            self.finish_reason = news.finish_reason
            if self._show(self._detokenizer.flush()):
                self.finish_reason = FinishReason.STOP
            self._text.append(self._stops.flush())

    def take_scores(self, news: PromptLogprobs) -> None:
        """Add logprobs of the prompt."""
        assert news.first_position == len(self.prompt_logprobs) + 1, "an engine in this process loses nothing"
        self.prompt_logprobs += news.logprobs

    def _show(self, text: str) -> bool:
        """Add text; whether a stop string ends it. As with stop tokens, nothing stops before min_tokens."""
        if len(self._token_ids) <= self.add.params.min_tokens:
            self._text.append(text)
            return False
        shown, stopped = self._stops.push(text)
        self._text.append(shown)
        return stopped

    def output(self) -> CompletionOutput:
        """The finished answer."""
        assert self.finish_reason is not None, "only finished jobs have an output"
        return CompletionOutput(
            index=self.add.choice,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self.add.params.logprobs is not None else None,
        )


def run_jobs(core: EngineCore, prompts: Sequence[Sequence[Job]]) -> None:
    """Run all jobs (per prompt, its choices) to their ends. Whatever is raised, nothing of them stays in the engine.

    The first choice of a prompt goes alone until its first token, so that the others find the prompt in the cache.
    """
    running = {choices[0].add.request_id: choices[0] for choices in prompts}
    siblings = {choices[0].add.request_id: choices[1:] for choices in prompts}
    with _interrupts_between_steps() as check_interrupt, _aborted_on_error(core, running):
        for job in running.values():
            core.submit(job.add)
        while running:
            check_interrupt()
            events = core.step()
            if events is None:
                raise RuntimeError("the engine has nothing to do while requests are unfinished")
            for reply in events.replies:
                if isinstance(reply, PromptLogprobs) and reply.request_id in running:
                    running[reply.request_id].take_scores(reply)
            for news in events.tokens:
                if news.request_id not in running:
                    continue  # ended by a stop string; the abort was on its way
                job = running[news.request_id]
                job.take(news)
                for sibling in siblings.pop(news.request_id, ()):
                    running[sibling.add.request_id] = sibling
                    core.submit(sibling.add)
                if job.finish_reason is not None:
                    del running[news.request_id]
                    if news.finish_reason is None:
                        core.submit(Abort(request_id=news.request_id))
        _drain(core)


@contextmanager
def _aborted_on_error(core: EngineCore, running: dict[str, Job]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for request_id in running:
            core.submit(Abort(request_id=request_id))
        _drain(core)
        raise


def _drain(core: EngineCore) -> None:
    """Let aborts take effect and steps in flight land."""
    while core.has_work:
        core.step()


@contextmanager
def _interrupts_between_steps() -> Iterator[Any]:
    """Hold Ctrl-C back until a step is complete: one in the middle would leave scheduler and runner apart.

    Gives a function to call between steps. A second Ctrl-C acts at once. Other threads never get one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        if asked and callable(before):
            before(number, frame)
        asked.append(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
