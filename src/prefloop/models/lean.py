"""Norms and gated MLPs that keep less for the backward pass than Transformers' own modules.

Their numbers are the same bits: RMSNorm gives the linear layers what autocast would make of it,
once instead of once for each, and a gated MLP keeps two of its three wide activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import silu

MLP = ("gate", "up", "down")


class LeanRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467, equation 4), in autocast's type."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
        return output


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0].to(x.dtype)
        normed = x * inverse
        by_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(inverse), by_weight, None, None


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
        grad = grads[0]
        by_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return by_gate, silu(gate).mul_(grad)


class LeanMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gated: Tensor = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        return self.down_proj(gated)  # type: ignore[no-any-return]


def lean_parts(hf: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """What may stand for a decoder layer's norms and MLP: (layer, name, part of the same weights).

    Whether a model computes the same with them is for the caller to see: architectures differ.
    """
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in hf.modules():
        if not (hasattr(layer, "self_attn") and hasattr(layer, "mlp")):
            continue
        for name, part in layer.named_children():
            if type(part).__name__.endswith("RMSNorm"):
                eps: Any = getattr(part, "variance_epsilon", getattr(part, "eps", 0.0))
                found.append((layer, name, LeanRMSNorm(part.weight, eps)))  # type: ignore[arg-type]
        linear: list[Any] = [getattr(layer.mlp, f"{name}_proj", None) for name in MLP]
        if all(linear) and len(list(layer.mlp.parameters())) == sum(  # type: ignore[union-attr]
            len(list(part.parameters())) for part in linear
        ):
            found.append((layer, "mlp", LeanMLP(*linear)))
    return found


def swap(parts: list[tuple[nn.Module, str, nn.Module]]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Puts parts in their places; returns those that stood there."""
    before = [(layer, name, getattr(layer, name)) for layer, name, _ in parts]
    for layer, name, part in parts:
        setattr(layer, name, part)
    return before
