"""Rows for training: read, split by prompt, tokenised, counted; then batches of each step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefloop import distributed
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.data import formats, split, stream
from prefloop.data.batches import TokenBatch, pack_all
from prefloop.data.tokenize import Example, tokenize
from prefloop.errors import UserError
from prefloop.labelling.export import is_store, read_records
from prefloop.models.model import LoadedModel
from prefloop.records import Prompt, RowCounts
from prefloop.runs import Run
from prefloop.training.method import Step

Kind = Literal["demonstration", "preference", "unpaired"]


def read_examples(
    config: TrainingConfig,
    kind: Kind,
    model: LoadedModel,
    run: Run,
    train_on: Literal["answer", "all"] = "answer",
    keep_ties: bool = False,
) -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples; what was dropped and why is printed and recorded."""
    train, held_out = _records(config, kind)
    limits = (config.max_length, config.truncation)
    parts = [
        tokenize(records, model.encoder, *limits, counts, train_on, keep_ties) if records else []
        for records, counts in (train, held_out)
    ]
    _check_readable([*parts[0], *parts[1]], model)
    _note_rows(config, run, train[1], held_out[1])
    return parts[0], parts[1]


def _check_readable(examples: Sequence[Example], model: LoadedModel, room: int = 0) -> None:
    """Before the first step: every sequence, with `room` for an answer, is one the model reads."""
    for example in examples:
        model.check_example(example, room)


def _records(
    config: TrainingConfig, kind: Kind | Literal["prompt"]
) -> tuple[tuple[list[Any], RowCounts], tuple[list[Any], RowCounts]]:
    """Training and held-out records with their counts: one count where one file gives both."""
    counts, eval_counts = RowCounts(), RowCounts()
    records = _load(config.data, kind, counts)
    if config.eval_data is not None:
        held_out = _load(config.eval_data, kind, eval_counts)
        return (records, counts), (held_out, eval_counts)
    records, held_out = split.split_by_prompt(records, config.eval_fraction, config.seed)
    return (records, counts), (held_out, counts)


def _load(source: str, kind: Kind | Literal["prompt"], counts: RowCounts) -> list[Any]:
    """Records of a file, a data set, or a labelling store."""
    if is_store(source):
        return list(read_records(source, kind, counts))
    found: list[Any] = formats.load(source, kind, counts)
    return found


def _note_rows(config: TrainingConfig, run: Run, counts: RowCounts, eval_counts: RowCounts) -> None:
    _note(run, counts, config.data, "data")
    if config.eval_data is not None:
        _note(run, eval_counts, config.eval_data, "eval_data")


def _note(run: Run, counts: RowCounts, source: str, of: str) -> None:
    run.set_rows(counts.as_dict(), of=of)
    if distributed.rank() == 0:
        print(f"{source}: {counts.summary()}", file=sys.stderr)


def read_demonstrations(
    source: str, config: TrainingConfig, model: LoadedModel, run: Run
) -> list[Example]:
    """The rows of an SFT term beside another loss."""
    counts = RowCounts()
    records = formats.load(source, "demonstration", counts)
    examples = tokenize(records, model.encoder, config.max_length, config.truncation, counts)
    _check_readable(examples, model)
    _note(run, counts, source, "sft_data")
    return examples


def refuse_margins(examples: Iterable[Example], loss: str) -> None:
    """Before the first step: no row asks for a margin that the loss would not read."""
    for example in examples:
        if example.margin:
            raise UserError(
                f"{example.where}: `margin` is {example.margin:g}, and --loss {loss} reads none; "
                "remove the column, or use `reward --loss bradley-terry`"
            )


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


def read_prompts(config: PPOConfig, model: LoadedModel, run: Run) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts, with room for the answers within --max-length."""
    room = config.max_length - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-length {config.max_length} leaves no room for a prompt beside "
            f"--max-new-tokens {config.max_new_tokens}"
        )
    train, held_out = _records(config, "prompt")
    parts = []
    for records, counts in (train, held_out):
        examples: list[Example] = []
        if records:
            examples = tokenize(records, model.encoder, room, config.truncation, counts)
            _check_readable(examples, model, config.max_new_tokens)
        parts.append(Prompts(tuple(records[e.record] for e in examples), tuple(examples)))
    _note_rows(config, run, train[1], held_out[1])
    return parts[0], parts[1]


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of the run."""
    return stream.total_steps(rows, config.batch_size, config.epochs, config.max_steps)


def supervised_steps(
    examples: Sequence[Example], config: TrainingConfig, model: LoadedModel, start_step: int
) -> Iterator[Step[TokenBatch]]:
    """The steps from `start_step` on; each rank takes its share of each step's rows."""
    for rows in stream.step_rows(
        len(examples), config.batch_size, config.epochs, config.max_steps, config.seed, start_step
    ):
        chosen = [examples[row] for row in distributed.mine(rows)]
        batches = pack_all(chosen, config.micro_batch_tokens, not model.packed)
        yield Step(batches, sum(batch.tokens for batch in batches))
