"""Allowed tokens and bad words: over steps, after a restart, and when rows are reused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.request import SamplingParams
from engine.sampling.sampler import Sampler
from tests.engine.sampling.conftest import StartRow

VOCAB_SIZE = 40
RISING = np.arange(VOCAB_SIZE, dtype=np.float32)  # the highest token that is left wins


def step(sampler: Sampler, row: int, position: int, logits: np.ndarray[Any, Any] = RISING) -> int:
    tensor = torch.from_numpy(logits.astype(np.float32))[None]
    return int(sampler.sample(tensor, np.array([row], dtype=np.int32), torch.tensor([position])).token_ids)


def test_only_allowed_tokens_come(start_row: StartRow) -> None:
    sampler = Sampler(2, VOCAB_SIZE, "cpu", ())
    start_row(sampler, 0, temperature=0.0, allowed_token_ids=(4, 9, 10**6))
    assert step(sampler, 0, 3) == 9
    start_row(sampler, 0, temperature=5.0, allowed_token_ids=(4, 9))
    assert {step(sampler, 0, position) for position in range(3, 60)} == {4, 9}
    start_row(sampler, 0, temperature=0.0)
    assert step(sampler, 0, 3) == VOCAB_SIZE - 1


def test_a_bad_sequence_is_never_completed_by_outputs_and_the_prompt_does_not_count(start_row: StartRow) -> None:
    sampler = Sampler(1, VOCAB_SIZE, "cpu", ())
    # 39 is never said; 38 not after 38; 37 not after 38 37
    bad = ((39,), (38, 38), (38, 37, 37))
    start_row(sampler, 0, prompt=(38, 38), temperature=0.0, bad_token_sequences=bad)
    assert [step(sampler, 0, position) for position in range(2, 10)] == [38, 37, 38, 37, 38, 37, 38, 37]
    without_38 = np.where(RISING == 38, -100, RISING)
    assert [step(sampler, 0, position, without_38) for position in (10, 11)] == [36, 37]


def test_a_restart_in_the_middle_of_a_bad_sequence_remembers_its_beginning(start_row: StartRow) -> None:
    bad = ((7, 8, 39), (5, 39))
    steady, moved = Sampler(1, VOCAB_SIZE, "cpu", ()), Sampler(2, VOCAB_SIZE, "cpu", ())
    start_row(moved, 1, prompt=(9,), outputs=(3, 7, 8), temperature=0.0, bad_token_sequences=bad)
    assert step(moved, 1, 4) == 38
    assert step(moved, 1, 5) == 39
    start_row(steady, 0, prompt=(9,), outputs=(7,), temperature=0.0, bad_token_sequences=bad)
    assert [step(steady, 0, position) for position in (2, 3)] == [39, 39]
    start_row(steady, 0, prompt=(9, 7, 8), temperature=0.0, bad_token_sequences=bad)
    assert step(steady, 0, 3) == 39


def test_rows_without_restrictions_keep_their_bits_beside_rows_with_them(start_row: StartRow) -> None:
    plain, mixed = Sampler(3, VOCAB_SIZE, "cpu", ()), Sampler(3, VOCAB_SIZE, "cpu", ())
    for sampler in (plain, mixed):
        start_row(sampler, 1, seed=4, temperature=0.9)
    start_row(mixed, 0, seed=1, bad_token_sequences=((3,),))
    start_row(mixed, 2, seed=2, allowed_token_ids=(3,))
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (3, VOCAB_SIZE)).astype(np.float32))
    for position in range(3, 30):
        alone = plain.sample(logits[1:2], np.array([1], np.int32), torch.tensor([position])).token_ids
        batch = mixed.sample(logits, np.arange(3, dtype=np.int32), torch.full((3,), position)).token_ids
        assert int(alone) == int(batch[1])
        assert int(batch[0]) != 3 and int(batch[2]) == 3


def test_nothing_is_allocated_for_requests_without_restrictions(start_row: StartRow) -> None:
    sampler = Sampler(2, VOCAB_SIZE, "cpu", ())
    start_row(sampler, 0, logit_bias={3: 1.0}, min_tokens=2)
    assert sampler._allowed is None and sampler._bad is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bad_words", ("",)), ("bad_words", ("x",) * 65), ("bad_words", (" ",)), ("bad_words", (3,)),
        ("bad_token_sequences", ((),)), ("bad_token_sequences", ((-1,),)), ("bad_token_sequences", ((1,) * 33,)),
        ("bad_token_sequences", ((1,),) * 129), ("allowed_token_ids", (-1,)), ("allowed_token_ids", (1,) * 32769),
        ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
    ],
)  # fmt: skip
def test_a_restriction_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="bad_words" if field.startswith("bad") else field):
        SamplingParams(**{field: value})
