"""Rows for training: read, split by prompt, tokenised, counted; then batches of each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefloop import distributed, provenance, sources
from prefloop.config import DPOConfig, PPOConfig, SFTConfig, TrainingConfig
from prefloop.config.ranges import template_arguments
from prefloop.data import split, stream
from prefloop.data.batches import TokenBatch, pack_all, packed_length
from prefloop.data.tokenize import Example, tokenize
from prefloop.errors import UserError
from prefloop.files import read_rows, write_jsonl
from prefloop.models.model import LoadedModel
from prefloop.records import Prompt, Record, RowCounts
from prefloop.rewards.functions import FunctionJudge
from prefloop.runs import Run
from prefloop.terminal import shown
from prefloop.training.method import Step

Kind = Literal["demonstration", "preference", "unpaired"]
Monitored = SFTConfig | DPOConfig | PPOConfig
"""Settings of the commands that train what answers, and so can be monitored."""


def read_examples(
    config: TrainingConfig,
    kind: Kind,
    model: LoadedModel,
    run: Run,
    train_on: Literal["answer", "all"] = "answer",
    keep_ties: bool = False,
    refuse_margins: str = "",
    label_margins: bool = False,
) -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples; what was dropped and why is printed and recorded.

    What the model cannot read is a bad row, and a margin where the loss `refuse_margins` would not
    read it.
    """
    train, held_out, part_of = _records(config, kind, label_margins)
    _note_strings(config, model, run, [*train[0], *held_out[0]])

    def require(record: Record, example: Example) -> None:
        model.check_example(example)
        if example.margin and refuse_margins:
            raise UserError(
                f"`margin` is {example.margin:g}, and --loss {refuse_margins} reads none; remove "
                "the column, or use `reward --loss bradley-terry` or `dpo --loss sigmoid`"
            )

    limits = (config.max_length, config.truncation)
    sides = [
        tokenize(records, model.encoder, *limits, counts, train_on, keep_ties, require)
        if records
        else []
        for records, counts in (train, held_out)
    ]
    _note_rows(config, run, train, held_out)
    return _with_parts(config.data, sides[0], train[0], part_of), sides[1]


Side = tuple[list[Any], RowCounts]
"""Records, and the count of the rows they come from."""


def _records(
    config: TrainingConfig, kind: Kind | Literal["prompt"], margins: bool = False
) -> tuple[Side, Side, Mapping[int, int]]:
    """Training and held-out records with their counts: one count where one file gives both.

    And which of several sources a record (by its id) comes from.
    """
    counts, eval_counts = (RowCounts(bad_rows=config.bad_rows) for _ in range(2))
    wanted = (kind, counts, config.chat, "--data", margins)
    records, part_of = _weighted_records(config.data, *wanted)
    if config.eval_data is not None:
        of = "--eval-data"
        held_out = sources.load(config.eval_data, kind, eval_counts, config.chat, of, margins)
        return (records, counts), (held_out, eval_counts), part_of
    records, held_out = split.split_by_prompt(records, config.eval_fraction, config.seed)
    return (records, counts), (held_out, counts), part_of


def _weighted_records(
    data: sources.Data,
    kind: Kind | Literal["prompt"],
    counts: RowCounts,
    chat: bool,
    of: str,
    margins: bool = False,
) -> tuple[list[Any], Mapping[int, int]]:
    """The records of all sources, and which of them a record (by its id) comes from."""
    parts = sources.load_parts(data, kind, counts, chat, of, margins)
    part_of = {id(record): number for number, part in enumerate(parts) for record in part}
    return [record for part in parts for record in part], part_of


def _with_parts(
    data: sources.Data,
    examples: Sequence[Example],
    records: Sequence[Record],
    part_of: Mapping[int, int],
) -> list[Example]:
    """Examples that know which source they come from; each weighted one must have some."""
    numbered = [replace(e, part=part_of[id(records[e.record])]) for e in examples]
    addresses, weights = sources.addresses_and_weights(data)
    there = {example.part for example in numbered}
    if missing := [address for n, address in enumerate(addresses) if weights and n not in there]:
        raise UserError(f"{missing[0]}: no row of it is left to draw; mend it, or leave it out")
    return numbered


def order_of(
    examples: Sequence[Example], data: sources.Data, seed: int
) -> Callable[[int], list[int]]:
    """The order of an epoch's rows; by weight where the sources have weights."""
    _, weights = sources.addresses_and_weights(data)
    if not weights:
        return lambda epoch: stream.epoch_order(len(examples), seed, epoch)
    parts = [example.part for example in examples]
    return lambda epoch: stream.mixed_order(parts, weights, seed, epoch)


def _note_strings(
    config: TrainingConfig, model: LoadedModel, run: Run, records: Sequence[Record]
) -> None:
    """Says where the chat template is not applied; UserError where its arguments are in vain."""
    arguments = template_arguments(config.template_args)
    has_template = bool(model.tokenizer.chat_template)
    note = sources.strings_note(records, has_template, arguments, config.model)
    run.note(text=sources.text_kind(records))
    if note and distributed.rank() == 0:
        print(note, file=sys.stderr)


def _note_rows(config: TrainingConfig, run: Run, train: Side, held_out: Side) -> None:
    _note(run, train[1], config.data, "data")
    if config.eval_data is not None:
        _note(run, held_out[1], config.eval_data, "eval_data")


def _note(run: Run, counts: RowCounts, data: sources.Data, of: str) -> None:
    run.set_rows(counts.as_dict(), of=of)
    if distributed.rank() == 0:
        files = provenance.file_hashes(sources.addresses_and_weights(data)[0])
        run.note(sha256={**run.record.get("sha256", {}), **files})
        source = data if isinstance(data, str) else " ".join(data)
        print(f"{shown(source)}: {counts.summary()}", file=sys.stderr)
        _list_bad_rows(run, counts, of)


def _list_bad_rows(run: Run, counts: RowCounts, of: str) -> None:
    """The dropped rows of one setting, beside those of the others, in the run's bad_rows.jsonl."""
    path = run.directory / "bad_rows.jsonl"
    kept = [row for _, row in read_rows(path) if row["of"] != of] if path.exists() else []
    rows = [*kept, *({"of": of, "line": where, "reason": problem} for where, problem in counts.bad)]
    if rows:
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)


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


def read_for_ppo(
    config: PPOConfig, model: LoadedModel, run: Run, judge: FunctionJudge
) -> tuple[Prompts, Prompts, list[Example]]:
    """Training and held-out prompts, with room for the answers, and PPO-ptx's demonstrations.

    A prompt without a column that the judge's functions need is a bad row.
    """
    room = config.max_length - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-length {config.max_length} leaves no room for a prompt beside "
            f"--max-new-tokens {config.max_new_tokens}"
        )
    train, held_out, part_of = _records(config, "prompt")
    shown, shown_part_of = _demonstrations(config)
    _note_strings(config, model, run, [*train[0], *held_out[0], *shown[0]])

    def answerable(record: Record, example: Example) -> None:
        assert isinstance(record, Prompt)
        model.check_example(example, config.max_new_tokens)
        judge.require([record])

    def readable(record: Record, example: Example) -> None:
        model.check_example(example)

    rule, encoder = config.truncation, model.encoder
    sides = [
        tokenize(records, encoder, room, rule, counts, require=answerable) if records else []
        for records, counts in (train, held_out)
    ]
    _note_rows(config, run, train, held_out)
    sides[0] = _with_parts(config.data, sides[0], train[0], part_of)
    prompts, eval_prompts = (
        Prompts(tuple(records[e.record] for e in examples), tuple(examples))
        for examples, (records, _) in zip(sides, (train, held_out), strict=True)
    )
    _require_enough(config, prompts, eval_prompts)
    if config.sft_data is None:
        return prompts, eval_prompts, []
    limits = (config.max_length, rule)
    ptx = tokenize(shown[0], encoder, *limits, shown[1], require=readable)
    _note(run, shown[1], config.sft_data, "sft_data")
    return prompts, eval_prompts, _with_parts(config.sft_data, ptx, shown[0], shown_part_of)


def _require_enough(config: PPOConfig, prompts: Prompts, eval_prompts: Prompts) -> None:
    """Every rank needs a prompt for each minibatch, and one to evaluate on."""
    world, parts = distributed.world(), config.num_minibatches
    count = min(config.batch_size * parts, len(prompts.examples))
    if count < parts * world:
        raise UserError(
            f"{config.data}: {count} prompts an iteration are too few for --num-minibatches "
            f"{parts} on {world} process(es); lower it, raise --batch-size, or give more prompts"
        )
    if 0 < len(eval_prompts.examples) < world:
        raise UserError(
            f"{len(eval_prompts.examples)} held-out prompts for {world} processes; "
            "hold out at least one each"
        )


def read_monitored(
    config: Monitored, model: LoadedModel, run: Run, require: Callable[[list[Prompt]], None]
) -> Prompts:
    """The monitor's prompts, with room for the answers; one that `require` refuses is a bad row."""
    assert config.monitor_data is not None
    counts = RowCounts(bad_rows=config.bad_rows)
    records = sources.load(config.monitor_data, "prompt", counts, config.chat, "--monitor-data")

    def answerable(record: Record, example: Example) -> None:
        assert isinstance(record, Prompt)
        model.check_example(example, config.max_new_tokens)
        require([record])

    room = config.max_length - config.max_new_tokens
    examples = tokenize(records, model.encoder, room, config.truncation, counts, require=answerable)
    _note(run, counts, config.monitor_data, "monitor_data")
    return Prompts(tuple(records[e.record] for e in examples), tuple(examples))


def _demonstrations(config: PPOConfig) -> tuple[Side, Mapping[int, int]]:
    """The records of the SFT term, if any, and which source each comes from."""
    counts = RowCounts(bad_rows=config.bad_rows)
    if config.sft_data is None:
        return ([], counts), {}
    data, of = config.sft_data, "--sft-data"
    records, part_of = _weighted_records(data, "demonstration", counts, config.chat, of)
    return (records, counts), part_of


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of the run."""
    return stream.total_steps(rows, config.batch_size, config.epochs, config.max_steps)


def examples_of_steps(
    examples: Sequence[Example], config: TrainingConfig, start_step: int
) -> Iterator[list[Example]]:
    """Those of each step from `start_step` on, of all ranks."""
    for rows in stream.step_rows(
        len(examples),
        config.batch_size,
        config.epochs,
        config.max_steps,
        config.seed,
        start_step,
        order_of(examples, config.data, config.seed),
    ):
        yield [examples[row] for row in rows]


def own_batches(
    examples: Sequence[Example], config: TrainingConfig, model: LoadedModel
) -> list[TokenBatch]:
    """Micro-batches of this rank's share: as many tokens as the others', or nearly."""
    own = distributed.mine(examples, packed_length)
    return pack_all(own, config.micro_batch_tokens, not model.packed)


def supervised_steps(
    examples: Sequence[Example], config: TrainingConfig, model: LoadedModel, start_step: int
) -> Iterator[Step[TokenBatch]]:
    """The steps from `start_step` on, on this rank."""
    for chosen in examples_of_steps(examples, config, start_step):
        batches = own_batches(chosen, config, model)
        yield Step(batches, sum(batch.tokens for batch in batches))
