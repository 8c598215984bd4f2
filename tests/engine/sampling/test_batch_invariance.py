"""A row's token and logprobs are the same bits whatever the batch around it, at the real vocabulary size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.sampling.exact_sums import RunningSums, exact_weights
from engine.sampling.sampler import Sampler
from engine.scheduler.batch import TokenLogprobs
from tests.engine.sampling.conftest import StartRow

VOCAB_SIZE = 103424
NUM_ROWS = 33
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 40, "logprobs": 4},
    {"top_p": 0.999, "min_p": 0.01, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 20, "presence_penalty": 0.4},
    {"top_k": 50000, "logit_bias": {100: 3.0}, "min_tokens": 4, "logprobs": 0},
)


@pytest.fixture
def sampler(start_row: StartRow) -> Sampler:
    sampler = Sampler(NUM_ROWS, VOCAB_SIZE, "cpu", (2,))
    for row in range(NUM_ROWS):
        start_row(sampler, row, seed=row * 31, outputs=(row + 10,), **KINDS[row % len(KINDS)])
    return sampler


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(0, 4, (NUM_ROWS, VOCAB_SIZE)).astype(np.float32))


def run(sampler: Sampler, logits: torch.Tensor, rows: list[int]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens and logprobs of some rows together; penalty counts are put back afterwards."""
    counts = sampler._counts
    assert counts is not None
    before, seen = counts._outputs.clone(), counts._seen.clone()
    sampled = sampler.sample(logits[rows], np.array(rows, dtype=np.int32), torch.tensor(rows) + 50)
    counts._outputs.copy_(before)
    counts._seen.copy_(seen)
    logprobs = sampled.read_logprobs()
    return sampled.token_ids.tolist(), [logprobs.get(index) for index in range(len(rows))]


def test_rows_alone_equal_rows_in_batches_of_every_size(sampler: Sampler, logits: torch.Tensor) -> None:
    alone = [run(sampler, logits, [row]) for row in range(NUM_ROWS)]
    for size in (2, 3, 5, 8, 13, 16, 17, 32, 33):
        order = np.random.default_rng(size).permutation(NUM_ROWS)[:size].tolist()
        tokens, logprobs = run(sampler, logits, order)
        assert tokens == [alone[row][0][0] for row in order]
        assert logprobs == [alone[row][1][0] for row in order]


def test_the_number_of_threads_changes_nothing(sampler: Sampler, logits: torch.Tensor) -> None:
    rows = list(range(0, NUM_ROWS, 3))
    one = run(sampler, logits, rows)
    torch.set_num_threads(2)
    assert run(sampler, logits, rows) == one


def test_weights_and_their_sums_are_the_same_bits_for_every_batch_size(logits: torch.Tensor) -> None:
    together = exact_weights(logits)
    totals = RunningSums(together.double()).total
    for size in range(1, NUM_ROWS + 1):
        part = exact_weights(logits[:size].clone())
        assert torch.equal(part, together[:size])
        assert torch.equal(RunningSums(part.double()).total, totals[:size])
    assert torch.equal(together.double().flip(1).sum(-1), totals), "whole numbers below 2**53: any order"
    assert float(totals.max()) < 2**53
