"""Seeded prompts for the exact fake, and what the fake must answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.words import words
from cluster.spec import FakeSpec
from cluster.worker.fake import fake_config
from engine.config import EngineConfig
from engine.request import SamplingParams
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A body for an endpoint, and the text of every token that must come back."""

    path: str
    body: dict[str, Any]
    pieces: tuple[str, ...]


class FakePrompts:
    """Draws prompts of so many words; the same seed draws the same ones."""

    def __init__(self, folder: Path, fake: FakeSpec, seed: int) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._model = fake_config(EngineConfig(model=str(folder)), fake).model
        self._words = words()
        self._random = random.Random(seed)

    def draw(self, num_words: int, num_tokens: int, *, endpoint: str, with_answer: bool) -> Prompt:
        """One prompt for "chat" or "completions". `with_answer`: work out the answer too (some 100 us a token)."""
        text = " ".join(self._random.choices(self._words, k=num_words))
        body: dict[str, Any] = {"model": "fake", "max_tokens": num_tokens, "temperature": 0, "stream": True}
        body["ignore_eos"] = True
        if endpoint == "chat":
            turns = [{"role": "user", "content": text}]
            body["messages"] = turns
            ids = self._tokenizer.encode_chat(turns) if with_answer else []
        else:
            body["prompt"] = text
            ids = self._tokenizer.encode(text) if with_answer else []
        path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
        return Prompt(path=path, body=body, pieces=self._answer(ids, num_tokens) if with_answer else ())

    def token_ids(self, num_words: int) -> list[int]:
        """A prompt as the engine takes it."""
        return self._tokenizer.encode(" ".join(self._random.choices(self._words, k=num_words)))

    def _answer(self, ids: Sequence[int], num_tokens: int) -> tuple[str, ...]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return tuple(self._tokenizer.decode([token]) for token in self._model.oracle(ids, params))
