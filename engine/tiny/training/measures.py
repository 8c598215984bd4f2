"""Measured on questions: answers right under greedy decoding, load of the experts, agreement of the MTP block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny.skills.example import Example
from engine.tiny.training.batches import IGNORED, Tokens, encode, micro_batches
from engine.tiny.training.export import read_checkpoint
from engine.tiny.training.model import TinyErnie

_MAX_TOKENS = 4096  # of a forward pass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`correct`: per sequence. `counts` int64 [MoE layers, experts]. `agreement`: of the MTP block, in [0, 1]."""

    correct: tuple[bool, ...]
    counts: Tensor
    agreement: float


@torch.no_grad()
def measure(model: TinyErnie, sequences: Sequence[Tokens]) -> Measured:
    """One pass over whole conversations.

    Greedy decoding writes exactly the known answer if and only if each of its tokens is the likeliest one after those
    before it, so no token needs to be generated. Agreement: at every position of an answer whose second next token is
    of the answer too, does the MTP block foretell what the model itself finds likeliest there?
    """
    correct = [True] * len(sequences)
    counts = torch.zeros((), dtype=torch.int64)
    agreed = total = 0
    device = model.embed_tokens.weight.device
    for batch in micro_batches(sequences, _MAX_TOKENS):
        batch = batch.to(device)
        predictions = model(batch.packed, batch.rows)
        chosen, second = predictions.next.argmax(-1), predictions.second.argmax(-1)
        for number in batch.owners[chosen != batch.targets].tolist():
            correct[number] = False
        # Row i + 1 is the position after row i wherever the second next token is trained.
        known = (batch.second_targets != IGNORED).nonzero().squeeze(1)
        agreed += int((second[known] == chosen[known + 1]).sum())
        total += known.numel()
        counts = counts + torch.stack(predictions.loads.counts).cpu()
    return Measured(correct=tuple(correct), counts=counts, agreement=agreed / max(total, 1))


def accuracy_by_skill(sequences: Sequence[Tokens], correct: Sequence[bool]) -> dict[str, float]:
    """Share of right conversations, in [0, 1], by skill."""
    results: dict[str, list[bool]] = defaultdict(list)
    for sequence, right in zip(sequences, correct, strict=True):
        results[sequence.skill].append(right)
    return {skill: sum(right) / len(right) for skill, right in sorted(results.items())}


def expert_histogram(path: Path, examples: Iterable[Example]) -> list[list[float]]:
    """Share of the (token, expert) choices that each expert of the checkpoint at `path` took: [MoE layers][experts].

    1 / experts is the fair share.
    """
    counts = _measured(path, examples).counts.double()
    shares: list[list[float]] = (counts / counts.sum(1, keepdim=True)).tolist()
    return shares


def mtp_agreement(path: Path, examples: Iterable[Example]) -> float:
    """How often the MTP block of the checkpoint at `path` foretells the model's own second next token, in [0, 1]."""
    return _measured(path, examples).agreement


def _measured(path: Path, examples: Iterable[Example]) -> Measured:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return measure(read_checkpoint(path), [encode(example, tokenizer) for example in examples])
