"""A decoder layer's parts with fewer operations and less kept for the backward pass.

Their numbers are the same bits as those of Transformers' own modules: RMSNorm gives the linear
layers what autocast would make of it, once instead of once for each; rotary positions keep nothing
but themselves; a gated MLP keeps two of its three wide activations.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import silu
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefloop.models.precision import product_dtype

Part = tuple[nn.Module, Callable[..., Any]]


def is_hooked(part: nn.Module) -> bool:
    """Somebody asks to see its calls (as sharding does), so it must be called."""
    return bool(part._forward_hooks or part._forward_pre_hooks)


def has_plain_weight(part: nn.Module) -> bool:
    """Its weight is a plain tensor: neither quantised nor sharded."""
    return type(part.weight) in (nn.Parameter, Tensor)


def norm_forward(norm: Any, x: Tensor) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467, equation 4) of x [..., D]."""
    if not has_plain_weight(norm):
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    args = (x, norm.weight, norm.variance_epsilon, product_dtype(x))
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


def mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [..., D]."""
    gate, up = projected(mlp, GATED, x)
    if not torch.is_grad_enabled():
        return mlp.down_proj(silu(gate).mul_(up))  # type: ignore[no-any-return]
    return mlp.down_proj(_Gated.apply(gate, up))  # type: ignore[no-any-return,no-untyped-call]


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


def attention_forward(
    part: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_plan: Any = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """Attention over a packed stream [1, T, D] whose heads turn with their positions."""
    if attention_plan is None:  # somebody uses the model as any of Transformers'
        own_forward = type(part).forward
        return own_forward(part, hidden_states, position_embeddings, **others)  # type: ignore[no-any-return]
    x = hidden_states[0]
    q, k, v = (y.unflatten(-1, (-1, part.head_dim)) for y in projected(part, HEADS, x))
    if hasattr(part, "q_norm"):
        q, k = part.q_norm(q), part.k_norm(k)
    cos, sin = (table[0].unsqueeze(1) for table in position_embeddings)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    heads = (y.transpose(0, 1) for y in (q, k, v))
    output = attention_plan.attend(part.layer_idx, *heads, part.scaling, _window(part))
    return part.o_proj(output.flatten(1)).unsqueeze(0), None


def _window(part: Any) -> int | None:
    """Of this layer, or of all layers."""
    holder = part if hasattr(part, "sliding_window") else part.config
    return getattr(holder, "sliding_window", None)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [T, N, D] by tables [T, 1, D] (arXiv 2104.09864, equation 34), in autocast's type."""
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin).to(product_dtype(x))
    return _Rotated.apply(x, cos, sin, product_dtype(x))  # type: ignore[no-untyped-call,no-any-return]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class _Rotated(torch.autograd.Function):
    """Keeps the tables, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        left, right = (grads[0] * sin).chunk(2, -1)
        by_x = (grads[0] * cos).add_(torch.cat((right, -left), -1))
        return by_x.to(ctx.dtype), None, None, None


def model_forward(model: Any, input_ids: Tensor, attention_plan: Any = None, **others: Any) -> Any:
    """A stack of layers of lean parts: without gradients with little between them.

    Queries and keys turn together, by a sine that bears the sign of the half it meets.
    """
    if attention_plan is None or torch.is_grad_enabled() or _any_hooked(model.layers):
        own_forward = type(model).forward
        return own_forward(model, input_ids, attention_plan=attention_plan, **others)
    x = model.embed_tokens(input_ids)
    cos, sin = (t[0].unsqueeze(1) for t in model.rotary_emb(x, others["position_ids"]))
    left, right = sin.chunk(2, -1)
    sin, x, dtype = torch.cat((-left, right), -1), x[0], product_dtype(x)
    for layer in model.layers:
        part = layer.self_attn
        heads = _together(part, HEADS, norm_forward(layer.input_layernorm, x))
        heads = heads.unflatten(-1, (-1, part.head_dim))  # [T, H + 2 G, D]
        groups = part.k_proj.out_features // part.head_dim
        both, v = heads[:, :-groups], heads[:, -groups:]
        if hasattr(part, "q_norm"):
            both = torch.cat((part.q_norm(both[:, :-groups]), part.k_norm(both[:, -groups:])), 1)
        left, right = both.chunk(2, -1)
        both = (both * cos + torch.cat((right, left), -1) * sin).to(dtype).transpose(0, 1)
        q, k, v = both[:-groups], both[-groups:], v.transpose(0, 1)
        args = (part.layer_idx, q, k, v, part.scaling, _window(part))
        x = x + part.o_proj(attention_plan.attend(*args).flatten(1))
        x = x + mlp_forward(layer.mlp, norm_forward(layer.post_attention_layernorm, x))
    return BaseModelOutputWithPast(last_hidden_state=model.norm(x).unsqueeze(0))


def _any_hooked(layers: nn.ModuleList) -> bool:
    """Whether a part that `model_forward` computes without calling it must be called."""
    each = layers._modules.values()
    parts = (part for layer in each for part in (layer, *layer._modules.values()))
    return any(map(is_hooked, parts))  # type: ignore[arg-type]


class Joined(NamedTuple):
    """Several linear layers of one input as one, for the time of a generation."""

    layer: Callable[[Tensor], Tensor]
    sizes: tuple[int, ...]


MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
GATED, HEADS = ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")


def projected(part: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """What the part's linear layers of these names make of x."""
    joined: Joined | None = vars(part).get("joined")
    if joined is not None:
        return torch.split(joined.layer(x), list(joined.sizes), -1)
    return tuple(getattr(part, name)(x) for name in names)


def _together(part: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """The same in one tensor."""
    joined: Joined | None = vars(part).get("joined")
    if joined is not None:
        return joined.layer(x)
    return torch.cat(projected(part, names, x), -1)


LEAN_NAMES: dict[Any, tuple[str, ...]] = {mlp_forward: GATED, attention_forward: HEADS}
"""Linear layers that read one input, by the forward that calls them."""


def lean_parts(hf: nn.Module) -> list[Part]:
    """Parts of decoder layers that look as if they had a lean forward, with it.

    Whether a model computes the same with them is for the caller to see: architectures differ.
    """
    found: list[Part] = []
    for layer in hf.modules():
        children = dict(layer.named_children())
        if not {"self_attn", "mlp"} <= children.keys():
            continue
        if set(GATED) <= children["mlp"]._modules.keys():
            found.append((children["mlp"], mlp_forward))
        if set(HEADS) <= children["self_attn"]._modules.keys():
            found.append((children["self_attn"], attention_forward))
        found += [(p, norm_forward) for p in children.values() if hasattr(p, "variance_epsilon")]
    return found


def lean_models(hf: nn.Module, parts: list[Part]) -> list[Part]:
    """Stacks of layers that look as if they were made of these parts alone."""
    lean = {part for part, _ in parts}
    return [
        (model, model_forward)
        for model in hf.modules()
        if model._modules.keys() == MODEL
        and all(layer._modules.keys() == LAYER for layer in model.layers)  # type: ignore[union-attr]
        and all(part in lean for layer in model.layers for part in layer.children())  # type: ignore[union-attr]
    ]


def make_lean(parts: list[Part]) -> None:
    """Lets the parts compute by their lean forwards."""
    for part, forward in parts:
        part.forward = MethodType(forward, part)


def make_plain(parts: list[Part]) -> None:
    """Lets the parts compute as their classes say."""
    for part, _ in parts:
        vars(part).pop("forward", None)
