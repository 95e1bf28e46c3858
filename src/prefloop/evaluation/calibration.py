"""How far a reward model can be trusted: accuracy, log loss, calibration, length, ceiling."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloop.config import RewardQualityConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.errors import UserError
from prefloop.files import check_writable, write_atomic
from prefloop.intervals import Interval
from prefloop.labelling.agreement import ceiling, share_by_prompt
from prefloop.records import RowCounts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Pairs of one range: how often the better answer scored higher, and how often it should."""

    low: float
    high: float
    pairs: int
    accuracy: float  # ties half
    expected: float  # mean of sigma(|delta r|)


@dataclass(frozen=True)
class Calibration:
    """A reward model on M pairs of a better and a worse answer."""

    pairs: int
    accuracy: float  # ties half
    log_loss: float  # -mean log sigma(r_better - r_worse), nats
    bins: tuple[Bin, ...]  # by |delta r|, as many pairs in each
    length_bins: tuple[Bin, ...]  # by tokens of the better minus tokens of the worse answer
    always_longer_accuracy: float  # of "the longer answer is better", ties half


def calibrate(
    better: Sequence[float],
    worse: Sequence[float],
    better_lengths: Sequence[int],
    worse_lengths: Sequence[int],
    bins: int = 5,
) -> Calibration:
    """Calibration from the scores and lengths of each pair's two answers, [M] each."""
    if not better:
        raise ValueError("calibrate: no pairs")
    delta = np.asarray(better, dtype=np.float64) - np.asarray(worse, dtype=np.float64)
    longer = np.asarray(better_lengths, dtype=np.float64) - np.asarray(worse_lengths)
    right = _wins(delta)
    return Calibration(
        pairs=len(delta),
        accuracy=float(right.mean()),
        log_loss=float(np.logaddexp(0.0, -delta).mean()),
        bins=_bins(np.abs(delta), right, delta, bins),
        length_bins=_bins(longer, right, delta, bins),
        always_longer_accuracy=float(_wins(longer).mean()),
    )


@dataclass(frozen=True)
class RewardCalibration:
    """A reward model beside the judge, on what policies wrote; and on its held-out labels."""

    accuracy: Interval  # pairs ordered as the judge orders them, the model's ties half
    pairs: Calibration  # of answers to one prompt that the judge scores differently
    held_out_accuracy: float | None  # on the labels that its run held out
    ceiling: tuple[float, float] | None  # of that accuracy, by the labellers' agreement


def beside_judge(
    gold: Sequence[Sequence[float]],
    proxy: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    held_out_accuracy: float | None = None,
    agreement: float | None = None,
) -> RewardCalibration | None:
    """From the judge's and the model's scores, and the tokens, of all answers by prompt.

    Every two answers to a prompt are a pair, unless the judge scores them alike; prompts are what
    the interval draws. None where there is no pair.
    """
    found: list[tuple[float, float, int, int]] = []
    prompts: list[int] = []
    for prompt, answers in enumerate(zip(gold, proxy, lengths, strict=True)):
        for one, other in combinations(zip(*answers, strict=True), 2):
            if one[0] != other[0]:
                win, lose = (one, other) if one[0] > other[0] else (other, one)
                found.append((win[1], lose[1], win[2], lose[2]))
                prompts.append(prompt)
    if not found:
        return None
    better, worse, long, short = (list(column) for column in zip(*found, strict=True))
    pairs = calibrate(better, worse, long, short)
    right = _wins(np.asarray(better, dtype=np.float64) - np.asarray(worse, dtype=np.float64))
    return RewardCalibration(
        accuracy=share_by_prompt(right, np.array(prompts)),
        pairs=pairs,
        held_out_accuracy=held_out_accuracy,
        ceiling=None if agreement is None else ceiling(agreement),
    )


def _wins(difference: Array) -> Array:
    return (1 + np.sign(difference)) / 2


def _bins(key: Array, right: Array, delta: Array, count: int) -> tuple[Bin, ...]:
    parts = np.array_split(np.argsort(key, kind="stable"), count)
    return tuple(
        Bin(
            low=float(key[part[0]]),
            high=float(key[part[-1]]),
            pairs=len(part),
            accuracy=float(right[part].mean()),
            expected=float((1 / (1 + np.exp(-np.abs(delta[part])))).mean()),
        )
        for part in parts
        if len(part)
    )


def run(config: RewardQualityConfig) -> dict[str, Any]:
    """`prefloop evaluate reward-model`: score every answer once, then compare all strict pairs."""
    validate(config)
    import torch

    from prefloop import sources
    from prefloop.data.batches import pack_all
    from prefloop.data.tokenize import tokenize
    from prefloop.models.heads import answer_scores
    from prefloop.models.load import load_reward_model, pick_device
    from prefloop.models.pieces import in_pieces
    from prefloop.models.weights import storage_of

    if config.output is not None:
        check_writable(config.output)
    arguments = template_arguments(config.template_args)
    device, storage = pick_device(config.device), storage_of(config)
    model = load_reward_model(config.reward_model, device, storage, arguments)
    records = sources.load(config.data, "preference", counts := RowCounts(), config.chat)
    examples = tokenize(records, model.encoder, config.max_length, config.truncation, counts)
    print(counts.summary(), file=sys.stderr)
    for example in examples:
        model.check_example(example)
    has_template = bool(model.tokenizer.chat_template)
    if note := sources.strings_note(records, has_template, arguments, config.reward_model):
        print(note, file=sys.stderr)
    pairs: list[tuple[float, float, int, int]] = []
    with torch.no_grad():
        most = config.micro_batch_tokens
        for batch in pack_all(examples, most, not model.packed):
            scores = in_pieces(answer_scores, model, batch.to(model.device), most).tolist()
            lengths = [len(answer) for example in batch.examples for answer in example.answers]
            for w, l in zip(*(side.tolist() for side in batch.pairs()), strict=True):
                pairs.append((scores[w], scores[l], lengths[w], lengths[l]))
    if not pairs:
        raise UserError(f"{config.data}: all answers are tied; give rankings with an order")
    better, worse, better_lengths, worse_lengths = zip(*pairs, strict=True)
    result = asdict(calibrate(better, worse, better_lengths, worse_lengths))
    result["rankings"] = len(examples)
    result["tied_pairs"] = counts.tied_pairs
    if config.agreement is not None:
        result["ceiling"] = ceiling(config.agreement)
    if config.output is not None:
        write_atomic(config.output, json.dumps(result, indent=2) + "\n")
    return result
