"""Exact weights and running sums against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.exact_sums import MAX_VOCAB_SIZE, WEIGHT_SCALE, RunningSums, exact_weights, first_argmax


def test_weights_are_whole_and_the_largest_is_the_scale() -> None:
    logits = torch.randn(3, 5000) * 10
    weights = exact_weights(logits, torch.tensor([1.0, 2.0, 0.1]))
    assert torch.equal(weights, weights.trunc()) and weights.amax(-1).tolist() == [WEIGHT_SCALE] * 3
    expected = torch.softmax(logits.double() * torch.tensor([[1.0], [2.0], [0.1]], dtype=torch.float64), -1)
    got = weights.double() / weights.double().sum(-1, keepdim=True)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-9)


def test_the_largest_vocabulary_sums_without_rounding() -> None:
    weights = exact_weights(torch.zeros(1, MAX_VOCAB_SIZE)).double()
    assert float(weights.sum()) == WEIGHT_SCALE * MAX_VOCAB_SIZE == 2.0**53


@pytest.mark.parametrize("vocab_size", [1, 5, 1023, 1024, 1025, 5000])
def test_running_sums_equal_a_plain_scan(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    weights = torch.from_numpy(rng.integers(0, 3, (4, vocab_size)).astype(np.float64))
    plain, sums = weights.cumsum(-1), RunningSums(weights)
    assert torch.equal(sums.total, plain[:, -1])
    index = torch.from_numpy(rng.integers(0, vocab_size, 4))
    assert torch.equal(sums.upto(index), plain.gather(1, index[:, None])[:, 0])
    for share in (0.0, 0.3, 0.9999):
        target = plain[:, -1] * share
        expected = torch.searchsorted(plain, target[:, None], right=True)[:, 0].clamp(max=vocab_size - 1)
        assert torch.equal(sums.first_above(target), expected)
    assert sums.first_above(plain[:, -1] + 1).tolist() == [vocab_size - 1] * 4


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 1 << 20))
def test_first_argmax_is_numpys(size: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 5, (3, size)).astype(np.float32)
    assert first_argmax(torch.from_numpy(x)).tolist() == x.argmax(-1).tolist()
