"""PPO against a reward that is a Python function.

    python examples/ppo_python_reward.py MODEL PROMPTS.jsonl OUTPUT

PROMPTS has `prompt`. MODEL is a folder or a hub id; four answers to a prompt are each other's
baseline (RLOO), so there is no critic.
"""

import sys
from pathlib import Path
from typing import Any

import prefloop


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """Higher is better: answers of about ten words that say no word twice."""
    scores = []
    for completion in completions:
        words = completion.lower().split()
        scores.append(len(set(words)) / max(len(words), 1) - abs(len(words) - 10) / 10)
    return scores


def main(model: str, data: str, output: str, **settings: Any) -> prefloop.Run:
    """Runs PPO; `settings` are those of `prefloop ppo --help`, with underscores."""
    config = prefloop.PPOConfig(
        model=model,
        data=data,
        output=Path(output),
        reward_function=("ppo_python_reward:score",),  # module:function, as Python imports it
        advantage="rloo",
        samples_per_prompt=4,
        kl_coef=0.05,
        **{"batch_size": 16, "max_new_tokens": 32} | settings,
    )
    return prefloop.ppo(config)


if __name__ == "__main__":
    print("model:", main(*sys.argv[1:4]).directory / "model")
