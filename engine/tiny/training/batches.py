"""From examples to tensors: tokens as serving has them, and micro-batches of sequences of about the same length.

A sequence is padded at its end only, so causal attention needs no mask: what counts never sees padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny.skills.example import Example
from engine.tiny.skills.rendering import segments
from engine.tiny.training.model import Packed

IGNORED = -100  # a target that is not looked at
_GROWTH = 1.3  # of length within a micro-batch, once it is worth a forward pass of its own
_WORTH_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A conversation as token ids. `trained[i]`: token i is the assistant's, to be predicted from those before it."""

    skill: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences of about the same length. `rows` int64 [L]: positions in `packed` that stand before a trained token.

    `targets` [L]: those tokens. `second_targets` [L]: the tokens after them, IGNORED where they are not trained.
    `owners` [L]: the number of the sequence.
    """

    packed: Packed
    rows: Tensor
    targets: Tensor
    second_targets: Tensor
    owners: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same, there."""
        packed = Packed(**{name: tensor.to(device) for name, tensor in vars(self.packed).items()})
        return MicroBatch(
            packed=packed,
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            second_targets=self.second_targets.to(device),
            owners=self.owners.to(device),
        )


def encode(example: Example, tokenizer: Tokenizer) -> Tokens:
    """Piece by piece, as serving does: first the prompt, then what is generated."""
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_answer in segments(example):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        trained += [is_answer] * len(piece)
    return Tokens(skill=example.skill, ids=tuple(ids), trained=tuple(trained))


def take(examples: Iterable[Example], tokenizer: Tokenizer, *, num_tokens: int, max_length: int) -> list[Tokens]:
    """Examples until there are `num_tokens` tokens; those that are too long are left out."""
    taken: list[Tokens] = []
    count = 0
    for example in examples:
        tokens = encode(example, tokenizer)
        if len(tokens.ids) > max_length:
            continue
        taken.append(tokens)
        count += len(tokens.ids)
        if count >= num_tokens:
            break
    return taken


def micro_batches(sequences: Sequence[Tokens], max_tokens: int) -> list[MicroBatch]:
    """All sequences, shortest first, in groups of at most `max_tokens` padded tokens (or a single longer sequence)."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].ids))
    groups: list[list[int]] = []
    for index in order:
        length = len(sequences[index].ids)
        if groups:
            shortest, size = len(sequences[groups[-1][0]].ids), len(groups[-1]) + 1
            grown = length > _GROWTH * shortest and shortest * size > _WORTH_TOKENS
            if length * size <= max_tokens and not grown:
                groups[-1].append(index)
                continue
        groups.append([index])
    return [_micro_batch([sequences[index] for index in group], group) for group in groups]


def _micro_batch(sequences: Sequence[Tokens], numbers: Sequence[int]) -> MicroBatch:
    length = max(len(sequence.ids) for sequence in sequences)
    rows, targets, second, owners = [], [], [], []
    tokens: list[int] = []
    positions: list[int] = []
    place: list[int] = []
    fill = torch.zeros(len(sequences), length, dtype=torch.int64)
    for index, (sequence, number) in enumerate(zip(sequences, numbers, strict=True)):
        ids, size, start = sequence.ids, len(sequence.ids), len(tokens)
        fill[index, :size] = torch.arange(start, start + size)
        place += range(index * length, index * length + size)
        positions += range(size)
        tokens += ids
        for position in range(size - 1):
            if sequence.trained[position + 1]:
                rows.append(start + position)
                targets.append(ids[position + 1])
                known = position + 2 < size and sequence.trained[position + 2]
                second.append(ids[position + 2] if known else IGNORED)
                owners.append(number)
    packed = Packed(
        tokens=torch.tensor(tokens), positions=torch.tensor(positions), fill=fill, place=torch.tensor(place)
    )
    return MicroBatch(
        packed=packed,
        rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        second_targets=torch.tensor(second),
        owners=torch.tensor(owners),
    )
