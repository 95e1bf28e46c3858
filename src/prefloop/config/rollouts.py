"""Settings of answers that other machines sample: vLLM servers (see docs/rollouts.md). No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefloop.config.ranges import Above, AtLeast, OnlyWith, Settings

REMOTE = OnlyWith("rollout_engine")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Settings):
    """Where answers are sampled."""

    rollout_engine: str | None = None
    """vLLM servers that sample, http://HOST:PORT, several with commas; by default this process."""
    rollout_timeout: Annotated[float, Above(0), REMOTE] = 300.0
    """Seconds until a server that does not reply is taken for dead, and its answer asked anew."""
    rollout_patience: Annotated[float, Above(0), REMOTE] = 900.0
    """Seconds without any reply from any server after which the command gives up."""

    @property
    def rollout_servers(self) -> tuple[str, ...]:
        """Their URLs, without a slash or /v1 behind."""
        given = (self.rollout_engine or "").split(",")
        return tuple(re.sub(r"(/v1)?/*$", "", url.strip()) for url in given if url.strip())

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        for url in self.rollout_servers:
            if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
                yield f"--rollout-engine {url}: give http://HOST:PORT, several with commas between"
            if self.rollout_servers.count(url) > 1:
                yield f"--rollout-engine names {url} twice; name it once"


@dataclass(frozen=True, kw_only=True)
class TrainedRolloutConfig(RolloutConfig):
    """The same for a policy that learns from the answers."""

    rollout_folder: Annotated[Path | None, REMOTE] = None
    """Folder through which servers get the weights, under a path that is theirs, too; by default
    `rollout` in --output."""
    importance_cap: Annotated[float, AtLeast(0), REMOTE] = 0.0
    """Weigh each token's policy loss by min(pi_trainer / pi_sampler, this), 2 is usual; 0 by 1."""
    rollout_ahead: Annotated[bool, OnlyWith("importance_cap")] = False
    """Sample the next iteration's answers while this one trains: they are by weights that are one
    iteration old, which --importance-cap corrects."""
