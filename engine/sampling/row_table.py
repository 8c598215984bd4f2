"""The sampling parameters of every row: on the host to decide which work a batch needs, on the device for the maths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.scheduler.batch import IntArray, RowStart

_NUMBERS = ("inverse_temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_INTEGERS = ("top_k", "seed", "choice", "num_prompt_tokens", "min_tokens")
_LOWEST_TEMPERATURE = 1e-6  # below, everything but the largest logit is impossible in float32 anyway

BoolArray = npt.NDArray[np.bool_]


class RowTable:
    """Host flags (bool [rows]) and device columns (float64 and int64 [rows, columns]) of all rows."""

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self.is_random: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_prefix_filter: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_min_p: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_penalties: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_bias: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_allowed: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_bad_words: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.has_min_tokens: BoolArray = np.zeros(max_num_rows, dtype=np.bool_)
        self.num_logprobs: IntArray = np.full(max_num_rows, -1, dtype=np.int32)
        self._numbers = torch.zeros((max_num_rows, len(_NUMBERS)), dtype=torch.float64, device=device)
        self._integers = torch.zeros((max_num_rows, len(_INTEGERS)), dtype=torch.int64, device=device)

    def set_row(self, start: RowStart) -> None:
        """Store the parameters of the request that takes a row."""
        row, params = start.row, start.params
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self.is_random[row] = not params.greedy
        self.has_prefix_filter[row] = not params.greedy and (top_k < self._vocab_size or params.top_p < 1.0)
        self.has_min_p[row] = not params.greedy and params.min_p > 0.0
        self.has_penalties[row] = params.uses_penalties
        self.has_bias[row] = bool(params.logit_bias)
        self.has_allowed[row] = bool(params.allowed_token_ids)
        self.has_bad_words[row] = bool(params.bad_token_sequences)
        self.has_min_tokens[row] = params.min_tokens > 0
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        numbers = (
            1.0 / max(params.temperature, _LOWEST_TEMPERATURE),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        integers = (top_k, start.seed, start.choice, start.num_prompt_tokens, params.min_tokens)
        self._numbers[row].copy_(torch.tensor(numbers, dtype=torch.float64), non_blocking=True)
        self._integers[row].copy_(torch.tensor(integers, dtype=torch.int64), non_blocking=True)

    def number(self, name: str, rows: Tensor) -> Tensor:
        """One float column of some rows: int64 [N] -> float64 [N] on the device."""
        return self._numbers[rows, _NUMBERS.index(name)]

    def integer(self, name: str, rows: Tensor) -> Tensor:
        """One integer column of some rows: int64 [N] -> int64 [N] on the device."""
        return self._integers[rows, _INTEGERS.index(name)]
