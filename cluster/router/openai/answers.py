"""Response objects of both endpoints, as plain dicts: whole ones, and chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.router.answer import Delta, PromptPart
from engine.scheduler.batch import TokenLogprobs

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]

MIN_LOGPROB = -9999.0  # JSON has no -Infinity


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a whole HTTP request: each prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> Json:
        """OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What every object of one answer begins with."""

    id: str
    created: int
    model: str


class AnswerFormat(Protocol):
    """How an endpoint writes its answers."""

    def first_chunk(self, choice: int) -> Json | None:
        """The chunk that opens a choice in a stream, if the endpoint has one."""
        ...

    def chunk(self, delta: Delta) -> Json:
        """A chunk of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> Json:
        """The chunk without choices that ends a stream."""
        ...

    def body(self, choices: Sequence[Delta], usage: Usage) -> Json:
        """A whole answer; each Delta holds all of its choice."""
        ...


def _clamp(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _token(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _pairs(entry: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    return list(zip(entry.top_ids[:num_top], entry.top_logprobs[:num_top], strict=True))


def prompt_logprobs(part: PromptPart, num_top: int, token_bytes: TokenBytes) -> list[Json | None]:
    """vLLM's form: per prompt token (null for the first) its id and the likeliest ids, with logprob, rank and text.

    The rank of a token that is not among the likeliest ones is null.
    """
    scored: list[Json | None] = [None]
    for token_id, entry in zip(part.token_ids[1:], part.logprobs, strict=True):
        top = _pairs(entry, num_top)
        ranks = {top_id: rank for rank, (top_id, _) in enumerate(top, start=1)}
        scored.append(
            {
                str(shown): {
                    "logprob": _clamp(logprob),
                    "rank": ranks.get(shown),
                    "decoded_token": _token(token_bytes(shown)),
                }
                for shown, logprob in [(token_id, entry.logprob), *top]
            }
        )
    return scored


class ChatFormat:
    """chat.completion and chat.completion.chunk. `num_scores`: alternatives per prompt token, None for none."""

    def __init__(
        self, head: AnswerHead, *, logprobs: int | None, token_bytes: TokenBytes, num_scores: int | None = None
    ):
        self._head = {"id": head.id, "created": head.created, "model": head.model}
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        self._num_scores = num_scores

    def first_chunk(self, choice: int) -> Json:
        """delta.role, with empty content."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: Delta) -> Json:
        """delta.content; the finish_reason where the choice ends."""
        content: Json = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        chunk = self._chunk(delta.choice, content, self._token_logprobs(delta), delta.finish_reason)
        if delta.stop_reason is not None:
            chunk["choices"][0]["stop_reason"] = delta.stop_reason
        if delta.prompt is not None and delta.choice == 0:
            chunk |= self._scores(delta)
        return chunk

    def _chunk(self, choice: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        entry = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [entry]}

    def usage_chunk(self, usage: Usage) -> Json:
        """choices: [] and the usage."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.to_json()}

    def body(self, choices: Sequence[Delta], usage: Usage) -> Json:
        """A chat.completion."""
        entries = [
            {
                "index": delta.choice,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._token_logprobs(delta),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            for delta in choices
        ]
        scores = self._scores(choices[0])
        return {**self._head, "object": "chat.completion", "choices": entries, "usage": usage.to_json(), **scores}

    def _scores(self, delta: Delta) -> Json:
        if delta.prompt is None or self._num_scores is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(delta.prompt, self._num_scores, self._token_bytes)}

    def _token_logprobs(self, delta: Delta) -> Json | None:
        if self._logprobs is None or not delta.tokens:
            return None
        return {"content": [self._entry(*pair) for pair in delta.tokens], "refusal": None}

    def _entry(self, token_id: int, entry: TokenLogprobs) -> Json:
        top = [self._alternative(top_id, logprob) for top_id, logprob in _pairs(entry, self._logprobs or 0)]
        return {**self._alternative(token_id, entry.logprob), "top_logprobs": top}

    def _alternative(self, token_id: int, logprob: float) -> Json:
        raw = self._token_bytes(token_id)
        return {"token": _token(raw), "logprob": _clamp(logprob), "bytes": list(raw)}


class CompletionFormat:
    """text_completion, whole and in chunks. `echo`: texts begin with the prompt; `num_scores` as in ChatFormat."""

    def __init__(
        self,
        head: AnswerHead,
        *,
        logprobs: int | None,
        token_bytes: TokenBytes,
        num_scores: int | None = None,
        echo: bool = False,
    ):
        self._head = {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        self._offsets: dict[int, int] = {}
        self._num_scores = num_scores
        self._echo = echo

    def first_chunk(self, choice: int) -> None:
        """Completions have no role to tell."""
        return

    def chunk(self, delta: Delta) -> Json:
        """The new text; the finish_reason where the choice ends."""
        return {**self._head, "choices": [self._choice(delta)]}

    def usage_chunk(self, usage: Usage) -> Json:
        """choices: [] and the usage."""
        return {**self._head, "choices": [], "usage": usage.to_json()}

    def body(self, choices: Sequence[Delta], usage: Usage) -> Json:
        """A text_completion."""
        return {**self._head, "choices": [self._choice(delta) for delta in choices], "usage": usage.to_json()}

    def _choice(self, delta: Delta) -> Json:
        echoed = delta.prompt.text if self._echo and delta.prompt is not None else ""
        choice = {
            "index": delta.choice,
            "text": echoed + delta.text,
            "logprobs": self._token_logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if delta.prompt is not None and self._num_scores is not None:
            choice["prompt_logprobs"] = prompt_logprobs(delta.prompt, self._num_scores, self._token_bytes)
        return choice

    def _token_logprobs(self, delta: Delta) -> Json | None:
        if self._logprobs is None:
            return None
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if self._echo and delta.prompt is not None:
            # nothing comes before the first token that it could be likely after
            entries += zip(delta.prompt.token_ids, [None, *delta.prompt.logprobs], strict=True)
        entries += delta.tokens
        if not entries:
            return None
        texts = [_token(self._token_bytes(token_id)) for token_id, _ in entries]
        offset = self._offsets.get(delta.choice, 0)
        offsets: list[int] = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[delta.choice] = offset
        return {
            "tokens": texts,
            "token_logprobs": [None if entry is None else _clamp(entry.logprob) for _, entry in entries],
            "top_logprobs": [self._top(entry) for _, entry in entries] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        if entry is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in _pairs(entry, self._logprobs or 0):
            # two tokens may read the same; the likelier one comes first and stays
            top.setdefault(_token(self._token_bytes(token_id)), _clamp(logprob))
        return top
