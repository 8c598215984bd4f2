"""Log-probabilities of the sampled and the most likely tokens, from raw logits, in bits that no batch changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import MAX_LOGPROBS
from engine.sampling.exact_sums import WEIGHT_SCALE, exact_weights
from engine.scheduler.batch import TokenLogprobs

_LOW_WORD = 0xFFFFFFFF
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class DeviceLogprobs:
    """Logprobs of some rows of a batch, still on the device.

    `batch_index` and `num_top` are host tuples, one entry per row; chosen: float64 [N]; top_ids: int64 [N, K];
    top: float64 [N, K], best first.
    """

    batch_index: tuple[int, ...]
    num_top: tuple[int, ...]
    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        """Copy to the host (waits for the device): batch index -> logprobs."""
        chosen, top_ids, top = self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist()
        return {
            index: TokenLogprobs(logprob=chosen[i], top_ids=tuple(top_ids[i][:k]), top_logprobs=tuple(top[i][:k]))
            for i, (index, k) in enumerate(zip(self.batch_index, self.num_top, strict=True))
        }


def most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids of each row's `count` largest logits, best first, lower ids first among equals: [N, V] -> int64 [N, count].

    logits: float32. A token among the best `count` lies in one of the best `count` chunks, so only those are searched.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = vocab_size // _CHUNK
    tops = logits[:, : num_chunks * _CHUNK].view(num_rows, num_chunks, _CHUNK).amax(-1)
    rest = logits[:, num_chunks * _CHUNK :]
    if rest.shape[1]:
        tops = torch.cat((tops, rest.amax(-1, keepdim=True)), dim=1)
    chunks = _best(tops, min(count, tops.shape[1]), torch.arange(tops.shape[1], device=logits.device))
    candidates = (chunks[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=logits.device)).flatten(1)
    values = logits.gather(1, candidates.clamp(max=vocab_size - 1))
    # Candidates past the end of the vocabulary have higher ids than any real -inf, so they come last.
    values = torch.where(candidates < vocab_size, values, -torch.inf)
    return _best(values, count, candidates)


def _best(values: Tensor, count: int, ids: Tensor) -> Tensor:
    """The ids of the largest `count` values: float32 [N, C] with ids int64 [N, C] or [C] -> int64 [N, count].

    Ties are part of the sort key, because a library's choice among equals may depend on the shape.
    """
    bits = (values + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # signed integers in the order of the floats
    keys = (ordered.to(torch.int64) << 32) | (_LOW_WORD - ids)
    return _LOW_WORD - (keys.topk(count).values & _LOW_WORD)


def token_logprobs(raw_logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At temperature 1: the given tokens' logprobs, the most likely tokens' ids, and their logprobs. No host sync.

    float32 [N, V] without NaN, int64 [N] -> float64 [N], int64 [N, K], float64 [N, K], best first. K is always the
    same, so that the batch can't change what the library does.
    """
    top_logit = raw_logits.amax(-1).to(torch.float64)
    mass = exact_weights(raw_logits).to(torch.float64).sum(-1) / WEIGHT_SCALE
    normaliser = (top_logit + mass.log())[:, None]
    top_ids = most_likely(raw_logits, min(MAX_LOGPROBS, raw_logits.shape[1]))
    chosen = raw_logits.gather(1, token_ids[:, None]).to(torch.float64) - normaliser
    return chosen[:, 0], top_ids, raw_logits.gather(1, top_ids).to(torch.float64) - normaliser
