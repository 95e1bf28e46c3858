"""Weights that stay in their file until they are divided among ranks.

A rank of several keeps a slice of each layer, and reading the whole model first would take the
memory of one that is not divided. So only the first layers are read, one of each kind, on which the
self-test runs. The others' matrices are loaded as stand-ins of a single number, in the type, in the
shape and on the device that the weights will have, and the file's own tensors (mapped, not read)
wait beside them. `read` puts the weights in, when the layer is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.models.memory import file_mappings, release_pages

Unread = dict[nn.Parameter, Tensor]
"""Stand-ins, and the weights that they stand for as they were stored."""
NUMBERS = {"layer_idx", "layer_id"}
"""In what layers of one kind differ, beside their weights."""


def decoder_layers(module: nn.Module) -> Sequence[nn.Module]:
    """What is gathered one after the other: the longest list of modules."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=())  # type: ignore[arg-type]  # it is a sequence


def one_of_each(module: Any) -> int | None:
    """How many layers there are up to the last that is the first of its kind: of the same modules
    with the same settings. None where they are not those that the configuration counts.
    """
    layers = decoder_layers(module)
    if len(layers) != getattr(module.config.get_text_config(), "num_hidden_layers", None):
        return None
    kinds = [_kind(layer) for layer in layers]
    return max((kinds.index(kind) + 1 for kind in kinds), default=0)


def beyond(module: nn.Module, first: int | None) -> set[nn.Parameter]:
    """The matrices of all layers but so many: nearly all of a large model. Of None, nothing."""
    if first is None:
        return set()
    layers = decoder_layers(module)
    kept = {weight for layer in layers[:first] for weight in layer.parameters()}
    weights = {weight for layer in layers[first:] for weight in layer.parameters()}
    return {weight for weight in weights - kept if weight.ndim > 1}


def _kind(layer: nn.Module) -> list[Any]:
    return [(name, type(part), _settings(part)) for name, part in layer.named_modules()]


def _settings(part: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {k: v for k, v in vars(part).items() if k not in NUMBERS and isinstance(v, plain)}


def stand_in(
    shape: torch.Size, device: torch.device, kind: torch.dtype, learns: bool
) -> nn.Parameter:
    """Takes no memory; it is not a number (bytes: 0), so that nobody takes it for the weights."""
    nothing = torch.full((), torch.nan if kind.is_floating_point else 0, dtype=kind, device=device)
    return nn.Parameter(nothing.expand(shape), learns)


@contextmanager
def first_layers(module: nn.Module, first: int | None) -> Iterator[None]:
    """Within it the model has its first layers alone; all for None."""
    layers: Any = decoder_layers(module) if first is not None else []
    others = list(layers[first:])
    del layers[first:]
    try:
        yield
    finally:
        layers.extend(others)


def read(module: nn.Module, unread: Unread) -> None:
    """Puts a module's weights in place of its stand-ins."""
    mappings = file_mappings()
    for weight in module.parameters():
        if (stored := unread.pop(weight, None)) is not None:
            weight.data = stored.to(weight.device, weight.dtype)
            release_pages(stored, mappings)
