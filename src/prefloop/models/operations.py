"""Operations of a decoder's layer that keep little for the backward pass.

Each gives in forward direction the bits of what Transformers computes in several steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import silu

from prefloop.models.precision import product_dtype


def rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467, equation 4) of x [..., D].

    In autocast's type where it is on.
    """
    args = (x, weight, eps, product_dtype(x))
    if not torch.is_grad_enabled():
        return _normed(*args)[0]
    return _RMSNorm.apply(*args)  # type: ignore[no-untyped-call,no-any-return]


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * inverse).mul_(weight).to(dtype), inverse


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        output, inverse = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        normed = x * inverse
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(inverse), by_weight, None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, equation 6)."""
    if not torch.is_grad_enabled():
        return silu(gate).mul_(up)
    return _Gated.apply(gate, up)  # type: ignore[no-untyped-call,no-any-return]


class _Gated(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202, equation 6); keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        by_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return by_gate, silu(gate).mul_(grads[0])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [T, N, D] turned (arXiv 2104.09864, equation 34), in autocast's type."""
    return _Rotated.apply(x, cos, sin, product_dtype(x))  # type: ignore[no-untyped-call,no-any-return]


class _Rotated(torch.autograd.Function):
    """Keeps the tables, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        left, right = x.chunk(2, -1)
        return (x * cos + torch.cat((-right, left), -1) * sin).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        left, right = (grads[0] * sin).chunk(2, -1)
        by_x = (grads[0] * cos).add_(torch.cat((right, -left), -1))
        return by_x.to(ctx.dtype), None, None, None
