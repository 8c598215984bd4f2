"""State of penalties over several steps, after a preemption, and when rows are reused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.request import SamplingParams
from engine.sampling.sampler import Sampler
from tests.engine.sampling import reference
from tests.engine.sampling.conftest import StartRow

VOCAB_SIZE = 60
EOS = (2,)


def step(sampler: Sampler, row: int, logits: np.ndarray[Any, Any], position: int) -> int:
    tensor = torch.from_numpy(logits.astype(np.float32))[None]
    return int(sampler.sample(tensor, np.array([row], dtype=np.int32), torch.tensor([position])).token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.6},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 1.0, "logit_bias": {7: 1.0}},
    ],
)
def test_outputs_are_counted_step_by_step(start_row: StartRow, params: dict[str, Any]) -> None:
    rng, prompt = np.random.default_rng(3), (1, 4, 4, 9)
    sampler, wanted = Sampler(2, VOCAB_SIZE, "cpu", EOS), SamplingParams(temperature=0.0, **params)
    start_row(sampler, 1, prompt=prompt, temperature=0.0, **params)
    outputs: tuple[int, ...] = ()
    for _ in range(25):
        logits = rng.normal(0, 1, VOCAB_SIZE).astype(np.float32)
        expected = int(reference.adjusted_logits(logits.astype(np.float64), wanted, prompt, outputs, EOS).argmax())
        assert step(sampler, 1, logits, len(prompt) + len(outputs)) == expected
        outputs += (expected,)


def test_a_restart_from_tokens_goes_on_as_if_nothing_had_happened(start_row: StartRow) -> None:
    rng, prompt = np.random.default_rng(4), (3, 8)
    params: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "temperature": 0.9}
    steady, moved = Sampler(2, VOCAB_SIZE, "cpu", EOS), Sampler(2, VOCAB_SIZE, "cpu", EOS)
    start_row(steady, 0, prompt=prompt, seed=5, **params)
    start_row(moved, 0, prompt=prompt, seed=5, **params)
    outputs: tuple[int, ...] = ()
    for count in range(30):
        logits = rng.normal(0, 2, VOCAB_SIZE)
        row = 0
        if count % 7 == 3:  # preempted: the old row is taken by another request, this one resumes elsewhere
            start_row(moved, 0, prompt=(0,) * 9, seed=1, repetition_penalty=2.0)
            moved = Sampler(2, VOCAB_SIZE, "cpu", EOS) if count % 2 else moved
            start_row(moved, 0, prompt=prompt, outputs=outputs, seed=5, **params)
        token = step(steady, row, logits, len(prompt) + len(outputs))
        assert step(moved, row, logits, len(prompt) + len(outputs)) == token
        outputs += (token,)


def test_a_reused_row_forgets_the_request_before(start_row: StartRow) -> None:
    sampler = Sampler(1, VOCAB_SIZE, "cpu", EOS)
    start_row(
        sampler,
        0,
        prompt=(5, 6),
        temperature=0.0,
        repetition_penalty=5.0,
        logit_bias={5: -100.0, 6: -100.0},
        min_tokens=9,
        stop_token_ids=(7,),
        logprobs=2,
    )
    logits = np.zeros(VOCAB_SIZE)
    logits[[5, 6, 7, 2, 30]] = 9, 8, 7, 6, 1
    assert step(sampler, 0, logits, 2) == 30
    start_row(sampler, 0, prompt=(5, 6), temperature=0.0)
    assert step(sampler, 0, logits, 2) == 5
    start_row(sampler, 0, prompt=(1,), temperature=0.0, frequency_penalty=0.5)
    assert step(sampler, 0, logits, 1) == 5
    assert sampler.sample(torch.zeros(1, VOCAB_SIZE), np.zeros(1, np.int32), torch.tensor([2])).read_logprobs() == {}


def test_ending_tokens_are_impossible_until_min_tokens(start_row: StartRow) -> None:
    sampler = Sampler(1, VOCAB_SIZE, "cpu", EOS)
    logits = np.zeros(VOCAB_SIZE)
    logits[[2, 11, 12]] = 50, 40, 30
    start_row(sampler, 0, prompt=(1,), outputs=(0,), temperature=0.0, min_tokens=3, stop_token_ids=(11, 10**6))
    assert [step(sampler, 0, logits, position) for position in (2, 3, 4, 5)] == [12, 12, 2, 2]
    start_row(sampler, 0, prompt=(1,), temperature=0.0, min_tokens=2, ignore_eos=True)
    assert [step(sampler, 0, logits, position) for position in (1, 2, 3)] == [2, 2, 2]


def test_nothing_is_allocated_for_plain_requests(start_row: StartRow) -> None:
    sampler = Sampler(4, VOCAB_SIZE, "cpu", EOS)
    start_row(sampler, 0, temperature=0.5, top_p=0.5, logprobs=1)
    assert sampler._counts is None and sampler._bias is None and sampler._bans is None
