"""What a request may never output: tokens outside its allowed ones, and token sequences that bad words are made of.

State lies on the device, one row per running request, allocated when a request first needs it; it is restored from the
request's tokens like the penalties' (penalties.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import MAX_BAD_SEQUENCE_TOKENS, MAX_BAD_SEQUENCES
from engine.scheduler.batch import RowStart

_ANY = -2  # in a sequence: nothing is asked of this place
_NONE = -1  # in the history: there is no token yet
_HISTORY = MAX_BAD_SEQUENCE_TOKENS - 1


class AllowedTokens:
    """forbidden: bool [rows, V]. One byte per row and token."""

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._forbidden = torch.zeros((max_num_rows, vocab_size), dtype=torch.bool, device=device)

    def set_row(self, start: RowStart) -> None:
        """Forbid everything but the request's allowed tokens."""
        ids = torch.tensor([token for token in start.params.allowed_token_ids if token < self._vocab_size])
        self._forbidden[start.row].fill_(True).index_fill_(0, ids.to(self._device, torch.int64), False)

    def apply(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Edit in place and return: float32 [N, V]. rows: int64 [N]."""
        return logits.masked_fill_(self._forbidden[rows], -torch.inf)


class BannedSequences:
    """A token is impossible where it would complete one of the row's sequences among its outputs.

    before: int64 [rows, S, 31], right-aligned, what the outputs must end in; last: int64 [rows, S], the token that
    would complete it; used: bool [rows, S]; recent: int64 [rows, 31], the latest outputs, newest last.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        shape = (max_num_rows, MAX_BAD_SEQUENCES)
        self._before = torch.full((*shape, _HISTORY), _ANY, dtype=torch.int64, device=device)
        self._last = torch.zeros(shape, dtype=torch.int64, device=device)
        self._used = torch.zeros(shape, dtype=torch.bool, device=device)
        self._recent = torch.full((max_num_rows, _HISTORY), _NONE, dtype=torch.int64, device=device)

    def restore(self, start: RowStart) -> None:
        """Set the row's sequences, and its history from all outputs known so far."""
        before = torch.full((MAX_BAD_SEQUENCES, _HISTORY), _ANY, dtype=torch.int64)
        last = torch.zeros(MAX_BAD_SEQUENCES, dtype=torch.int64)
        used = torch.zeros(MAX_BAD_SEQUENCES, dtype=torch.bool)
        sequences = [ids for ids in start.params.bad_token_sequences if max(ids) < self._vocab_size]
        for i, ids in enumerate(sequences):
            before[i, _HISTORY - len(ids) + 1 :] = torch.tensor(ids[:-1], dtype=torch.int64)
            last[i], used[i] = ids[-1], True
        recent = torch.full((_HISTORY,), _NONE, dtype=torch.int64)
        outputs = start.token_ids[start.num_prompt_tokens :][-_HISTORY:].tolist()
        recent[_HISTORY - len(outputs) :] = torch.tensor(outputs, dtype=torch.int64)
        rows = ((self._before, before), (self._last, last), (self._used, used), (self._recent, recent))
        for table, values in rows:
            table[start.row].copy_(values, non_blocking=True)

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Append one output token per row. rows (distinct), token_ids: int64 [N]."""
        self._recent[rows] = torch.cat((self._recent[rows, 1:], token_ids[:, None]), dim=1)

    def apply(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Edit in place and return: float32 [N, V]. rows: int64 [N]."""
        before = self._before[rows]
        ends_in = ((before == _ANY) | (before == self._recent[rows][:, None, :])).all(-1) & self._used[rows]
        addends = torch.where(ends_in, -torch.inf, 0.0).to(logits.dtype)
        return logits.scatter_add_(1, self._last[rows], addends)
