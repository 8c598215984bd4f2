"""Penalties on tokens that were seen, and edits of single logits (logit_bias, bans before min_tokens).

State lies on the device, one row per running request, allocated when a request first needs it. It is a function of the
request's tokens, so a request that was preempted or comes from another worker is restored from them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from engine.request import MAX_LOGIT_BIAS, SamplingParams
from engine.scheduler.batch import RowStart

MAX_STOP_TOKEN_IDS = 64


class TokenCounts:
    """Which tokens a row's request holds, and how often each was output.

    seen: float32 [rows, V], 1.0 for tokens of prompt or outputs, else 0.0; outputs: float32 [rows, V], whole numbers.
    Floats, because arithmetic on mixed types takes several times as long on CPU. 8 bytes per row and token.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seen = torch.zeros((max_num_rows, vocab_size), dtype=torch.float32, device=device)
        self._outputs = torch.zeros((max_num_rows, vocab_size), dtype=torch.float32, device=device)

    def restore(self, start: RowStart) -> None:
        """Set the row's state from all tokens of the request known so far."""
        tokens = start.token_ids.astype(np.int64)
        known, outputs = (
            torch.from_numpy(part[(part >= 0) & (part < self._vocab_size)]).to(self._device, non_blocking=True)
            for part in (tokens, tokens[start.num_prompt_tokens :])
        )
        self._seen[start.row].zero_().index_fill_(0, known, 1.0)
        counts = self._outputs[start.row].zero_()
        counts.scatter_add_(0, outputs, torch.ones_like(outputs, dtype=torch.float32))

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one output token per row. rows (distinct), token_ids: int64 [N]."""
        self._seen[rows, token_ids] = 1.0
        self._outputs[rows, token_ids] += 1.0

    def apply(self, logits: Tensor, rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
        """Penalise in place and return: float32 [N, V]. rows: int64 [N]; the strengths: float32 [N]."""
        factor = self._seen[rows].mul_(repetition[:, None] - 1.0).add_(1.0)
        negative = logits.clamp(max=0.0).mul_(factor)
        logits.clamp_(min=0.0).div_(factor).add_(negative)
        counts = self._outputs[rows]
        logits.sub_(counts * frequency[:, None])
        return logits.sub_(counts.clamp_(max=1.0).mul_(presence[:, None]))


class LogitEdits:
    """Up to a fixed number of (token id, addend) pairs per row; unused entries add 0.0 to token 0.

    ids: int64 [rows, width]; addends: float32 [rows, width].
    """

    def __init__(self, max_num_rows: int, width: int, device: torch.device) -> None:
        self._ids = torch.zeros((max_num_rows, width), dtype=torch.int64, device=device)
        self._addends = torch.zeros((max_num_rows, width), dtype=torch.float32, device=device)

    def set_row(self, row: int, edits: dict[int, float]) -> None:
        """Replace the row's edits. `edits` fits the width."""
        width = self._ids.shape[1]
        assert len(edits) <= width, "validated above: a row has at most this many edits"
        ids = torch.zeros(width, dtype=torch.int64)
        addends = torch.zeros(width, dtype=torch.float32)
        ids[: len(edits)] = torch.tensor(list(edits), dtype=torch.int64)
        addends[: len(edits)] = torch.tensor(list(edits.values()), dtype=torch.float32)
        self._ids[row].copy_(ids, non_blocking=True)
        self._addends[row].copy_(addends, non_blocking=True)

    def apply(self, logits: Tensor, rows: Tensor, active: Tensor | None = None) -> Tensor:
        """Edit in place and return: float32 [N, V]. rows: int64 [N]; active: bool [N], the others stay as they are."""
        addends = self._addends[rows]
        if active is not None:
            addends = torch.where(active[:, None], addends, 0.0)
        return logits.scatter_add_(1, self._ids[rows], addends)


def bias_edits(params: SamplingParams, vocab_size: int) -> dict[int, float]:
    """logit_bias within the vocabulary."""
    return {token: bias for token, bias in params.logit_bias.items() if token < vocab_size}


def ban_edits(params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int) -> dict[int, float]:
    """Tokens that would end the request, made impossible. With ignore_eos the eos tokens end nothing: they stay."""
    ending = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    return {token: -torch.inf for token in sorted(ending) if 0 <= token < vocab_size}


def bias_width() -> int:
    """Entries that any valid logit_bias fits in."""
    return MAX_LOGIT_BIAS


def ban_width(eos_token_ids: Collection[int]) -> int:
    """Entries that any valid list of ending tokens fits in."""
    return MAX_STOP_TOKEN_IDS + len(set(eos_token_ids))
