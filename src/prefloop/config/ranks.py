"""Settings of a training that several processes share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefloop.config.ranges import Form, OnlyWith, Settings


@dataclass(frozen=True, kw_only=True)
class RanksConfig(Settings):
    """What all training commands say of their processes (see docs/ranks.md)."""

    shard: Literal["auto", "full", "none"] = "auto"
    """Under torchrun: `full` divides weights, gradients and optimiser among the processes, `none`
    gives each all of them; auto: full where there are several."""
    mesh: Annotated[
        str,
        Form(r"auto|[1-9]\d*x[1-9]\d*", "give REPLICASxSHARDS, such as 2x8"),
        OnlyWith("shard", "auto", "full"),
    ] = "auto"
    """REPLICASxSHARDS: 2x8 divides a model among 8 processes, twice; auto: among all, once."""
