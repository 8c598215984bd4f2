"""The runner by hand-made batches: rows, deltas, steps in flight, stale memory, and what wait() returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.request import SamplingParams
from engine.runner.model_runner import ModelRunner
from engine.scheduler.batch import IntArray, NewBlocks, RowStart, ScheduledBatch, StepResult

PROMPT = np.arange(3, 45, dtype=np.int32)  # 42 tokens, 3 blocks of 16
GREEDY = SamplingParams(temperature=0.0)


def start(row: int, tokens: IntArray = PROMPT, params: SamplingParams = GREEDY) -> RowStart:
    return RowStart(
        row=row, request_id=f"r{row}", token_ids=tokens, num_prompt_tokens=len(tokens), params=params, seed=1
    )


def blocks(row: int, ids: Sequence[int], first: int = 0) -> NewBlocks:
    return NewBlocks(row=row, first=first, block_ids=np.array(ids, dtype=np.int32))


def batch(
    rows: Sequence[tuple[int, int, int, bool]],
    *,
    starts: Sequence[RowStart] = (),
    new_blocks: Sequence[NewBlocks] = (),
    step: int = 0,
    num_decode_rows: int = 0,
) -> ScheduledBatch:
    """`rows`: (row, query_len, num_computed, samples)."""
    columns = list(zip(*rows, strict=True))
    return ScheduledBatch(
        step=step,
        starts=tuple(starts),
        new_blocks=tuple(new_blocks),
        rows=np.array(columns[0], dtype=np.int32),
        query_lens=np.array(columns[1], dtype=np.int32),
        num_computed=np.array(columns[2], dtype=np.int32),
        samples=np.array(columns[3], dtype=np.bool_),
        num_decode_rows=num_decode_rows,
    )


def prefill(row: int, ids: Sequence[int], params: SamplingParams = GREEDY) -> ScheduledBatch:
    new_blocks = [blocks(row, ids)]
    return batch([(row, len(PROMPT), 0, True)], starts=[start(row, params=params)], new_blocks=new_blocks)


def decode(row: int, num_computed: int) -> ScheduledBatch:
    return batch([(row, 1, num_computed, True)], num_decode_rows=1)


def logits_of(result: StepResult) -> np.ndarray:
    assert result.logits is not None
    return result.logits


def test_only_rows_that_sample_get_a_token(runner: ModelRunner) -> None:
    both = batch(
        [(0, 42, 0, True), (1, 16, 0, False)],
        starts=[start(0), start(1)],
        new_blocks=[blocks(0, [1, 2, 3]), blocks(1, [4, 5, 6])],
        step=7,
    )
    result = runner.launch(both).wait()
    assert result.step == 7
    assert result.token_ids[0] == logits_of(result)[0].argmax() and result.token_ids[1] == -1
    assert logits_of(result).shape == (1, 320)


def test_a_step_without_samples_has_no_logits(runner: ModelRunner) -> None:
    chunk = batch([(0, 16, 0, False)], starts=[start(0)], new_blocks=[blocks(0, [1, 2, 3])])
    result = runner.launch(chunk).wait()
    assert result.token_ids.tolist() == [-1] and result.logits is None and not result.logprobs


def test_a_step_launched_before_the_last_is_read_continues_it(runner: ModelRunner) -> None:
    runner.launch(prefill(0, [1, 2, 3])).wait()
    one_by_one = [runner.launch(decode(0, 42 + i)).wait() for i in range(3)]
    first = runner.launch(prefill(2, [7, 8, 9]))
    handles = [runner.launch(decode(2, 42 + i)) for i in range(3)]
    first.wait()
    for expected, handle in zip(one_by_one, handles, strict=True):
        found = handle.wait()
        assert found.token_ids == expected.token_ids
        assert np.array_equal(logits_of(found), logits_of(expected))


def test_a_reused_row_forgets_its_earlier_request(runner: ModelRunner) -> None:
    fresh = runner.launch(prefill(1, [4, 5, 6])).wait()
    longer = np.arange(100, 180, dtype=np.int32)
    runner.launch(
        batch([(0, 80, 0, True)], starts=[start(0, longer)], new_blocks=[blocks(0, [10, 11, 12, 13, 14])])
    ).wait()
    again = runner.launch(prefill(0, [20, 21, 22])).wait()
    assert np.array_equal(logits_of(again), logits_of(fresh))


def test_what_a_block_held_before_cannot_leak(runner: ModelRunner) -> None:
    expected = runner.launch(prefill(0, [1, 2, 3])).wait()
    runner.kv.tensor[4:7] = float("nan")
    found = runner.launch(prefill(1, [4, 5, 6])).wait()
    assert np.array_equal(logits_of(found), logits_of(expected))
    assert runner.kv.tensor.isfinite().all()


def test_a_pulled_partial_block_keeps_its_tokens_and_loses_the_rest(runner: ModelRunner) -> None:
    expected = runner.launch(prefill(0, [1, 2, 3])).wait()
    kv = runner.kv.tensor
    kv[4:7] = float("nan")
    kv[4:6] = kv[1:3]
    kv[6, :, :, :, :9] = kv[3, :, :, :, :9]  # tokens 32..40 of 42 came from a peer
    last = batch([(1, 1, 41, True)], starts=[start(1)], new_blocks=[blocks(1, [4, 5, 6])], num_decode_rows=1)
    assert np.array_equal(logits_of(runner.launch(last).wait()), logits_of(expected))


def test_padding_writes_to_the_null_block_only(runner: ModelRunner) -> None:
    runner.launch(prefill(0, [1, 2, 3])).wait()
    before = runner.kv.tensor.clone()
    runner.launch(decode(0, 42)).wait()
    changed = (runner.kv.tensor != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {0, 3}


def test_decode_rows_of_very_different_lengths_share_a_step(runner: ModelRunner) -> None:
    short = np.array([5], dtype=np.int32)
    starts = [start(0), start(3, short)]
    alone = [runner.launch(prefill(0, [1, 2, 3])).wait()]
    one = batch([(3, 1, 0, True)], starts=[starts[1]], new_blocks=[blocks(3, [9])], num_decode_rows=1)
    alone.append(runner.launch(one).wait())
    together = batch(
        [(3, 1, 0, True), (0, 1, 41, True)],
        starts=[starts[1]],
        new_blocks=[blocks(3, [9])],
        num_decode_rows=2,
    )
    found = logits_of(runner.launch(together).wait())
    assert np.array_equal(found, np.concatenate([logits_of(alone[1]), logits_of(alone[0])]))


def test_logprobs_come_by_index_into_the_batch(runner: ModelRunner) -> None:
    wants = SamplingParams(temperature=0.0, logprobs=2)
    both = batch(
        [(1, 16, 0, False), (0, 42, 0, True)],
        starts=[start(1), start(0, params=wants)],
        new_blocks=[blocks(1, [4]), blocks(0, [1, 2, 3])],
    )
    result = runner.launch(both).wait()
    assert result.logprobs.keys() == {1} and result.logprobs[1].top_ids[0] == result.token_ids[1]
    expected = torch.log_softmax(torch.from_numpy(logits_of(result)[0]), -1).max()
    assert result.logprobs[1].logprob == pytest.approx(float(expected), abs=1e-4)


def test_checksums_are_the_caches(runner: ModelRunner) -> None:
    runner.launch(prefill(0, [1, 2, 3])).wait()
    ids = np.array([1, 2], dtype=np.int32)
    assert runner.checksum_blocks(ids) == runner.kv.checksum_blocks(ids)
    assert runner.checksum_partial(3, 10) == runner.kv.checksum_partial(3, 10)
    assert runner.checksum_algorithm == runner.kv.checksum_algorithm
