"""What the scheduler's machine expects: requests and calls as the other side sees them, from the exact fake."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import engine.messages as m
from engine.fake_engine import FakeModel, spread
from engine.scheduler.prefill import MAX_SCORED_PER_STEP

BLOCK = 16
MODEL = FakeModel(stop_probability=0.02)
BASES = [[3 + (i * i + 7 * k * i) % 200 for i in range(130)] for k in (1, 2)]


def tokens_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def kv_of(tokens: list[int]) -> np.ndarray:
    """uint8 [n, 2, 8]: the KV bytes of a sequence, position by position."""
    return spread(MODEL.chain(MODEL.root, tokens, 0), 2).view(np.uint8).reshape(len(tokens), 2, 8)


@dataclass
class Expected:
    """One request as its client sees it."""

    prompt: list[int]
    text: list[int]
    got: list[int]
    ended: bool = False
    pull_blocks: list[int] = field(default_factory=list)  # the block table while a pull is open
    landed: set[int] = field(default_factory=set)  # indices matched or committed
    wants_scores: bool = False
    scores: list[float] = field(default_factory=list)  # prompt logprobs, from the second token on

    def take_scores(self, message: m.PromptLogprobs) -> None:
        """In order, each once, before any token, and from the KV that is its own."""
        assert self.wants_scores and not self.ended
        assert message.first_position == len(self.scores) + 1 and 0 < len(message.logprobs) <= MAX_SCORED_PER_STEP
        self.scores += [entry.logprob for entry in message.logprobs]
        assert self.scores == MODEL.prompt_oracle(self.prompt)[: len(self.scores)]

    def open_blocks(self) -> list[int]:
        """Indices that a copy may still write."""
        return [i for i in range(len(self.pull_blocks)) if i not in self.landed]


@dataclass
class Call:
    """One served call as its peer sees it."""

    kv: np.ndarray
    start: int
    end: int = -1
    next_block: int = 0
    pieces: list[m.ServedPiece] = field(default_factory=list)
    done: bool = False
