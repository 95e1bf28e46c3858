"""What the loop asks of a training method, and what the two hand each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from prefloop.models.model import LoadedModel


class Movable(Protocol):
    """A micro-batch: made in main memory, and put on the device when it is computed."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        ...


Batch = TypeVar("Batch", bound=Movable)


class LossSums(NamedTuple):
    """What a method makes of one micro-batch: sums only, never means."""

    terms: Mapping[str, Tensor]  # per term: a scalar sum, coefficient included
    metrics: Mapping[str, tuple[Tensor | float, float]]  # per metric: (sum, count)


@dataclass(frozen=True)
class Step(Generic[Batch]):
    """One optimiser step's micro-batches, and what was measured while making them."""

    batches: list[Batch]
    tokens: int  # tokens of this rank's batches
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Method(Protocol[Batch]):
    """A training method: what is trained, the steps, and the loss."""

    @property
    def trained(self) -> Mapping[str, LoadedModel]:
        """Models that take gradients, by name."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        ...

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of models whose own is not `config.lr`."""
        ...

    def steps(self, start_step: int) -> Iterator[Step[Batch]]:
        """The optimiser steps after the first `start_step`; each is asked for when it is due."""
        ...

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """What each loss term's sum over the step is divided by: this batch's share."""
        ...

    def loss(self, batch: Batch) -> LossSums:
        """Sums over this batch."""
        ...

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Told after each step: its metrics over all ranks; none where no rank had a batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out rows; empty without any."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what a resumed run must find unchanged: rows, and weights that are not trained."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimiser: tensors and plain values.

        Asked for after each step, on every rank: it may gather, and holds what later steps do not
        write over. A function in it stands for what is still under way: where a checkpoint is
        written every rank calls it, with whether to wait.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the final model, or models, into the run directory."""
        ...
