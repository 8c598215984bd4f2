"""Tokens of one choice become text: detokenised incrementally, cut at stop strings, with what the client asked beside.

One Delta per token, also where the link brought several at once, or none while there is nothing to show: half a
character, or text that may turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.types import Tokens
from engine.request import MAX_STOP_BYTES, FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.stop_strings import StopStrings
from engine.text.tokenizer import Tokenizer


@dataclass(kw_only=True, slots=True)
class PromptPart:
    """What an answer says of its prompt: its text (echo), its tokens, and logprobs from the second token on."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Delta:
    """What one arrival adds to a choice. `tokens` pairs ids with logprobs, where logprobs were asked for.

    `prompt` comes with a choice's first Delta, where the client asked for it.
    """

    choice: int
    text: str = ""
    tokens: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt: PromptPart | None = None

    @property
    def num_logprobs(self) -> int:
        """Tokens with logprobs."""
        return len(self.tokens) + (len(self.prompt.logprobs) if self.prompt is not None else 0)


class ChoiceText:
    """One choice of one prompt. `num_tokens` counts what the client pays for: up to the token that ended it."""

    def __init__(self, choice: int, params: SamplingParams, tokenizer: Tokenizer):
        self.choice = choice
        self.num_tokens = 0
        self.finished = False
        self._min_tokens = params.min_tokens
        self._stop_token_ids = frozenset(params.stop_token_ids) - frozenset(tokenizer.eos_token_ids)
        self._with_logprobs = params.logprobs is not None
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._stop = tuple(params.stop)
        self._stops = StopStrings(self._stop) if self._stop else None
        self._tail = ""  # enough of the scanned text to say which stop string matched

    def add_each(self, tokens: Tokens) -> list[Delta]:
        """Take an arrival: a Delta for each token that has something to show, so that a client can count them."""
        num_tokens = len(tokens.token_ids)
        if num_tokens <= 1:
            delta = self._add(tokens, 0, num_tokens)
            return [] if delta is None else [delta]
        deltas: list[Delta] = []
        for index in range(num_tokens):
            delta = self._add(tokens, index, index + 1)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def add(self, tokens: Tokens) -> Delta | None:
        """Take an arrival. None: nothing to show yet, or the choice had ended before (a stop string overtook D)."""
        return self._add(tokens, 0, len(tokens.token_ids))

    def _add(self, tokens: Tokens, first: int, end: int) -> Delta | None:
        """Take token_ids[first:end] of an arrival."""
        if self.finished:
            return None
        delta = Delta(choice=self.choice)
        is_end = tokens.finish_reason is not None and end == len(tokens.token_ids)
        for index in range(first, end):
            token_id = tokens.token_ids[index]
            self.num_tokens += 1
            # the token that stopped it counts, but is no text
            if is_end and index == end - 1 and token_id == tokens.stop_token:
                break
            if self._with_logprobs:
                delta.tokens.append((token_id, tokens.logprobs[index]))
            if self._take(delta, self._detokenizer.push((token_id,))):
                return delta
        if is_end and tokens.finish_reason is not None:
            self._end(delta, tokens.finish_reason, tokens.stop_token)
        return delta if delta.text or delta.tokens or delta.finish_reason else None

    def _take(self, delta: Delta, text: str) -> bool:
        """Add text; True when a stop string ended the choice."""
        # like min_tokens for stop tokens: before it, nothing stops
        if self._stops is None or not text or self.num_tokens <= self._min_tokens:
            delta.text += text
            return False
        self._tail = self._tail[-MAX_STOP_BYTES:] + text
        shown, stopped = self._stops.push(text)
        delta.text += shown
        if stopped:
            self.finished = True
            delta.finish_reason, delta.stop_reason = str(FinishReason.STOP), self._matched()
        return stopped

    def _matched(self) -> str:
        """The stop string that was complete first; of several the longest (as StopStrings decides)."""
        ends = [(self._tail.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in self._tail]
        return min(ends)[2]

    def _end(self, delta: Delta, reason: FinishReason, stop_token: int | None) -> None:
        if self._take(delta, self._detokenizer.flush()):
            return
        if self._stops is not None:
            delta.text += self._stops.flush()
        self.finished = True
        delta.finish_reason = str(reason)
        # an end-of-sequence token is the model's own end and no reason to name
        delta.stop_reason = stop_token if stop_token in self._stop_token_ids else None


class NoText(ChoiceText):
    """A choice of a request that asks for its prompt only (echo, max_tokens 0): one token is made and not shown."""

    def _add(self, tokens: Tokens, first: int, end: int) -> Delta | None:
        if self.finished or end < len(tokens.token_ids) or tokens.finish_reason is None:
            return None
        self.finished = True
        return Delta(choice=self.choice, finish_reason=str(FinishReason.LENGTH))
