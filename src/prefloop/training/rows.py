"""Rows for training: read, split by prompt, tokenised, counted; then batches of each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from prefloop import distributed
from prefloop.config import PPOConfig, TrainingConfig, UserError
from prefloop.data import formats, stream
from prefloop.data.batches import TokenBatch, to_batches
from prefloop.data.tokenize import Example, tokenize
from prefloop.records import Prompt, RowCounts
from prefloop.runs import Run
from prefloop.training.loop import Step

Kind = Literal["demonstration", "preference", "unpaired"]


def read_examples(
    config: TrainingConfig,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    train_on: Literal["answer", "all"] = "answer",
) -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples; what was dropped and why goes into the run's record."""
    counts, eval_counts = RowCounts(), RowCounts()
    records = formats.load(config.data, kind, counts)
    held_out = []
    if config.eval_data is not None:
        held_out = formats.load(config.eval_data, kind, eval_counts)
    elif config.eval_fraction:
        records, held_out = formats.split_by_prompt(records, config.eval_fraction, config.seed)
        if not records or not held_out:
            raise UserError(
                f"{config.data}: too few prompts to hold out --eval-fraction {config.eval_fraction}"
            )
    shared = (tokenizer, config.max_length, config.truncation)
    examples = tokenize(records, *shared, counts, train_on)
    eval_examples = []
    if held_out:
        eval_examples = tokenize(
            held_out, *shared, eval_counts if config.eval_data else counts, train_on
        )
    run.set_rows(counts.as_dict())
    if config.eval_data is not None:
        run.set_rows(eval_counts.as_dict(), of="eval_data")
    return examples, eval_examples


def read_demonstrations(
    source: str, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, run: Run
) -> list[Example]:
    """The rows of an SFT term beside another loss."""
    counts = RowCounts()
    records = formats.load(source, "demonstration", counts)
    examples = tokenize(records, tokenizer, config.max_length, config.truncation, counts)
    run.set_rows(counts.as_dict(), of="sft_data")
    return examples


@dataclass(frozen=True)
class Prompts:
    """Prompts as records and as token ids."""

    records: tuple[Prompt, ...]
    examples: tuple[Example, ...]  # without answers

    def take(self, numbers: Iterable[int]) -> Prompts:
        """Some of them, in the order asked for."""
        chosen = list(numbers)
        return Prompts(
            tuple(self.records[i] for i in chosen), tuple(self.examples[i] for i in chosen)
        )


def read_prompts(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts, with room for the answers within --max-length."""
    counts, eval_counts = RowCounts(), RowCounts()
    records = formats.load(config.data, "prompt", counts)
    held_out: list[Prompt] = []
    if config.eval_data is not None:
        held_out = formats.load(config.eval_data, "prompt", eval_counts)
    elif config.eval_fraction:
        records, held_out = formats.split_by_prompt(records, config.eval_fraction, config.seed)
    room = config.max_length - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-length {config.max_length} leaves no room for a prompt beside "
            f"--max-new-tokens {config.max_new_tokens}"
        )
    train = _prompts(records, tokenizer, room, config, counts)
    held = Prompts((), ())
    if held_out:
        count = counts if config.eval_data is None else eval_counts
        held = _prompts(held_out, tokenizer, room, config, count)
    run.set_rows(counts.as_dict())
    if config.eval_data is not None:
        run.set_rows(eval_counts.as_dict(), of="eval_data")
    return train, held


def _prompts(
    records: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    config: PPOConfig,
    counts: RowCounts,
) -> Prompts:
    examples = tokenize(records, tokenizer, room, config.truncation, counts)
    by_place = {record.where: record for record in records}
    return Prompts(tuple(by_place[example.where] for example in examples), tuple(examples))


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of the run."""
    return stream.total_steps(rows, config.batch_size, config.epochs, config.max_steps)


def supervised_steps(
    examples: Sequence[Example], config: TrainingConfig, device: torch.device, start_step: int
) -> Iterator[Step[TokenBatch]]:
    """The steps from `start_step` on; each rank takes its share of each step's rows."""
    for rows in stream.step_rows(
        len(examples), config.batch_size, config.epochs, config.max_steps, config.seed, start_step
    ):
        mine = stream.shard(rows, distributed.rank(), distributed.world())
        batches = to_batches([examples[row] for row in mine], config.micro_batch_tokens, device)
        yield Step(batches, sum(batch.tokens for batch in batches))
