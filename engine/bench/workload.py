"""What is measured, with fixed seeds: the prompts and the mixed load of every engine bench. Standard library only.

prefill_N    one request of N random tokens; tokens / time to its first token
decode_bB    B requests of 256 tokens; tokens/s while all of them decode, 64 tokens each, prefill excluded
mixed        32 requests at once, prompts of 64..512 tokens, outputs of 32..128; output tokens / wall
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PREFILL_TOKENS = (512, 2048)
DECODE_BATCHES = (1, 8, 32)
CONTEXT_TOKENS = 256
NEW_TOKENS = 64
MIXED_REQUESTS = 32
MEASURES = (
    *(f"prefill_{tokens}" for tokens in PREFILL_TOKENS),
    *(f"decode_b{batch}" for batch in DECODE_BATCHES),
    "mixed",
)
RATIO_MEASURES = MEASURES[:-1]  # of these the table says how many times faster one engine is

_SEED = 1234
_DECODE_SEED, _MIXED_SEED, WARM_SEED, MEASURED_SEED = 200, 5000, 50, 100


@dataclass(frozen=True, kw_only=True)
class MixedRequest:
    """One request of the mixed load."""

    prompt: list[int]
    num_output_tokens: int


def prompt(num_tokens: int, seed: int, vocab_size: int) -> list[int]:
    """Random token ids, no special ones; another seed shares no prefix."""
    draw = random.Random(_SEED * 1000003 + seed)
    low, high = (300, vocab_size - 100) if vocab_size > 1000 else (vocab_size // 8, vocab_size)
    return [draw.randrange(low, high) for _ in range(num_tokens)]


def decode_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """The contexts of a decode measure; a larger batch begins with those of a smaller one."""
    return [prompt(CONTEXT_TOKENS, _DECODE_SEED + index, vocab_size) for index in range(batch)]


def mixed_requests(vocab_size: int, repetition: int = 0) -> list[MixedRequest]:
    """The mixed load: one fixed draw of lengths; each repetition has other tokens, so that no prefix cache helps."""
    draw = random.Random(_SEED)
    return [
        MixedRequest(
            prompt=prompt(draw.randint(64, 512), _MIXED_SEED + 1000 * repetition + index, vocab_size),
            num_output_tokens=draw.randint(32, 128),
        )
        for index in range(MIXED_REQUESTS)
    ]
