"""The sampler against a plain float64 reference, and its statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.sampling.philox import Purpose, uniform
from engine.sampling.sampler import Sampler
from engine.scheduler.batch import RowStart
from tests.engine.sampling import reference
from tests.engine.sampling.conftest import StartRow

EOS = (2, 5)


def noise_at(seed: int, position: int, choice: int) -> float:
    one = [torch.tensor([value]) for value in (seed, position, choice)]
    return float(uniform(one[0], one[1], one[2], Purpose.TOKEN))


def sample_one(logits: torch.Tensor, start: RowStart) -> int:
    sampler = Sampler(4, logits.shape[-1], "cpu", EOS)
    sampler.start_row(start)
    rows = np.array([start.row], dtype=np.int32)
    return int(sampler.sample(logits[None], rows, torch.tensor([start.token_ids.size])).token_ids)


@st.composite
def params_strategy(draw: st.DrawFn) -> SamplingParams:
    values: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5])),
        "top_k": draw(st.sampled_from([0, -1, 1, 3, 50, 1 << 30])),
        "top_p": draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        "min_p": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.7])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.9, -2.0])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.4, -0.3])),
        "logit_bias": draw(st.dictionaries(st.integers(0, 1 << 20), st.sampled_from([-100.0, -1.5, 2.0]), max_size=5)),
        "min_tokens": draw(st.sampled_from([0, 3])),
        "stop_token_ids": draw(st.lists(st.integers(0, 4000), max_size=3)),
        "ignore_eos": draw(st.booleans()),
        "allowed_token_ids": draw(st.sampled_from([(), (), (), (3,), tuple(range(1, 4000, 2)), (5000,)])),
        "bad_token_sequences": draw(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), max_size=4)),
    }
    return SamplingParams(max_tokens=None, **values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(params=params_strategy(), data=st.data())
def test_a_token_is_the_one_that_plain_float64_says(params: SamplingParams, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([7, 100, 1024, 3001]))
    seed = data.draw(st.integers(0, (1 << 63) - 1))
    token = st.integers(0, vocab_size - 1)
    prompt = tuple(data.draw(st.lists(token, min_size=1, max_size=6)))
    outputs = tuple(data.draw(st.lists(token, max_size=6)))
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, vocab_size).astype(np.float32))
    got = sample_one(
        logits,
        RowStart(
            row=2,
            request_id="r",
            token_ids=np.array(prompt + outputs, dtype=np.int32),
            num_prompt_tokens=len(prompt),
            params=params,
            seed=seed,
            choice=3,
        ),
    )
    adjusted = reference.adjusted_logits(logits.double().numpy(), params, prompt, outputs, EOS)
    if params.greedy:
        assert got == int(adjusted.argmax())
    else:
        noise = noise_at(seed, len(prompt) + len(outputs), 3)
        assert got == reference.choose(reference.probabilities(adjusted, params), noise)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_match_probabilities(start_row: StartRow, params: dict[str, Any]) -> None:
    num_draws, vocab_size, at_once = 8000, 40, 500
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 1.5, vocab_size).astype(np.float32))
    sampler = Sampler(at_once, vocab_size, "cpu", EOS)
    for row in range(at_once):
        start_row(sampler, row, seed=row * 1_000_003, **params)
    rows = np.arange(at_once, dtype=np.int32)
    counts = np.zeros(vocab_size)
    for step in range(num_draws // at_once):
        tokens = sampler.sample(logits.expand(at_once, -1), rows, torch.full((at_once,), 100 + step)).token_ids
        counts += np.bincount(tokens.numpy(), minlength=vocab_size)
    expected = num_draws * reference.probabilities(logits.double().numpy(), SamplingParams(**params))
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = float((((counts - expected) ** 2)[likely] / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


def test_choices_and_positions_and_seeds_have_their_own_noise(start_row: StartRow) -> None:
    sampler = Sampler(3, 1000, "cpu", EOS)
    start_row(sampler, 0, seed=1, choice=0)
    start_row(sampler, 1, seed=1, choice=1)
    start_row(sampler, 2, seed=2, choice=0)
    rows, flat = np.arange(3, dtype=np.int32), torch.zeros(3, 1000)
    first = sampler.sample(flat, rows, torch.tensor([7, 7, 7])).token_ids
    later = sampler.sample(flat, rows, torch.tensor([8, 8, 8])).token_ids
    assert len({*first.tolist(), *later.tolist()}) == 6
    assert torch.equal(first, sampler.sample(flat, rows, torch.tensor([7, 7, 7])).token_ids)


def test_greedy_takes_the_lowest_id_among_equals(start_row: StartRow) -> None:
    for vocab_size, best in ((50, (7, 30)), (5000, (1023, 1024, 4999)), (103424, (70000, 100000))):
        sampler = Sampler(1, vocab_size, "cpu", EOS)
        start_row(sampler, 0, temperature=0.0)
        logits = torch.zeros(1, vocab_size)
        logits[0, list(best)] = 1.0
        assert sampler.sample(logits, np.zeros(1, np.int32), torch.tensor([3])).token_ids.tolist() == [best[0]]


def test_top_k_and_top_p_break_ties_by_the_lowest_id(start_row: StartRow) -> None:
    vocab_size, num_rows = 3000, 200
    for params, kept in (({"top_k": 10}, 10), ({"top_p": 0.5}, 1500), ({"top_k": 1000, "top_p": 0.01}, 10)):
        sampler = Sampler(num_rows, vocab_size, "cpu", EOS)
        for row in range(num_rows):
            start_row(sampler, row, seed=row, **params)
        rows = np.arange(num_rows, dtype=np.int32)
        tokens = sampler.sample(torch.ones(num_rows, vocab_size), rows, torch.zeros(num_rows, dtype=torch.int64))
        assert int(tokens.token_ids.max()) < kept
        assert int(tokens.token_ids.max()) > 0.8 * (kept - 1)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.7, 100.0])
def test_broken_logits_never_crash_and_give_valid_ids(start_row: StartRow, temperature: float) -> None:
    vocab_size = 2000
    sampler = Sampler(6, vocab_size, "cpu", EOS)
    for row in range(6):
        start_row(sampler, row, seed=row, temperature=temperature, top_p=0.9, logprobs=3, repetition_penalty=1.2)
    logits = torch.zeros(6, vocab_size)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 77], logits[3, 5] = torch.inf, torch.nan
    logits[4] = torch.finfo(torch.float32).min
    logits[5] = torch.finfo(torch.float32).max
    before = logits.clone()
    sampled = sampler.sample(logits, np.arange(6, dtype=np.int32), torch.full((6,), 9))
    ids = sampled.token_ids.tolist()
    assert all(0 <= token < vocab_size for token in ids)
    assert ids[0] == ids[1] == 0 and ids[2] == 77 and ids[3] != 5
    assert torch.equal(logits.nan_to_num(nan=0.5), before.nan_to_num(nan=0.5)), "the caller's logits stay"
    assert set(sampled.read_logprobs()) == set(range(6))


def test_an_empty_batch_is_fine() -> None:
    sampled = Sampler(2, 10, "cpu", EOS).sample(
        torch.zeros(0, 10), np.zeros(0, np.int32), torch.zeros(0, dtype=torch.int64)
    )
    assert sampled.token_ids.shape == (0,) and sampled.token_ids.dtype == torch.int64
    assert sampled.read_logprobs() == {}


def test_a_vocabulary_too_large_for_exact_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(1, (1 << 17) + 1, "cpu", EOS)
