"""`python -m benchmarks.overlap`: what --rollout-ahead gains with a server that samples elsewhere.

The same PPO twice, with answers sampled before each iteration and while the one before it trains.
The first iteration, which waits in both, is left out. A server that shares the trainer's cores
gains nothing: give one on another machine or GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefloop.config import PPOConfig
from prefloop.training import ppo

WORDS = "river bread winter engine garden letter music stone market island".split()


class Clock:
    """When each iteration's answers were scored."""

    def __init__(self) -> None:
        self.times: list[float] = []


CLOCK = Clock()


def by_length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward that costs nothing, and notes the time."""
    CLOCK.times.append(time.perf_counter())
    return [float(len(text)) for text in completions]


def main() -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rollout-engine", required=True)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [{"prompt": f"Tell of {a} and {b}."} for a in WORDS for b in WORDS]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PPOConfig(
            model=asked.model,
            data=str(folder / "prompts.jsonl"),
            output=folder / "waits",
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
        seconds = {}
        for name in ("waits", "ahead"):
            import benchmarks.overlap as here  # the module that the reward's name leads to

            here.CLOCK.times.clear()
            ppo.run(replace(config, output=folder / name, rollout_ahead=name == "ahead"))
            times = here.CLOCK.times
            seconds[name] = (times[-1] - times[1]) / (len(times) - 2)
    found = {"seconds an iteration": seconds, "gain": seconds["waits"] / seconds["ahead"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
