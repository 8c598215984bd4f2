"""Per-row state that stays on the device, and the inputs of each step made from it.

    token_table   int32 [rows + 1, max_model_len + 1]   known tokens, and sampled ones at their position
    block_tables  int32 [rows + 1, blocks]              0, the null block, where a row owns none

The last row is the padding's: token 0 at position 0, written to the null block. A batch brings deltas only; one copy
per step takes the host's numbers to the device, everything else is made there, so nothing waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.forward_context import DecodeGroup, ForwardStep, GatheredKeys, PagedKeys, PrefillChunk
from engine.kv.kv_cache import KVCache
from engine.layers.options import LayerOptions, round_up
from engine.scheduler.batch import IntArray, NewBlocks, RowStart, ScheduledBatch

# Rows x padded keys of one decode call: bounds the copy of their KV.
_MAX_KEYS_PER_CALL = 1 << 19


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """A step on the device, and its S rows that sample.

    `sample_index` int64 [S padded]: places of their last query tokens. `sample_rows` int32 [S] on the host;
    `sample_slots` and `sample_positions` int64 [S]: row and position of each new token in the token table.
    """

    forward: ForwardStep
    sample_index: Tensor
    sample_rows: IntArray
    sample_slots: Tensor
    sample_positions: Tensor


class InputBatch:
    """Rows [0, num_rows) for requests and served calls."""

    def __init__(self, *, num_rows: int, max_model_len: int, kv: KVCache, options: LayerOptions) -> None:
        self._kv = kv
        self._options = options
        self._block_size = kv.layout.block_size
        self._padding_row = num_rows
        device = options.device
        self._paged = options.kernels is not None
        # Whole blocks, and whole key tiles where keys are gathered.
        self._key_multiple = self._block_size if self._paged else math.lcm(options.key_multiple, self._block_size)
        num_blocks = round_up(max_model_len, self._key_multiple) // self._block_size
        # One column more than the model's length: an overshot step may sample a token that nobody will run.
        self.token_table = torch.zeros(num_rows + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_rows + 1, num_blocks, dtype=torch.int32, device=device)

    def prepare(self, batch: ScheduledBatch) -> StepInputs:
        """Apply the deltas of `batch` and make its inputs."""
        for start in batch.starts:
            self._start_row(start)
        if batch.new_blocks:
            num_computed = dict(zip(batch.rows.tolist(), batch.num_computed.tolist(), strict=True))
            self._append_blocks(batch.new_blocks, num_computed)
        return self._inputs(batch)

    def store_sampled(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Put sampled tokens (int64 [S]) where the next step reads them."""
        self.token_table[inputs.sample_slots, inputs.sample_positions] = token_ids.to(torch.int32)

    def _start_row(self, start: RowStart) -> None:
        tokens = self._upload(start.token_ids.astype(np.int64))
        self.token_table[start.row, : len(tokens)] = tokens.to(torch.int32)
        self.block_tables[start.row].zero_()

    def _append_blocks(self, new_blocks: tuple[NewBlocks, ...], num_computed: dict[int, int]) -> None:
        rows, columns, ids, fresh = [], [], [], []
        for new in new_blocks:
            count = len(new.block_ids)
            rows.append(np.full(count, new.row))
            columns.append(np.arange(new.first, new.first + count))
            ids.append(new.block_ids.astype(np.int64))
            # Blocks without computed tokens, and the rest of one that has some, may hold an earlier owner's KV.
            full, rest = divmod(num_computed[new.row], self._block_size)
            first_empty = max(full + (rest > 0) - new.first, 0)
            fresh.append(new.block_ids[first_empty:].astype(np.int64))
            if not self._paged and rest and new.first <= full < new.first + count:
                self._kv.clear_tail(int(new.block_ids[full - new.first]), rest)
        numbers = self._upload(np.concatenate([*rows, *columns, *ids, *fresh]))
        device_rows, device_columns, device_ids = numbers[: 3 * sum(map(len, ids))].view(3, -1)
        self.block_tables[device_rows, device_columns] = device_ids.to(torch.int32)
        if self._paged:
            return  # reads no key that the row has not written
        device_fresh = numbers[3 * sum(map(len, ids)) :]
        if len(device_fresh):
            self._kv.clear(device_fresh)

    def _inputs(self, batch: ScheduledBatch) -> StepInputs:
        """One upload of everything the host knows, cut into the step's tensors."""
        query_lens, num_computed = batch.query_lens, batch.num_computed
        num_tokens = batch.num_tokens
        num_padded = self._options.padded_rows(num_tokens)
        ends = query_lens.cumsum()
        token_rows = np.full(num_padded, self._padding_row)
        token_rows[:num_tokens] = batch.rows.repeat(query_lens)
        positions = np.zeros(num_padded, dtype=np.int64)
        positions[:num_tokens] = np.arange(num_tokens) - (ends - query_lens - num_computed).repeat(query_lens)
        sampled = np.flatnonzero(batch.samples)
        sample_index = np.zeros(self._options.padded_rows(len(sampled)), dtype=np.int64)
        sample_index[: len(sampled)] = ends[sampled] - 1
        sample_positions = (num_computed + query_lens)[sampled]
        groups = [] if self._paged else self._decode_groups(num_computed[: batch.num_decode_rows] + 1)
        parts = [token_rows, positions, sample_index, batch.rows[sampled], sample_positions, batch.rows, *groups]
        sizes = [len(part) for part in parts]
        numbers = self._upload(np.concatenate(parts).astype(np.int64))
        d_token_rows, d_positions, d_sample_index, d_slots, d_sample_positions, d_rows, *d_groups = torch.split(
            numbers, sizes
        )
        forward = ForwardStep(
            token_ids=self.token_table[d_token_rows, d_positions].to(torch.int64),
            positions=d_positions.expand(3, -1),
            valid=d_token_rows != self._padding_row,
            keys=self._paged_keys(batch, ends)
            if self._paged
            else self._gathered_keys(
                batch, ends, d_token_rows, d_positions, d_rows, list(zip(d_groups, groups, strict=True))
            ),
        )
        return StepInputs(
            forward=forward,
            sample_index=d_sample_index,
            sample_rows=batch.rows[sampled],
            sample_slots=d_slots,
            sample_positions=d_sample_positions,
        )

    def _paged_keys(self, batch: ScheduledBatch, ends: IntArray) -> PagedKeys:
        first_tokens = ends - batch.query_lens
        segments = np.stack([batch.rows, first_tokens, batch.query_lens, batch.num_computed], axis=1)
        return PagedKeys(block_tables=self.block_tables, segments=torch.from_numpy(segments.astype(np.int32)))

    def _gathered_keys(
        self,
        batch: ScheduledBatch,
        ends: IntArray,
        token_rows: Tensor,
        positions: Tensor,
        rows: Tensor,
        groups: list[tuple[Tensor, npt.NDArray[np.intp]]],
    ) -> GatheredKeys:
        """`groups`: indices of decode rows, on the device and on the host."""
        blocks = self.block_tables[token_rows, positions // self._block_size].to(torch.int64)
        last_keys = batch.num_computed[: batch.num_decode_rows]
        return GatheredKeys(
            write_rows=self._kv.write_rows(blocks, positions % self._block_size),
            decode=tuple(
                self._decode_group(index, rows, positions, int(last_keys[host].max()) + 1) for index, host in groups
            ),
            prefill=self._chunks(batch, ends, rows),
        )

    def _decode_groups(self, num_keys: IntArray) -> list[npt.NDArray[np.intp]]:
        """Indices of decode rows by padded length, a power of two of tiles: at most twice the keys are gathered."""
        if not len(num_keys):
            return []
        tiles = -(-num_keys // self._key_multiple)
        bucket = np.ceil(np.log2(tiles)).astype(np.int32)
        groups = []
        for one in np.unique(bucket):
            index = np.flatnonzero(bucket == one)
            at_once = max(_MAX_KEYS_PER_CALL // (self._key_multiple << int(one)), 1)
            groups += [index[first : first + at_once] for first in range(0, len(index), at_once)]
        return groups

    def _decode_group(self, index: Tensor, rows: Tensor, positions: Tensor, num_keys: int) -> DecodeGroup:
        tables = self._tables(rows[index], num_keys)
        keys = torch.arange(tables.shape[1] * self._block_size, device=index.device)
        mask = torch.zeros(len(index), len(keys), dtype=self._options.dtype, device=index.device)
        # Decode tokens come first in a step, one per row: a row's index is its token's.
        mask.masked_fill_(keys[None, :] > positions[index][:, None], float("-inf"))
        return DecodeGroup(token_index=index, gather_rows=self._kv.gather_rows(tables), mask=mask[:, None, None])

    def _chunks(self, batch: ScheduledBatch, ends: IntArray, rows: Tensor) -> tuple[PrefillChunk, ...]:
        chunks = []
        for i in range(batch.num_decode_rows, len(batch.rows)):
            length = int(batch.query_lens[i])
            tables = self._tables(rows[i : i + 1], int(batch.num_computed[i]) + length)
            gather_rows = self._kv.gather_rows(tables)
            chunks.append(PrefillChunk(start=int(ends[i]) - length, length=length, gather_rows=gather_rows))
        return tuple(chunks)

    def _tables(self, rows: Tensor, num_keys: int) -> Tensor:
        """Block tables [R, n] that cover `num_keys` and their padding."""
        return self.block_tables[rows, : round_up(num_keys, self._key_multiple) // self._block_size]

    def _upload(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """To the device without waiting: through pinned memory, which torch keeps until the copy is done."""
        host = torch.from_numpy(numbers)
        if self._options.device.type == "cuda":
            return host.pin_memory().to(self._options.device, non_blocking=True)
        return host
