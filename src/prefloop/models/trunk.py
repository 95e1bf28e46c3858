"""The lowest layers of a base that several roles share, computed once a batch for all of them.

Where adapters sit on higher layers alone, each role's lower layers give the same numbers, and no
gradient goes through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from prefloop.models.model import LoadedModel


@dataclass
class Trunk:
    """The lowest layers of `base`, and what they make of one batch once a role has read it."""

    base: nn.Module  # as LoadedModel has it
    layers: int
    states: Tensor | None = None  # [T, D]


def trunk_of(model: LoadedModel) -> Trunk | None:
    """For a new batch: the layers of a model's base below all that learns, is an adapter or may be
    one of some other role on the base; None where there are none.
    """
    base: Any = model.base
    layers = getattr(base, "layers", ())
    if model.lean is None or not len(layers) or _differs(base.embed_tokens):
        return None
    count = next((n for n, layer in enumerate(layers) if _differs(layer)), 0)
    return Trunk(base, count) if count else None


def _differs(part: nn.Module) -> bool:
    """Whether roles may differ in it."""
    tuned = any(isinstance(inner, BaseTunerLayer) for inner in part.modules())
    return tuned or any(p.requires_grad for p in part.parameters())
