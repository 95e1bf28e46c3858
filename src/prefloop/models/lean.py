"""A decoder's layers with fewer operations and less kept for the backward pass.

Their numbers are the same bits as those of Transformers' own modules: RMSNorm gives the linear
layers what autocast would make of it, once instead of once for each; rotary positions keep nothing
but themselves; a gated MLP keeps two of its three wide activations. Without gradients queries and
keys turn together.

`Lean` says what of a model this suits. `forward_of` gives what computes hidden states, for one
forward pass or one generation: a `Stack`, which reads the modules' weights, or where one of those
modules must be called, Transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefloop.models.attention.plan import AttentionPlan
from prefloop.models.low_rank import LowRank, low_rank, summed
from prefloop.models.memory import RECOMPUTED
from prefloop.models.operations import gated, rms_norm, rotated
from prefloop.models.precision import product_dtype
from prefloop.models.trunk import Trunk

Linear = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor, Tensor, AttentionPlan], Tensor]
"""Token ids [T], positions [T] and the plan of their attention -> last hidden states [T, D]."""

MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
HEADS, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
AFTER = {HEADS: "o_proj", GATED: "down_proj"}


@dataclass(frozen=True)
class Lean:
    """What of a model's layers is computed here; the rest is called.

    It holds no part of a model, and so goes for copies of it, for the model with adapters, and for
    models that share its layers.
    """

    mlp: bool = True
    norms: bool = True  # also those before attention and MLPs that are called
    recompute: bool = False  # a layer's activations, in the backward pass


class Group(NamedTuple):
    """The linear layers of an attention or MLP by their names."""

    part: nn.Module
    together: tuple[str, ...]  # those that read its input
    after: str


class Joined(NamedTuple):
    """Several linear layers of one input as one."""

    layer: Linear
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Linears:
    """What multiplies in place of linear layers, for as long as their weights stand still."""

    single: Mapping[nn.Module, Linear] = field(default_factory=dict)
    joined: Mapping[nn.Module, Joined] = field(default_factory=dict)  # by the part they are of

    def of(self, layer: nn.Module) -> Linear:
        """What computes this layer: it itself where nothing stands for it."""
        return self.single[layer] if layer in self.single else _one_product(layer)


def forward_of(
    model: Any,
    lean: Lean | None,
    linears: Linears | None = None,
    again: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Forward:
    """What computes the model (a Transformers model without its head) as it stands now.

    Within `again()` layers are recomputed, for which the model may stand otherwise by then.
    """
    if lean is None or any(map(must_be_called, _passed_over(model, lean))):
        return partial(_by_transformers, model)
    return Stack(model, lean, linears or Linears(), again)


def must_be_called(part: nn.Module) -> bool:
    """Whether its calls are seen by somebody, as by sharding, or its forward is another's."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    return any(hooks) or bool(part._backward_pre_hooks) or "forward" in vars(part)


def has_plain_weight(part: nn.Module) -> bool:
    """Its weight is a plain tensor: neither quantised nor sharded."""
    return type(part.weight) in (nn.Parameter, Tensor)


def is_plain(part: nn.Module) -> bool:
    """A linear layer that is neither quantised nor sharded."""
    return type(part) is nn.Linear and has_plain_weight(part)


def plain_low_rank(layer: nn.Module) -> LowRank | None:
    """What a layer with LoRA computes, where all parts of it are plain and none must be called."""
    adapted = low_rank(layer)
    if adapted is None:
        return None
    parts = [adapted.base, *adapted.halves]
    ours = all(map(is_plain, parts)) and not any(map(must_be_called, [layer, *parts]))
    return adapted if ours else None


def _one_product(layer: nn.Module) -> Linear:
    """A plain linear layer with its adapters; any other layer itself."""
    adapted = plain_low_rank(layer)
    return summed(layer, adapted) if adapted is not None and adapted.halves else layer


def _by_transformers(
    model: Any, input_ids: Tensor, positions: Tensor, plan: AttentionPlan
) -> Tensor:
    """See Forward."""
    output = model(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_plan=plan,
        use_cache=False,
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def looks_lean(model: nn.Module) -> bool:
    """Whether it has the parts of a stack; what it does with them is for the caller to see."""
    if model._modules.keys() != MODEL:
        return False
    layers: Any = model.layers
    return all(
        name in LAYER or isinstance(part, nn.Dropout | nn.Identity)
        for layer in layers
        for name, part in layer._modules.items()
    ) and all(layer._modules.keys() >= LAYER for layer in layers)


def _passed_over(model: Any, lean: Lean) -> Iterator[nn.Module]:
    """The modules that a Stack computes without calling them."""
    yield model
    for layer in model.layers:
        yield layer
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (p for p in (layer.self_attn, layer.mlp) if _names(p, lean))


def _names(part: nn.Module, lean: Lean) -> tuple[str, ...]:
    """The linear layers that read one input, in an attention or MLP that is computed here."""
    if set(HEADS) <= part._modules.keys():
        return HEADS
    return GATED if lean.mlp and set(GATED) <= part._modules.keys() else ()


class Tables(NamedTuple):
    """How far heads turn at each token."""

    cos: Tensor  # [T, 1, D]
    sin: Tensor
    signed: Tensor  # sin with the sign of the half that it meets
    whole: tuple[Tensor, Tensor]  # [1, T, D], as Transformers gives them


class Stack:
    """A decoder's layers, ready to run; see Forward."""

    def __init__(
        self,
        model: Any,
        lean: Lean,
        linears: Linears,
        again: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.embed, self.rotary, self.norm = model.embed_tokens, model.rotary_emb, model.norm
        self.scale = getattr(model, "embedding_multiplier", None)  # Granite
        self.recompute, self.again = lean.recompute, again
        self.layers = [_layer(layer, lean, linears) for layer in model.layers]
        self.groups = [
            Group(part, names, AFTER[names])
            for layer in model.layers
            for part in (layer.self_attn, layer.mlp)
            if (names := _names(part, lean))
        ]

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        plan: AttentionPlan,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """See Forward. What the trunk's layers give is taken from it, or else left in it."""
        known = trunk.states if trunk is not None else None
        x = self._embedded(input_ids) if known is None else known
        whole = self.rotary(x, positions.unsqueeze(0))
        cos, sin = (table[0].unsqueeze(1) for table in whole)
        left, right = sin.chunk(2, -1)
        tables = Tables(cos, sin, torch.cat((-left, right), -1), whole)
        recompute = self.recompute and torch.is_grad_enabled()
        first = trunk.layers if trunk is not None and known is not None else 0
        for number, layer in enumerate(self.layers[first:], first):
            if trunk is not None and number == trunk.layers:
                trunk.states = x
            if recompute:
                x = checkpoint(layer, x, tables, plan, **RECOMPUTED, context_fn=self._contexts)
            else:
                x = layer(x, tables, plan)
        return self.norm(x)  # type: ignore[no-any-return]

    def _embedded(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        return x if self.scale is None else x * self.scale

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Of a layer's forward pass, and of its recomputation."""
        return nullcontext(), self.again()


class Layer(NamedTuple):
    """Attention and an MLP, each behind a norm and added to what came in."""

    norms: tuple[Linear, Linear]
    attention: Callable[[Tensor, Tables, AttentionPlan], Tensor]
    mlp: Linear
    scale: float | None  # of what is added

    def __call__(self, x: Tensor, tables: Tables, plan: AttentionPlan) -> Tensor:
        """x [T, D] -> [T, D]."""
        added = self.attention(self.norms[0](x), tables, plan)
        x = x + (added if self.scale is None else added * self.scale)
        added = self.mlp(self.norms[1](x))
        return x + (added if self.scale is None else added * self.scale)


def _layer(layer: Any, lean: Lean, linears: Linears) -> Layer:
    part, mlp = layer.self_attn, layer.mlp
    ours = [bool(_names(x, lean)) for x in (part, mlp)]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    first, second = (_norm(x, y or lean.norms) for x, y in zip(norms, ours, strict=True))
    return Layer(
        (first, second),
        Attention.of(part, linears) if ours[0] else partial(_call_attention, part),
        MLP.of(mlp, linears) if ours[1] else partial(_call_mlp, mlp),
        getattr(layer, "residual_multiplier", None),  # Granite
    )


def _call_attention(part: Any, x: Tensor, tables: Tables, plan: AttentionPlan) -> Tensor:
    args = {"position_embeddings": tables.whole, "attention_mask": None, "attention_plan": plan}
    return part(hidden_states=x.unsqueeze(0), **args)[0].squeeze(0)  # type: ignore[no-any-return]


def _call_mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]


def _norm(norm: Any, lean: bool) -> Linear:
    """Computed here where it may be and is of that kind; else the module itself."""
    if not lean or "variance_epsilon" not in vars(norm) or not has_plain_weight(norm):
        return norm  # type: ignore[no-any-return]
    return partial(rms_norm, norm.weight, norm.variance_epsilon)


@dataclass(frozen=True, slots=True)
class Together:
    """Linear layers that read one input."""

    layers: tuple[Linear, ...]
    joined: Joined | None

    @staticmethod
    def of(part: Any, names: tuple[str, ...], linears: Linears) -> Together:
        """The part's layers of these names."""
        layers = tuple(linears.of(getattr(part, name)) for name in names)
        return Together(layers, linears.joined.get(part))

    def apart(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each makes of x."""
        if self.joined is not None:
            return torch.split(self.joined.layer(x), list(self.joined.sizes), -1)
        return tuple(layer(x) for layer in self.layers)

    def whole(self, x: Tensor) -> Tensor:
        """The same in one tensor."""
        return self.joined.layer(x) if self.joined is not None else torch.cat(self.apart(x), -1)


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate(x)) * up(x)) of x [..., D]."""

    gated: Together
    down: Linear

    @staticmethod
    def of(mlp: Any, linears: Linears) -> MLP:
        """Of a module of Transformers."""
        return MLP(Together.of(mlp, GATED, linears), linears.of(mlp.down_proj))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(gated(*self.gated.apart(x)))


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over a packed stream whose heads turn with their positions."""

    heads: Together
    output: Linear
    norms: tuple[Linear, Linear] | None  # of queries and keys
    layer: int
    width: int  # of a head
    groups: int  # heads of keys
    scaling: float
    window: int | None

    @staticmethod
    def of(part: Any, linears: Linears) -> Attention:
        """Of a module of Transformers."""
        holder = part if hasattr(part, "sliding_window") else part.config  # this layer's, or all's
        return Attention(
            heads=Together.of(part, HEADS, linears),
            output=linears.of(part.o_proj),
            norms=(part.q_norm, part.k_norm) if hasattr(part, "q_norm") else None,
            layer=part.layer_idx,
            width=part.head_dim,
            groups=part.k_proj.out_features // part.head_dim,
            scaling=part.scaling,
            window=getattr(holder, "sliding_window", None),
        )

    def __call__(self, x: Tensor, tables: Tables, plan: AttentionPlan) -> Tensor:
        """x [T, D] -> [T, D]."""
        turned = self._each_turned if torch.is_grad_enabled() else self._both_turned
        q, k, v = (y.transpose(0, 1) for y in turned(x, tables))
        output = plan.attend(self.layer, q, k, v, self.scaling, self.window)
        return self.output(output.flatten(1))

    def _each_turned(self, x: Tensor, tables: Tables) -> tuple[Tensor, ...]:
        """q [T, H, D], k and v [T, G, D]; the backward pass needs nothing but the tables."""
        q, k, v = (y.unflatten(-1, (-1, self.width)) for y in self.heads.apart(x))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        cos, sin = tables.cos, tables.sin
        return rotated(q, cos, sin), rotated(k, cos, sin), v

    def _both_turned(self, x: Tensor, tables: Tables) -> tuple[Tensor, ...]:
        """The same with little between them."""
        heads = self.heads.whole(x).unflatten(-1, (-1, self.width))  # [T, H + 2 G, D]
        both, v = heads[:, : -self.groups], heads[:, -self.groups :]
        if self.norms is not None:
            q, k = both[:, : -self.groups], both[:, -self.groups :]
            both = torch.cat((self.norms[0](q), self.norms[1](k)), 1)
        left, right = both.chunk(2, -1)
        both = both * tables.cos + torch.cat((right, left), -1) * tables.signed
        both = both.to(product_dtype(x))
        return both[:, : -self.groups], both[:, -self.groups :], v
