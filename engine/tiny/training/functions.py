"""Differentiable pieces of the model with backward passes of their own: autograd's copy more and are slower on CPU.

T tokens, K top-k, P = T * K (token, expert) pairs, D model, E experts, F hidden, H head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import silu


class _Normalize(torch.autograd.Function):
    """x / rms(x) over the last dimension; the norm's weight is folded into the linear that follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y: Tensor = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        dot = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(y.shape[-1])
        return torch.addcmul(grad, y, dot, value=-1).mul_(scale), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up for [T, 2F] with gate first."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _swiglu_backward(ctx.saved_tensors[0], grad)


def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, -1)
    torch.mul(grad, silu(gate), out=grad_up)
    torch.mul(torch.ops.aten.silu_backward(grad, gate), up, out=grad_gate)
    return out


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [P, D] in the order of the experts; back, the K gradients of a token are gathered and added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, inverse_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_P)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_P // top_k)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_P,) = ctx.saved_tensors
        return grad_PD.index_select(0, inverse_P).view(-1, ctx.top_k, grad_PD.shape[1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; back by the inverse."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_P)
        return x_PD.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        return grad_PD.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """Rows `place` of a table; back, slots of padding get nothing."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        ctx.size = len(table)
        return table.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.size, *grad.shape[1:])
        out[ctx.saved_tensors[0]] = grad
        return out, None


class _GroupedMLP(torch.autograd.Function):
    """down_e(silu(gate_e(x)) * up_e(x)) where rows starts[e]:starts[e+1] belong to expert e."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, starts: list[int]) -> Tensor:
        gate_up_PF = x_PD.new_empty(x_PD.shape[0], gate_up_EFD.shape[1])
        for e, (start, end) in enumerate(pairwise(starts)):
            torch.mm(x_PD[start:end], gate_up_EFD[e].mT, out=gate_up_PF[start:end])
        gate, up = gate_up_PF.chunk(2, -1)
        hidden_PF = silu(gate).mul_(up)
        y_PD = torch.empty_like(x_PD)
        for e, (start, end) in enumerate(pairwise(starts)):
            torch.mm(hidden_PF[start:end], down_EDF[e].mT, out=y_PD[start:end])
        ctx.save_for_backward(x_PD, gate_up_EFD, down_EDF, gate_up_PF, hidden_PF)
        ctx.starts = starts
        return y_PD

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_PD, gate_up_EFD, down_EDF, gate_up_PF, hidden_PF = ctx.saved_tensors
        spans = list(enumerate(pairwise(ctx.starts)))
        grad_down, grad_gate_up = torch.empty_like(down_EDF), torch.empty_like(gate_up_EFD)
        grad_hidden_PF = torch.empty_like(hidden_PF)
        for e, (start, end) in spans:
            torch.mm(grad_PD[start:end], down_EDF[e], out=grad_hidden_PF[start:end])
            torch.mm(grad_PD[start:end].mT, hidden_PF[start:end], out=grad_down[e])
        grad_gate_up_PF = _swiglu_backward(gate_up_PF, grad_hidden_PF)
        grad_x_PD = torch.empty_like(x_PD)
        for e, (start, end) in spans:
            torch.mm(grad_gate_up_PF[start:end], gate_up_EFD[e], out=grad_x_PD[start:end])
            torch.mm(grad_gate_up_PF[start:end].mT, x_PD[start:end], out=grad_gate_up[e])
        return grad_x_PD, grad_gate_up, grad_down, None


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    return cast(Tensor, _Normalize.apply(x, eps))  # type: ignore[no-untyped-call]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F] of [..., 2F]."""
    return cast(Tensor, _SwiGLU.apply(gate_up))  # type: ignore[no-untyped-call]


def mixture(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """(weighted sum of each token's experts [T, D], how many tokens each expert took int64 [E])."""
    num_tokens, top_k = ids_TK.shape
    flat_P = ids_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    counts_E = torch.bincount(flat_P, minlength=gate_up_EFD.shape[0])
    starts = [0, *counts_E.cumsum(0).tolist()]
    x_PD = cast(Tensor, _Dispatch.apply(x_TD, order_P, inverse_P, top_k))  # type: ignore[no-untyped-call]
    y_PD = cast(Tensor, _GroupedMLP.apply(x_PD, gate_up_EFD, down_EDF, starts))  # type: ignore[no-untyped-call]
    y_PD = cast(Tensor, _Permute.apply(y_PD, inverse_P, order_P))  # type: ignore[no-untyped-call]
    return torch.bmm(weights_TK.unsqueeze(1), y_PD.view(num_tokens, top_k, -1)).squeeze(1), counts_E


def padded(x_T: Tensor, fill_BS: Tensor, place_T: Tensor) -> Tensor:
    """[T, ...] laid out as [B, S, ...]: slot (b, s) holds row fill[b, s], and row t stands in slot place[t].

    Slots of padding hold any row; gradients of them are dropped, for nobody looks at what they give.
    """
    table = cast(Tensor, _Permute.apply(x_T, fill_BS.view(-1), place_T))  # type: ignore[no-untyped-call]
    return table.view(*fill_BS.shape, *x_T.shape[1:])


def unpadded(table: Tensor, place_T: Tensor) -> Tensor:
    """The rows of [B, S, ...] that are tokens, [T, ...]."""
    return cast(Tensor, _Unpad.apply(table.flatten(0, 1), place_T))  # type: ignore[no-untyped-call]


def rotate(x_TNH: Tensor, turns_TH: Tensor) -> Tensor:
    """Rotary positions, interleaved pairs (2i, 2i + 1), as complex numbers: turns [T, H / 2] = exp(i * angle)."""
    pairs = torch.view_as_complex(x_TNH.reshape(*x_TNH.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns_TH[:, None]).flatten(-2)
