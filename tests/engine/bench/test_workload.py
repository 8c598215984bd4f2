"""The loads are those of the peers' figures, and the same in every run."""

from __future__ import annotations

import pytest

from engine.bench import workload

ERNIE = 103424


def test_the_mixed_load_is_that_of_the_peers() -> None:
    requests = workload.mixed_requests(ERNIE)
    assert len(requests) == 32
    assert sum(len(request.prompt) for request in requests) == 7894
    assert sum(request.num_output_tokens for request in requests) == 2431
    assert requests == workload.mixed_requests(ERNIE)


def test_a_repetition_has_the_same_lengths_and_other_tokens() -> None:
    first, second = (workload.mixed_requests(ERNIE, repetition) for repetition in (0, 1))
    assert [len(r.prompt) for r in first] == [len(r.prompt) for r in second]
    assert all(a.prompt[0] != b.prompt[0] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("vocab_size", [320, ERNIE])
def test_prompts_are_plain_tokens_of_the_vocabulary(vocab_size: int) -> None:
    ids = workload.prompt(2048, 7, vocab_size)
    assert len(ids) == 2048 and min(ids) >= 30 and max(ids) < vocab_size
    assert ids == workload.prompt(2048, 7, vocab_size) != workload.prompt(2048, 8, vocab_size)


def test_larger_batches_begin_with_the_smaller_ones() -> None:
    assert workload.decode_prompts(8, ERNIE) == workload.decode_prompts(32, ERNIE)[:8]
