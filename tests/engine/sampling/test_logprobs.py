"""Logprobs against float64 log_softmax of the raw logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampling.logprobs import most_likely
from engine.sampling.sampler import Sampler
from tests.engine.sampling import reference
from tests.engine.sampling.conftest import StartRow


@pytest.mark.parametrize("vocab_size", [21, 64, 1000, 103424])
def test_logprobs_are_those_of_raw_logits(start_row: StartRow, vocab_size: int) -> None:
    sampler = Sampler(3, vocab_size, "cpu", (2,))
    start_row(sampler, 0, temperature=0.2, logprobs=20, logit_bias={4: 30.0}, repetition_penalty=2.0)
    start_row(sampler, 1, temperature=0.0)
    start_row(sampler, 2, temperature=0.0, logprobs=0)
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (3, vocab_size)).astype(np.float32))
    sampled = sampler.sample(logits, np.arange(3, dtype=np.int32), torch.full((3,), 3))
    logprobs = sampled.read_logprobs()
    assert sorted(logprobs) == [0, 2]
    assert logprobs[2].top_ids == logprobs[2].top_logprobs == ()
    for row in (0, 2):
        expected = reference.log_softmax(logits[row].double().numpy())
        got = logprobs[row]
        assert got.logprob == pytest.approx(expected[sampled.token_ids[row]], abs=2e-5)
        assert got.top_logprobs == pytest.approx(expected[list(got.top_ids)], abs=2e-5)
    assert list(logprobs[0].top_ids) == np.argsort(-logits[0].numpy(), kind="stable")[:20].tolist()


@pytest.mark.parametrize("vocab_size", [20, 63, 65, 1000, 5001])
def test_most_likely_ranks_equals_by_id(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for values in (rng.integers(-2, 3, (4, vocab_size)), np.zeros((2, vocab_size))):
        logits = values.astype(np.float32)
        logits[0, ::3] = -np.inf
        logits[1, 1::2] = -0.0
        expected = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
        assert most_likely(torch.from_numpy(logits), 20).tolist() == expected.tolist()
