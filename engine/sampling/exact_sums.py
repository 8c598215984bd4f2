"""Sums over the vocabulary that are exact, hence the same bits in any order, on any device, in any batch.

A float sum depends on the order of its additions, and libraries choose that order by shape. Here every weight is first
cut to a whole multiple of 2**-36 of the row's largest weight. Up to 2**17 such integers add up in float64 without any
rounding, so library reductions and scans of any order give identical results. The cut loses less than 2e-6 of the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_SCALE = 2.0**36
MAX_VOCAB_SIZE = 1 << 17
_CHUNK = 1024
_LOWEST = torch.finfo(torch.float32).min


def exact_weights(logits: Tensor, inverse_temperature: Tensor | None = None) -> Tensor:
    """exp((logits - max) / temperature) * 2**36, cut to integers: float32 [R, V], without NaN -> float32 [R, V].

    The largest weight of a row is exactly 2**36 (a row of only -inf gives zeros). inverse_temperature: float32 [R].
    """
    top = logits.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    shifted = logits - top
    if inverse_temperature is not None:
        shifted.mul_(inverse_temperature[:, None])
    return shifted.exp_().mul_(WEIGHT_SCALE).trunc_()


def chunked(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of [R, V]: whole chunks [R, V // 1024, 1024] and the rest [R, V % 1024]."""
    num_whole = x.shape[1] // _CHUNK
    return x[:, : num_whole * _CHUNK].view(x.shape[0], num_whole, _CHUNK), x[:, num_whole * _CHUNK :]


def gather_chunk(x: Tensor, chunk: Tensor) -> Tensor:
    """Row r's entries of chunk[r]: [R, V], int64 [R] -> [R, 1024]; past the end of the row its last entry repeats."""
    index = chunk[:, None] * _CHUNK + torch.arange(_CHUNK, device=x.device)
    return x.gather(1, index.clamp_(max=x.shape[1] - 1))


class RunningSums:
    """Running sums of whole-numbered weights along rows, none stored: first per chunk, then inside one chunk."""

    def __init__(self, weights: Tensor) -> None:
        """weights: float64 [R, V], integers from `exact_weights` in any order."""
        self._weights = weights
        whole, rest = chunked(weights)
        self._chunks = torch.cat((whole.sum(-1), rest.sum(-1, keepdim=True)), dim=1).cumsum(1)

    @property
    def total(self) -> Tensor:
        """The sum of each row: float64 [R]."""
        return self._chunks[:, -1]

    def upto(self, index: Tensor) -> Tensor:
        """The sum of entries 0..index, both included: int64 [R] -> float64 [R]."""
        chunk = (index // _CHUNK)[:, None]
        inside = gather_chunk(self._weights, chunk[:, 0]).cumsum(1)
        return (self._before(chunk) + inside.gather(1, (index % _CHUNK)[:, None]))[:, 0]

    def first_above(self, target: Tensor) -> Tensor:
        """Per row, the first index whose sum exceeds the target, else the last: float64 [R] -> int64 [R]."""
        target = target[:, None]
        chunk = torch.searchsorted(self._chunks, target, right=True).clamp_(max=self._chunks.shape[1] - 1)
        inside = gather_chunk(self._weights, chunk[:, 0]).cumsum(1)
        offset = torch.searchsorted(inside, target - self._before(chunk), right=True)
        return (chunk * _CHUNK + offset)[:, 0].clamp_(max=self._weights.shape[1] - 1)

    def _before(self, chunk: Tensor) -> Tensor:
        return torch.where(chunk > 0, self._chunks.gather(1, (chunk - 1).clamp_(min=0)), 0.0)


def first_argmax(x: Tensor) -> Tensor:
    """The lowest index of each row's largest entry: float32 [R, V] without NaN -> int64 [R]."""
    whole, rest = chunked(x)
    tops = [whole.amax(-1)] if whole.shape[1] else []
    if rest.shape[1]:
        tops.append(rest.amax(-1, keepdim=True))
    chunk = torch.cat(tops, dim=1).argmax(-1)
    return (chunk * _CHUNK + gather_chunk(x, chunk).argmax(-1)).clamp_(max=x.shape[1] - 1)
