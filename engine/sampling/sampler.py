"""Chooses one token per row. A row's result depends on its own logits, parameters, tokens, seed and position only.

    raw logits [R, V]
      1. NaN and infinities made harmless
      2. penalties, logit_bias, allowed tokens, bad words, bans before min_tokens   (rows that have them)
      3. argmax                                          (rows without noise)
         or exact weights -> top_k, top_p, min_p -> inverse CDF at ONE uniform per token, in the vocabulary's order
      4. output counts, logprobs                         (rows that have them)

Which rows need what is known on the host from their parameters, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.sampling.exact_sums import MAX_VOCAB_SIZE, RunningSums, exact_weights, first_argmax
from engine.sampling.filters import keep_min_p, keep_prefix
from engine.sampling.logprobs import DeviceLogprobs, token_logprobs
from engine.sampling.penalties import LogitEdits, TokenCounts, ban_edits, ban_width, bias_edits, bias_width
from engine.sampling.philox import Purpose, uniform
from engine.sampling.restrictions import AllowedTokens, BannedSequences
from engine.sampling.row_table import BoolArray, RowTable
from engine.scheduler.batch import IntArray, RowStart, TokenLogprobs

# Rows handled at a time on CPU: their temporaries stay in the cache. On a device all rows go at once.
_CPU_ROWS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens of one call, on the device: int64 [R], in the order of the rows given."""

    token_ids: Tensor
    logprobs: DeviceLogprobs | None

    def read_logprobs(self) -> dict[int, TokenLogprobs]:
        """Logprobs by index into the rows of the call, for those that asked. Waits for the device."""
        return self.logprobs.read() if self.logprobs is not None else {}


class Sampler:
    """Sampling state of all rows of one engine, and the sampling itself.

    Raises ValueError when the vocabulary is too large for exact sums (131,072).
    """

    def __init__(
        self, max_num_rows: int, vocab_size: int, device: torch.device | str, eos_token_ids: Sequence[int]
    ) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be at most {MAX_VOCAB_SIZE}, got {vocab_size}")
        self._max_num_rows = max_num_rows
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._table = RowTable(max_num_rows, vocab_size, self._device)
        self._counts: TokenCounts | None = None
        self._bias: LogitEdits | None = None
        self._bans: LogitEdits | None = None
        self._allowed: AllowedTokens | None = None
        self._bad: BannedSequences | None = None

    def start_row(self, start: RowStart) -> None:
        """Take over a row: parameters, and the state that its tokens so far imply (a first start or any later one)."""
        params = start.params
        self._table.set_row(start)
        if params.uses_penalties:
            if self._counts is None:
                self._counts = TokenCounts(self._max_num_rows, self._vocab_size, self._device)
            self._counts.restore(start)
        if params.logit_bias:
            if self._bias is None:
                self._bias = LogitEdits(self._max_num_rows, bias_width(), self._device)
            self._bias.set_row(start.row, bias_edits(params, self._vocab_size))
        if params.allowed_token_ids:
            if self._allowed is None:
                self._allowed = AllowedTokens(self._max_num_rows, self._vocab_size, self._device)
            self._allowed.set_row(start)
        if params.bad_token_sequences:
            if self._bad is None:
                self._bad = BannedSequences(self._max_num_rows, self._vocab_size, self._device)
            self._bad.restore(start)
        if params.min_tokens:
            if self._bans is None:
                self._bans = LogitEdits(self._max_num_rows, ban_width(self._eos_token_ids), self._device)
            self._bans.set_row(start.row, ban_edits(params, self._eos_token_ids, self._vocab_size))

    def sample(self, logits: Tensor, rows: IntArray, positions: Tensor) -> Sampled:
        """Choose a token for each row. No host synchronisation; `logits` is left as it is.

        logits: float32 [R, V] on the device; rows: int32 [R] on the host, distinct; positions: int64 [R] on the device,
        the absolute position of the token that is sampled.
        """
        device_rows = self._upload(rows)
        noise = self._noise(rows, device_rows, positions)
        parts = [
            self._choose(logits[part], rows[part], device_rows[part], positions[part], noise[part])
            for part in self._parts(len(rows))
        ]
        token_ids = torch.cat(parts) if parts else device_rows
        counted = self._subset(self._table.has_penalties, rows)
        if counted is not None and self._counts is not None:
            self._counts.add(counted.take(device_rows), counted.take(token_ids))
        if self._bad is not None and (watched := self._subset(self._table.has_bad_words, rows)) is not None:
            self._bad.add(watched.take(device_rows), watched.take(token_ids))
        return Sampled(token_ids=token_ids, logprobs=self._logprobs(logits, rows, token_ids))

    def _noise(self, rows: IntArray, device_rows: Tensor, positions: Tensor) -> Tensor:
        """One uniform per row: float64 [R]. Drawn for the whole batch at once, because it is many tiny operations."""
        if not self._table.is_random[rows].any():
            return torch.empty(len(rows), dtype=torch.float64, device=self._device)
        seed, choice = (self._table.integer(name, device_rows) for name in ("seed", "choice"))
        return uniform(seed, positions, choice, Purpose.TOKEN)

    def _choose(self, logits: Tensor, rows: IntArray, device_rows: Tensor, positions: Tensor, noise: Tensor) -> Tensor:
        adjusted = self._adjust(finite_or_impossible(logits), rows, device_rows, positions)
        random = self._subset(self._table.is_random, rows)
        if random is None:
            return first_argmax(adjusted)
        drawn = self._draw(random.take(adjusted), rows[random.on_host], random.take(device_rows), random.take(noise))
        return drawn if random.is_everything else random.put(first_argmax(adjusted), drawn)

    def _adjust(self, logits: Tensor, rows: IntArray, device_rows: Tensor, positions: Tensor) -> Tensor:
        """Penalties, bias, restrictions and bans, in this order. `logits` is ours to change."""
        table = self._table
        chosen = self._subset(table.has_penalties, rows)
        if chosen is not None and self._counts is not None:
            slots = chosen.take(device_rows)
            strengths = [table.number(name, slots).to(logits.dtype) for name in ("repetition", "presence", "frequency")]
            logits = chosen.put(logits, self._counts.apply(chosen.take(logits), slots, *strengths))
        chosen = self._subset(table.has_bias, rows)
        if chosen is not None and self._bias is not None:
            logits = chosen.put(logits, self._bias.apply(chosen.take(logits), chosen.take(device_rows)))
        if self._allowed is not None and (chosen := self._subset(table.has_allowed, rows)) is not None:
            logits = chosen.put(logits, self._allowed.apply(chosen.take(logits), chosen.take(device_rows)))
        if self._bad is not None and (chosen := self._subset(table.has_bad_words, rows)) is not None:
            logits = chosen.put(logits, self._bad.apply(chosen.take(logits), chosen.take(device_rows)))
        chosen = self._subset(table.has_min_tokens, rows)
        if chosen is not None and self._bans is not None:
            slots = chosen.take(device_rows)
            num_outputs = chosen.take(positions) - table.integer("num_prompt_tokens", slots)
            active = num_outputs < table.integer("min_tokens", slots)
            logits = chosen.put(logits, self._bans.apply(chosen.take(logits), slots, active))
        return logits

    def _draw(self, logits: Tensor, rows: IntArray, device_rows: Tensor, noise: Tensor) -> Tensor:
        """Sample rows with noise: the first token whose running weight exceeds a uniform share of the whole."""
        table = self._table
        weights = exact_weights(logits, table.number("inverse_temperature", device_rows).to(logits.dtype))
        chosen = self._subset(table.has_prefix_filter, rows)
        if chosen is not None:
            slots = chosen.take(device_rows)
            kept = keep_prefix(chosen.take(weights), table.integer("top_k", slots), table.number("top_p", slots))
            weights = chosen.put(weights, kept)
        chosen = self._subset(table.has_min_p, rows)
        if chosen is not None:
            min_p = table.number("min_p", chosen.take(device_rows)).to(logits.dtype)
            weights = chosen.put(weights, keep_min_p(chosen.take(weights), min_p))
        sums = RunningSums(weights.to(torch.float64))
        # A row that is impossible everywhere gets token 0 rather than the last one, which may be padding.
        return torch.where(sums.total > 0, sums.first_above(noise * sums.total), 0)

    def _logprobs(self, logits: Tensor, rows: IntArray, token_ids: Tensor) -> DeviceLogprobs | None:
        chosen = self._subset(self._table.num_logprobs >= 0, rows)
        if chosen is None:
            return None
        raw, tokens = chosen.take(logits), chosen.take(token_ids)
        parts = [token_logprobs(finite_or_impossible(raw[part]), tokens[part]) for part in self._parts(len(tokens))]
        of_chosen, top_ids, top = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return DeviceLogprobs(
            batch_index=tuple(chosen.on_host.tolist()),
            num_top=tuple(self._table.num_logprobs[rows[chosen.on_host]].tolist()),
            chosen=of_chosen,
            top_ids=top_ids,
            top=top,
        )

    def _parts(self, num_rows: int) -> list[slice]:
        """Rows that are handled together."""
        at_once = _CPU_ROWS_AT_ONCE if self._device.type == "cpu" else max(num_rows, 1)
        return [slice(first, first + at_once) for first in range(0, num_rows, at_once)]

    def _subset(self, flags: BoolArray, rows: IntArray) -> _Subset | None:
        """The rows of the batch with this flag; None when there are none."""
        index = np.nonzero(flags[rows])[0]
        if not index.size:
            return None
        return _Subset(on_host=index, on_device=self._upload(index), is_everything=index.size == len(rows))

    def _upload(self, values: npt.NDArray[np.signedinteger]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class _Subset:
    """Some rows of a batch by index, ascending. Nothing is copied when it is all of them."""

    on_host: npt.NDArray[np.intp]
    on_device: Tensor
    is_everything: bool

    def take(self, x: Tensor) -> Tensor:
        """[R, ...] -> [N, ...]."""
        return x if self.is_everything else x.index_select(0, self.on_device)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """x [R, ...] with these rows replaced by values [N, ...]; may change x in place."""
        return values if self.is_everything else x.index_copy_(0, self.on_device, values)


def finite_or_impossible(logits: Tensor) -> Tensor:
    """A copy in which NaN is -inf and +inf the largest float."""
    return torch.nan_to_num(logits, nan=-torch.inf, neginf=-torch.inf)
