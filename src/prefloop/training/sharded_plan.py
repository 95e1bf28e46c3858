"""What each of several ranks holds that share a model, by what one alone would hold.

FSDP2 leaves each rank an equal part of every weight, of its gradient and of its moments. A layer's
weights are gathered while it computes, and the next one's meanwhile; what belongs to no layer
(embeddings, head, last norm) stays gathered through the step, and a whole policy while it samples.
Rows and activations are a rank's own, and with them the copies that autocast makes, but for those
of layers that travel in bfloat16. What ranks keep whole of these (norms) is counted as divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from prefloop.config import TrainingConfig
from prefloop.models.sharding import beside_rounded, matrices, only_multiplied
from prefloop.models.unread import decoder_layers
from prefloop.training.bare_models import LAYER, Role, load_bare
from prefloop.training.rehearsal import MONITOR
from prefloop.training.tracing import (
    CAST,
    GATHERED,
    GATHERED_GRADIENTS,
    GRADIENTS,
    OPTIMISER,
    WEIGHTS,
    Part,
    Parts,
)

DIVIDED = {WEIGHTS, GRADIENTS, OPTIMISER}


class Units:
    """Bytes of a role's weights, and of their gradients, in the pieces that are gathered as one."""

    def __init__(self, role: Role, config: TrainingConfig, device: torch.device) -> None:
        depth = 1 if role.regular else role.config.get_text_config().num_hidden_layers
        model = load_bare(role, config, depth, device)
        layers, count = decoder_layers(model.base), role.config.get_text_config().num_hidden_layers
        rounded = {
            p for x in layers if beside_rounded(model, x) is not None for p in x.parameters()
        }
        narrow = only_multiplied(model, model.module)
        kept, sent, gradients = Counter[str](), Counter[str](), Counter[str]()
        spared = Counter[str]()  # in a copy that samples
        for name, parameter in model.module.named_parameters():
            place = LAYER.search(f".{name}")
            layer = place[1] if place else ""
            four_bits = getattr(parameter, "quant_state", None)
            kept[layer] += parameter.nbytes + (four_bits.absmax.nbytes if four_bits else 0)
            sent[layer] -= parameter.nbytes // 2 if parameter in rounded else 0
            gradients[layer] += parameter.nbytes if parameter.requires_grad else 0
            spared[layer] += parameter.nbytes - 2 * parameter.numel() if parameter in narrow else 0
        sent.update(kept)
        self.rest, self.rest_gradients = kept.pop(""), gradients.pop("")
        alike = count if depth == 1 else 1
        self.sampled = self.rest - spared.pop("") + (kept - spared).total() * alike
        self.layer, self.layer_gradients = max(sent[x] for x in kept), max(gradients.values())
        left = matrices(model.hf) - rounded  # for autocast to copy
        self.casts = sum(2 * w.numel() for w in left) if rounded else None
        self.sampled_casts = None if device.type == "cpu" else self.casts  # a CPU packs its own


def shard(
    stages: Mapping[str, Parts],
    roles: Sequence[Role],
    config: TrainingConfig,
    device: torch.device,
    ranks: int,
) -> dict[str, Parts]:
    """The stages of a run on one rank, as each of `ranks` ranks has them."""
    shared = [role for role in roles if role.on is None and role.name != MONITOR]
    units = {role.name: Units(role, config, device) for role in shared}
    trained = list(dict.fromkeys(role.on or role.name for role in roles if role.trained))
    return {
        stage: _divided(stage, parts, ranks, units) | _gathered(stage, units, trained)
        for stage, parts in stages.items()
    }


def _divided(stage: str, parts: Parts, ranks: int, units: Mapping[str, Units]) -> dict[Part, int]:
    """A rank's part; a monitor's model stays whole."""
    found = {}
    for part, size in parts.items():
        if part.kind in DIVIDED and part.model != MONITOR:
            size = -(-size // ranks)
        found[part] = size
        if part.kind == CAST and (unit := units.get(part.model)) is not None:
            casts = unit.sampled_casts if stage == "sampling" else unit.casts
            found[part] = size if casts is None else min(size, casts)
    return found


def _gathered(stage: str, units: Mapping[str, Units], trained: Sequence[str]) -> dict[Part, int]:
    """What stands whole for a while; one model computes at a time, all that learn in one graph."""
    if stage == "update":
        return {}
    if stage == "sampling":
        return {Part("policy", GATHERED): units["policy"].sampled}
    if stage not in ("forward", "backward"):
        name = max(units, key=lambda name: units[name].rest + 2 * units[name].layer)
        return {Part(name, GATHERED): units[name].rest + 2 * units[name].layer}
    largest = max(trained, key=lambda name: units[name].layer)
    found = {}
    for name in trained:
        one, layers = units[name], name == largest
        found[Part(name, GATHERED)] = one.rest + 2 * one.layer * layers
        if stage == "backward":
            whole = one.rest_gradients + one.layer_gradients * layers
            found[Part(name, GATHERED_GRADIENTS)] = whole
    return found
