"""Settings of what watches a policy while it learns, by another judge than the one it learns from.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefloop.config.endpoint import EndpointConfig
from prefloop.config.ranges import (
    Above,
    AtLeast,
    OnlyWith,
    endpoint_parts,
    is_endpoint,
    no_room,
)

SPREAD = "spread"
"""The monitor that is made of PPO's own reward models."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(EndpointConfig):
    """What `sft`, `dpo` and `ppo` share beside training itself (see docs/health.md)."""

    monitor: str | None = None
    """Judge of the policy as it learns, other than its reward: `module:function`, a reward model's
    folder or hub id, openai:MODEL@URL; `spread`: several reward models' mean less deviation."""
    monitor_data: Annotated[str | None, OnlyWith("monitor")] = None
    """Prompts that the monitor has answered: rows with a `prompt`, held out of training."""
    monitor_steps: Annotated[int, Above(0), OnlyWith("monitor")] = 20
    """Steps between the monitor's measurements; the start and the last step are measured, too."""
    keep_best: Annotated[bool, OnlyWith("monitor")] = False
    """`model` gets the weights of the step that the monitor scores best; of equals the first.
    PPO's `value_model` is that of the last step."""
    stop_on_hacking: Annotated[bool, OnlyWith("monitor")] = False
    """End the run, in good order, when the monitor falls while what is learned from does not."""
    max_new_tokens: Annotated[int, Above(0), OnlyWith("monitor")] = 64
    """Most tokens of an answer that the monitor scores."""
    temperature: Annotated[float, AtLeast(0), OnlyWith("monitor")] = 1.0
    """Sampling temperature of the answers that the monitor scores."""
    max_concurrent: Annotated[int, Above(0), OnlyWith("monitor")] = 64
    """Answers generated at once for the monitor."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.monitor is None:
            return
        if self.monitor_data is None:
            yield "--monitor needs prompts to have answered; give --monitor-data"
        yield from no_room(self.max_new_tokens, self.max_length)  # type: ignore[attr-defined]
        models: tuple[str, ...] = getattr(self, "reward_models", ())
        if self.monitor == SPREAD:
            if len(models) < 2:
                yield (
                    "--monitor spread is of several reward models; give ppo --reward-model more "
                    "than one, or another --monitor"
                )
            if getattr(self, "reward_ensemble", "") == "lower-bound":
                yield (
                    "--monitor spread is what --reward-ensemble lower-bound trains for; leave that "
                    "out, or give another --monitor"
                )
            return
        learned = [*models, *getattr(self, "reward_function", ()), getattr(self, "judge", None)]
        if any(source and _same(self.monitor, source) for source in learned):
            yield training_reward(self.monitor)


def training_reward(monitor: str) -> str:
    """The problem of a monitor that is what the policy learns from."""
    return (
        f"--monitor {monitor} is what the policy learns from, so it cannot say whether that is "
        "gamed; give another judge"
    )


def _same(one: str, other: str) -> bool:
    """Whether two names are of one judge."""
    if is_endpoint(one) and is_endpoint(other):
        return endpoint_parts(one) == endpoint_parts(other)
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
