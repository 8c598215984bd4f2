"""What one forward pass is told besides its weights. Passed along explicitly; nothing global.

tokens of a step:  [ decode tokens, one per row | chunk | chunk | ... | padding up to a multiple of 16 rows ]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Rows with one query token each, whose keys are padded to the same length; one attention call.

    `token_index` int64 [R], places in the step; `gather_rows` int64 [2, R, kv heads, blocks], see KVCache;
    `mask` [R, 1, 1, keys] in the engine's dtype: 0 where the row may look, -inf elsewhere.
    """

    token_index: Tensor
    gather_rows: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Consecutive query tokens [start, start + length) of the step, all of one request.

    `gather_rows` int64 [2, 1, kv heads, blocks] covers every key up to the last query token, padded.
    """

    start: int
    length: int
    gather_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class GatheredKeys:
    """For attention that copies keys together first.

    `write_rows` int64 [2, T, kv heads]: where K and V of layer 0 go, see KVCache.
    """

    write_rows: Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]


@dataclass(frozen=True, kw_only=True)
class PagedKeys:
    """For attention that reads keys where they lie.

    `block_tables` int32 [rows, n]. `segments` int32 [S, 4]: each is a run of tokens of one request, told as row of its
    table, first token in the step, number of tokens, position of the first. Every token is in one segment.
    """

    block_tables: Tensor
    segments: Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardStep:
    """T includes the padding. Padded tokens write to the null block, are routed to no expert, and stay finite.

    token_ids int64 [T]; positions int64 [3, T] (time, height, width; text reads row 0); valid bool [T].
    """

    token_ids: Tensor
    positions: Tensor
    valid: Tensor
    keys: GatheredKeys | PagedKeys
