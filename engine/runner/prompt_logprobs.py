"""Logprobs of prompt tokens: the LM head over a prefill chunk's positions, a few rows at a time so that the logits of a
whole chunk never exist at once. The same head, padding and sums as for sampled tokens, so the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.ernie45 import Ernie45ForCausalLM
from engine.sampling.logprobs import DeviceLogprobs, token_logprobs
from engine.sampling.sampler import finite_or_impossible
from engine.scheduler.batch import PromptScore, ScheduledBatch, TokenLogprobs

_HEAD_ROWS = 64  # logits that exist at once: 26 MB of float32 with ERNIE's vocabulary
_CPU_SUM_ROWS = 4  # rows summed at once on CPU: their temporaries stay in the cache (0.9 ms a row, 2.3 with 16)


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """One row's scores, still on the device; `score` says which."""

    score: PromptScore
    logprobs: DeviceLogprobs

    def read(self) -> tuple[TokenLogprobs, ...]:
        """Copy to the host (waits for the device)."""
        found = self.logprobs.read()
        return tuple(found[i] for i in range(self.score.count))


def score_prompts(
    batch: ScheduledBatch, hidden_TD: Tensor, token_table: Tensor, model: Ernie45ForCausalLM
) -> tuple[ScoredChunk, ...]:
    """Everything that `batch.scores` asks for. hidden_TD: the step's; token_table: int32 [rows, positions]."""
    ends = batch.query_lens.cumsum()
    chunks = []
    for score in batch.scores:
        index = score.index
        # the query token at position p lies at `start` + p - num_computed, and predicts prompt token p + 1
        start = int(ends[index] - batch.query_lens[index] - batch.num_computed[index])
        hidden = hidden_TD[start + score.first_position - 1 :][: score.count]
        targets = token_table[int(batch.rows[index]), score.first_position :][: score.count].to(torch.int64)
        chunks.append(ScoredChunk(score=score, logprobs=_score(hidden, targets, score.num_top, model)))
    return tuple(chunks)


def _score(hidden_ND: Tensor, targets: Tensor, num_top: int, model: Ernie45ForCausalLM) -> DeviceLogprobs:
    parts = []
    at_once = _CPU_SUM_ROWS if hidden_ND.device.type == "cpu" else _HEAD_ROWS
    for first in range(0, len(targets), _HEAD_ROWS):
        rows = hidden_ND[first : first + _HEAD_ROWS]
        padded = model.options.padded_rows(len(rows))
        if padded > len(rows):
            rows = torch.cat((rows, rows.new_zeros(padded - len(rows), rows.shape[1])))
        wanted = targets[first : first + _HEAD_ROWS]
        logits = finite_or_impossible(model.logits(rows)[: len(wanted)])
        for part in range(0, len(wanted), at_once):
            parts.append(token_logprobs(logits[part : part + at_once], wanted[part : part + at_once]))
    chosen, top_ids, top = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return DeviceLogprobs(
        batch_index=tuple(range(len(targets))),
        num_top=(num_top,) * len(targets),
        chosen=chosen,
        top_ids=top_ids,
        top=top,
    )
