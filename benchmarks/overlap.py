"""`python -m benchmarks.overlap`: what --rollout-ahead gains with a server that samples elsewhere.

The same PPO with answers sampled before each iteration and while the one before it trains, in turn,
so that what else the machine does falls on both. The first iteration, which waits in both, is left
out. A server that shares the trainer's cores gains little: give one on another machine or GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from prefloop.config import PPOConfig
from prefloop.generation.protocol import EngineConfig, RolloutEngine
from prefloop.generation.remote import engine_for
from prefloop.models.model import LoadedModel
from prefloop.training import ppo

WORDS = "river bread winter engine garden letter music stone market island".split()


@dataclass
class Clock:
    """Of one run."""

    scored: list[float] = field(default_factory=list)  # when each iteration's answers were
    sampling: list[float] = field(default_factory=list)  # seconds of each iteration's


CLOCK = Clock()


class Timed:
    """A RolloutEngine that notes how long it samples."""

    def __init__(self, engine: RolloutEngine, clock: Clock) -> None:
        self.engine, self.clock, self.sync = engine, clock, engine.sync

    def generate(self, *asked: Any, **more: Any) -> Any:
        """See RolloutEngine."""
        began = time.perf_counter()
        rows = self.engine.generate(*asked, **more)
        self.clock.sampling.append(time.perf_counter() - began)
        return rows


def by_length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward that costs nothing, and notes the time."""
    CLOCK.scored.append(time.perf_counter())
    return [float(len(text)) for text in completions]


def main() -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rollout-engine", required=True)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.iterations < 3 or asked.repeats < 1:
        parser.error("give at least 3 --iterations and 1 of --repeats")
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measured(asked, Path(place))))


def measured(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds an iteration of each run, and what they come to."""
    rows = [{"prompt": f"Tell of {a} and {b}."} for a in WORDS for b in WORDS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PPOConfig(
        model=asked.model,
        data=str(folder / "prompts.jsonl"),
        output=folder / "run",
        reward_function="benchmarks.overlap:by_length",  # type: ignore[arg-type]
        advantage="rloo",
        samples_per_prompt=4,
        batch_size=asked.prompts,
        ppo_epochs=2,
        max_steps=2 * asked.iterations,
        max_new_tokens=asked.tokens,
        rollout_engine=asked.rollout_engine,
        importance_cap=2.0,
    )
    found: dict[str, list[float]] = {"waits": [], "ahead": [], "sampling": []}
    for turn in range(asked.repeats):
        for name in ("waits", "ahead"):
            output = folder / f"{name}-{turn}"
            clock = timed(replace(config, output=output, rollout_ahead=name == "ahead"))
            span = clock.scored[-1] - clock.scored[1]
            found[name].append(span / (len(clock.scored) - 2))
            if name == "waits":
                found["sampling"].append(sum(clock.sampling[2:]) / len(clock.sampling[2:]))
    middle = {name: median(each) for name, each in found.items()}
    shorter = min(middle["sampling"], middle["waits"] - middle["sampling"])
    return {
        "seconds an iteration": found,
        "gain": middle["waits"] / middle["ahead"],
        "gain at most": middle["waits"] / (middle["waits"] - shorter),
    }


def timed(config: PPOConfig) -> Clock:
    """A run, and when it did what."""
    import benchmarks.overlap as here  # the module that the reward's name leads to

    here.CLOCK = clock = here.Clock()

    def make_engine(asked: EngineConfig, model: LoadedModel) -> RolloutEngine:
        return Timed(engine_for(asked, model), clock)

    ppo.run(config, make_engine)
    return clock


if __name__ == "__main__":
    main()
