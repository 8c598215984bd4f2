"""The optimiser: Muon for matrices, AdamW for the embedding, norms and router gates.

Muon (Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised by a
Newton-Schulz iteration. AdamW: Loshchilov and Hutter, 2017, arXiv 1711.05101.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Executor

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- aX + (b XX' + c (XX')^2) X, from the same page
_NEWTON_SCHULZ_STEPS = 5
_MATRICES_AT_ONCE = 24
_MOMENTUM = 0.95
_BETAS = (0.9, 0.95)
_ADAM_EPS = 1e-10
_ADAM_NAMES = ("embed_tokens", "norm", "mlp.gate.weight")


class Optimizer:
    """Steps all parameters of a model. Its state is a flat dictionary of tensors, so it is stored like weights."""

    def __init__(self, model: nn.Module, *, matrix_rate: float, other_rate: float, weight_decay: float) -> None:
        """`matrix_rate` and `other_rate`: learning rates at scale 1."""
        self._matrix_rate, self._other_rate, self._weight_decay = matrix_rate, other_rate, weight_decay
        self._parameters = dict(model.named_parameters())
        self._matrices: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._others: list[str] = []
        self._state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if any(part in name for part in _ADAM_NAMES):
                self._others.append(name)
                self._state[f"first.{name}"] = torch.zeros_like(parameter)
                self._state[f"second.{name}"] = torch.zeros_like(parameter)
            else:
                rows, columns = parameter.shape[-2:]
                self._matrices[min(rows, columns), max(rows, columns)].append(name)
                self._state[f"momentum.{name}"] = torch.zeros_like(parameter)

    def state(self) -> dict[str, Tensor]:
        """Its tensors, by name; not copies."""
        return self._state

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError for a tensor that is missing."""
        for name, tensor in self._state.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def step(self, scale: float, step: int, pool: Executor) -> None:
        """One update with the gradients that lie at the parameters; `step` counts from 0. `pool` shares the work."""
        for shape, names in self._matrices.items():
            self._step_matrices(shape, names, self._matrix_rate * scale, pool)
        for name in self._others:
            self._step_other(name, self._other_rate * scale, step + 1)

    def _step_matrices(self, shape: tuple[int, int], names: list[str], rate: float, pool: Executor) -> None:
        """All matrices of one shape (and its transpose) at once."""
        updates = []
        for name in names:
            gradient, momentum = self._gradient(name), self._state[f"momentum.{name}"]
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = gradient.lerp(momentum, _MOMENTUM)
            updates.append((update.mT if update.shape[-2] > update.shape[-1] else update).reshape(-1, *shape))
        done = torch.cat(list(pool.map(orthogonalized, torch.split(torch.cat(updates), _MATRICES_AT_ONCE))))
        for name, part in zip(names, torch.split(done, [len(update) for update in updates]), strict=True):
            parameter = self._parameters[name]
            rows, columns = parameter.shape[-2:]
            turned = (part.mT if rows > columns else part).reshape(parameter.shape)
            parameter.mul_(1 - rate * self._weight_decay)
            parameter.add_(turned, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _step_other(self, name: str, rate: float, count: int) -> None:
        gradient, parameter = self._gradient(name), self._parameters[name]
        first, second = self._state[f"first.{name}"], self._state[f"second.{name}"]
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        spread = (second / (1 - _BETAS[1] ** count)).sqrt_().add_(_ADAM_EPS)
        parameter.addcdiv_(first, spread, value=-rate / (1 - _BETAS[0] ** count))

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None, f"every parameter takes part in the loss, {name} does not"
        return gradient


@torch.no_grad()
def orthogonalized(matrices: Tensor) -> Tensor:
    """[N, rows <= columns, columns]: singular values brought near 1, singular vectors kept."""
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
