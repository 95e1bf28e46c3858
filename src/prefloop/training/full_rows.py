"""Rows that need as much memory as the settings let rows need, and how many a step has."""

from __future__ import annotations

from collections.abc import Sequence

from prefloop import distributed
from prefloop.config import PPOConfig, SFTConfig, TrainingConfig
from prefloop.data.batches import packed_length
from prefloop.data.tokenize import Example


def rows_a_step(config: TrainingConfig) -> int:
    """Rows of an optimiser step on one rank."""
    return -(-config.batch_size // distributed.world())


def answers_an_iteration(config: PPOConfig) -> int:
    """Answers that a rank samples before it trains on them."""
    prompts = -(-config.batch_size * config.num_minibatches // distributed.world())
    return prompts * config.samples_per_prompt


def full_rows(config: TrainingConfig, tokens: int) -> list[Example]:
    """The rows of a micro-batch of `tokens` tokens that hold most: as long as they may be, all of
    their answers in the loss; pairs where rankings are asked for. One at least.
    """
    whole = full_row(config)
    fitting = max(1, tokens // packed_length(whole))
    rows = [whole] * min(fitting, rows_a_step(config))
    prompt, answers = _lengths(config)
    shorter = (tokens - fitting * packed_length(whole) - prompt) // len(answers)
    if shorter > 0 and len(rows) < rows_a_step(config):
        rows.append(example(prompt, [shorter] * len(answers)))
    return rows


def full_row(config: TrainingConfig) -> Example:
    """The longest row."""
    return example(*_lengths(config))


def _lengths(config: TrainingConfig) -> tuple[int, list[int]]:
    """Tokens of the longest row's prompt and of its answers."""
    if isinstance(config, PPOConfig):
        new = config.max_new_tokens
        return config.max_length - new, [new] * config.samples_per_prompt
    single = isinstance(config, SFTConfig) or getattr(config, "loss", "") == "kto"
    return 1, [config.max_length - 1] * (1 if single else 2)


def example(prompt: int, answers: Sequence[int]) -> Example:
    """A row of these lengths; its first answer is the best."""
    tiers = tuple((number,) for number in range(len(answers)))
    ids = tuple((1,) * length for length in answers)
    masks = tuple((True,) * length for length in answers)
    return Example((1,) * prompt, ids, masks, tiers=tiers, labels=(True,) * len(answers))


SMALLEST = example(1, [1])
"""For methods that must be given a row."""
