"""Philox4x32-10, a counter-based generator, in plain int64 tensor operations.

Noise is a function of (seed, position, choice, purpose) only: it doesn't depend on the batch, the step or the worker,
so a request that moves, is preempted or is recomputed meets the same noise again.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10


class Purpose(IntEnum):
    """What a number is drawn for, so that two uses at one position are independent."""

    TOKEN = 0


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One 128-bit block per element: counter (4) and key (2) are int64 tensors that hold 32-bit words, broadcastable.

    Products of two words overflow int64; they wrap, so their bits are those of the unsigned product, and the mask after
    the arithmetic shift leaves its upper word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, position: Tensor, choice: Tensor, purpose: Purpose) -> Tensor:
    """float64 in [0, 1), 53 random bits per element. seed, position, choice: int64, of one shape, none negative.

    Key = the seed's two words; counter = (position, its upper word, choice, purpose).
    """
    counter = (position & _MASK, (position >> 32) & _MASK, choice & _MASK, torch.full_like(position, int(purpose)))
    word_0, word_1, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return ((word_0 << 21) | (word_1 >> 11)).to(torch.float64) * 2.0**-53
