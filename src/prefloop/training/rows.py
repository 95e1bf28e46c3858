"""Rows for training: read, split by prompt, tokenised, counted; then batches of each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefloop import distributed, sources
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.data import split, stream
from prefloop.data.batches import TokenBatch, pack_all
from prefloop.data.tokenize import Example, tokenize
from prefloop.errors import UserError
from prefloop.files import read_rows, write_jsonl
from prefloop.models.model import LoadedModel
from prefloop.records import Prompt, Record, RowCounts
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
    train, held_out, part_of = _records(config, kind)
    limits = (config.max_length, config.truncation)
    sides = [
        tokenize(records, model.encoder, *limits, counts, train_on, keep_ties) if records else []
        for records, counts in (train, held_out)
    ]
    _check_readable([*sides[0], *sides[1]], model)
    _note_rows(config, run, model, train, held_out)
    return _with_parts(config, sides[0], train[0], part_of), sides[1]


def _check_readable(examples: Sequence[Example], model: LoadedModel, room: int = 0) -> None:
    """Before the first step: every sequence, with `room` for an answer, is one the model reads."""
    for example in examples:
        model.check_example(example, room)


Side = tuple[list[Any], RowCounts]
"""Records, and the count of the rows they come from."""


def _records(
    config: TrainingConfig, kind: Kind | Literal["prompt"]
) -> tuple[Side, Side, Mapping[int, int]]:
    """Training and held-out records with their counts: one count where one file gives both.

    And which of several sources a record (by its id) comes from.
    """
    counts, eval_counts = (RowCounts(bad_rows=config.bad_rows) for _ in range(2))
    parts = sources.load_parts(config.data, kind, counts, config.chat)
    part_of = {id(record): number for number, part in enumerate(parts) for record in part}
    records = [record for part in parts for record in part]
    if config.eval_data is not None:
        held_out = sources.load(config.eval_data, kind, eval_counts, config.chat)
        return (records, counts), (held_out, eval_counts), part_of
    records, held_out = split.split_by_prompt(records, config.eval_fraction, config.seed)
    return (records, counts), (held_out, counts), part_of


def _with_parts(
    config: TrainingConfig,
    examples: Sequence[Example],
    records: Sequence[Record],
    part_of: Mapping[int, int],
) -> list[Example]:
    """Examples that know which source they come from; each weighted one must have some."""
    numbered = [replace(e, part=part_of[id(records[e.record])]) for e in examples]
    addresses, weights = sources.addresses_and_weights(config.data)
    there = {example.part for example in numbered}
    if missing := [address for n, address in enumerate(addresses) if weights and n not in there]:
        raise UserError(f"{missing[0]}: no row of it is left to draw; mend it, or leave it out")
    return numbered


def order_of(examples: Sequence[Example], config: TrainingConfig) -> Callable[[int], list[int]]:
    """The order of an epoch's rows; by weight where the sources have weights."""
    _, weights = sources.addresses_and_weights(config.data)
    if not weights:
        return lambda epoch: stream.epoch_order(len(examples), config.seed, epoch)
    parts = [example.part for example in examples]
    return lambda epoch: stream.mixed_order(parts, weights, config.seed, epoch)


def _note_rows(
    config: TrainingConfig, run: Run, model: LoadedModel, train: Side, held_out: Side
) -> None:
    told = config.data if isinstance(config.data, str) else " ".join(config.data)
    _note(run, train[1], told, "data")
    if config.eval_data is not None:
        _note(run, held_out[1], config.eval_data, "eval_data")
    note = sources.strings_note(train[0], bool(model.tokenizer.chat_template))
    if note and distributed.rank() == 0:
        print(note, file=sys.stderr)


def _note(run: Run, counts: RowCounts, source: str, of: str) -> None:
    run.set_rows(counts.as_dict(), of=of)
    if distributed.rank() == 0:
        print(f"{source}: {counts.summary()}", file=sys.stderr)
        _list_bad_rows(run, counts, of)


def _list_bad_rows(run: Run, counts: RowCounts, of: str) -> None:
    """The dropped rows of one setting, beside those of the others, in the run's bad_rows.jsonl."""
    path = run.directory / "bad_rows.jsonl"
    kept = [row for _, row in read_rows(path) if row["of"] != of] if path.exists() else []
    rows = [*kept, *({"of": of, "line": where, "reason": told} for where, told in counts.bad)]
    if rows:
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)


def read_demonstrations(
    source: str, config: TrainingConfig, model: LoadedModel, run: Run
) -> list[Example]:
    """The rows of an SFT term beside another loss."""
    counts = RowCounts(bad_rows=config.bad_rows)
    records = sources.load(source, "demonstration", counts, config.chat)
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
    train, held_out, part_of = _records(config, "prompt")
    parts = []
    for records, counts in (train, held_out):
        examples: list[Example] = []
        if records:
            examples = tokenize(records, model.encoder, room, config.truncation, counts)
            _check_readable(examples, model, config.max_new_tokens)
        parts.append(Prompts(tuple(records[e.record] for e in examples), tuple(examples)))
    _note_rows(config, run, model, train, held_out)
    numbered = _with_parts(config, parts[0].examples, train[0], part_of)
    return replace(parts[0], examples=tuple(numbered)), parts[1]


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of the run."""
    return stream.total_steps(rows, config.batch_size, config.epochs, config.max_steps)


def supervised_steps(
    examples: Sequence[Example], config: TrainingConfig, model: LoadedModel, start_step: int
) -> Iterator[Step[TokenBatch]]:
    """The steps from `start_step` on; each rank takes its share of each step's rows."""
    for rows in stream.step_rows(
        len(examples),
        config.batch_size,
        config.epochs,
        config.max_steps,
        config.seed,
        start_step,
        order_of(examples, config),
    ):
        chosen = [examples[row] for row in distributed.mine(rows)]
        batches = pack_all(chosen, config.micro_batch_tokens, not model.packed)
        yield Step(batches, sum(batch.tokens for batch in batches))
