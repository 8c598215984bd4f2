"""Muon's orthogonalisation, and that both kinds of parameters go downhill and come back from a stored state."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from engine.tiny.training.optimizer import Optimizer, orthogonalized


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 20)
    u, values, v = torch.linalg.svd(orthogonalized(x), full_matrices=False)
    assert 0.5 < values.min() and values.max() < 1.3
    turned = torch.linalg.svd(x, full_matrices=False)
    assert torch.einsum("nij,nij->n", u @ v, turned[0] @ turned[2]).min() > 0.97 * 12


class Pair(nn.Module):
    """One parameter for each half of the optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Parameter(torch.randn(8, 4))
        self.stacked = nn.Parameter(torch.randn(2, 4, 8))
        self.norm = nn.Parameter(torch.randn(4))

    def loss(self) -> Tensor:
        return self.tall.square().sum() + self.stacked.square().sum() + self.norm.square().sum()


def stepped(model: Pair, optimizer: Optimizer, steps: range) -> float:
    loss = torch.tensor(0.0)
    with ThreadPoolExecutor(1) as pool:
        for step in steps:
            model.zero_grad()
            loss = model.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(1.0, step, pool)
    return loss.item()


def made() -> tuple[Pair, Optimizer]:
    torch.manual_seed(1)
    model = Pair()
    return model, Optimizer(model, matrix_rate=0.05, other_rate=0.05, weight_decay=0.0)


def test_a_stored_state_goes_on_as_if_nothing_had_been() -> None:
    model, optimizer = made()
    first = model.loss().item()
    whole = stepped(model, optimizer, range(20))
    assert whole < 0.5 * first
    model, optimizer = made()
    stepped(model, optimizer, range(9))
    again, fresh = made()
    again.load_state_dict(model.state_dict())
    fresh.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    assert stepped(again, fresh, range(9, 20)) == whole
