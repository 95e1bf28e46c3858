"""TokenBatch: examples packed into one flat stream of tokens with a segment tree, and no padding.

A prompt is a segment and each of its answers is a segment that continues it, so the prompt stands
in the stream once however many answers it has:

    rows       [prompt 0 | answer 0a | answer 0b | prompt 1 | answer 1a | ...]
    positions   0 1 2 3    4 5 6       4 5         0 1 2      3 4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefloop.data.tokenize import Example


@dataclass(frozen=True)
class Segment:
    """A run of tokens in the stream; it sees itself causally and all of its ancestors."""

    start: int
    length: int
    parent: int  # index of the segment it continues, or -1
    position: int  # position id of its first token

    @property
    def rows(self) -> range:
        """Its rows in the stream."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True)
class TokenBatch:
    """T tokens holding A answers with N loss tokens."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    segments: tuple[Segment, ...]
    target_ids: Tensor  # [N] the answer tokens in the loss
    source_index: Tensor  # [N] row whose hidden state predicts the target
    target_answer: Tensor  # [N] the answer (0..A-1) a target belongs to
    last_index: Tensor  # [A] row of each answer's last token
    answer_example: Tensor  # [A] the example each answer belongs to
    answer_segment: tuple[int, ...]  # [A] segment of each answer
    examples: tuple[Example, ...]
    plans: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Attention plans by their form, made once for all that read the batch."""

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return int(self.input_ids.numel())

    @property
    def answers(self) -> int:
        """Answers in the stream."""
        return int(self.last_index.numel())

    def paths(self) -> list[list[int]]:
        """Each answer's whole sequence as rows of the stream: its ancestors' and its own."""
        return [rows_of_path(self.segments, s) for s in self.answer_segment]

    def by_example(self, values: Tensor) -> Tensor:
        """Values of answers [A] as [examples, K], zero where an example has fewer answers."""
        counts = [len(example.answers) for example in self.examples]
        return pad_sequence(list(values.split(counts)), batch_first=True)

    def tiers(self) -> Tensor:
        """The rank of each answer [examples, K]: 0 is best, equal is a tie, -1 is no answer."""
        width = max(len(example.answers) for example in self.examples)
        ranks = torch.full((len(self.examples), width), -1)
        for line, example in enumerate(self.examples):
            for rank, tier in enumerate(example.tiers):
                ranks[line, list(tier)] = rank
        return ranks.to(self.input_ids.device)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Answers (winners [M], losers [M]) of every strictly ordered pair."""
        pairs, first = [], 0
        for example in self.examples:
            for above, below in combinations(example.tiers, 2):
                pairs += [(first + w, first + l) for w in above for l in below]
            first += len(example.answers)
        both = torch.tensor(pairs, dtype=torch.long).view(-1, 2).to(self.input_ids.device)
        return both[:, 0], both[:, 1]

    def margins(self) -> Tensor:
        """The margin [examples, 1, 1] by which a preferred answer should lead."""
        margins = torch.tensor([example.margin for example in self.examples])
        return margins.view(-1, 1, 1).to(self.input_ids.device)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with its tensors on `device`.

        Plans stay behind, so that they live no longer than what was moved for the computation.
        """
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return TokenBatch(**{**vars(self), **moved, "plans": {}})


def rows_of_path(segments: Sequence[Segment], index: int) -> list[int]:
    """Rows of a segment's ancestors, outermost first, and its own."""
    rows: list[int] = []
    while index >= 0:
        rows = [*segments[index].rows, *rows]
        index = segments[index].parent
    return rows


def pack(examples: Sequence[Example]) -> TokenBatch:
    """Packs examples; answers keep the order of the examples and of the answers within each."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    targets: list[int] = []
    sources: list[int] = []
    target_answer: list[int] = []
    last: list[int] = []
    answer_example: list[int] = []
    answer_segment: list[int] = []

    def add(tokens: Sequence[int], parent: int, position: int) -> int:
        segments.append(Segment(len(ids), len(tokens), parent, position))
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        return len(segments) - 1

    for number, example in enumerate(examples):
        prompt = add(example.prompt, -1, 0) if example.prompt else -1
        before = segments[prompt].rows[-1] if example.prompt else -1
        for answer, mask in zip(example.answers, example.answer_masks, strict=True):
            segment = segments[add(answer, prompt, len(example.prompt))]
            rows = list(segment.rows)
            for token, keep, source in zip(answer, mask, [before, *rows[:-1]], strict=True):
                if keep and source >= 0:  # a stream's very first token has nothing to predict it
                    targets.append(token)
                    sources.append(source)
                    target_answer.append(len(last))
            last.append(rows[-1])
            answer_example.append(number)
            answer_segment.append(len(segments) - 1)

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long)

    return TokenBatch(
        input_ids=long(ids),
        position_ids=long(positions),
        segments=tuple(segments),
        target_ids=long(targets),
        source_index=long(sources),
        target_answer=long(target_answer),
        last_index=long(last),
        answer_example=long(answer_example),
        answer_segment=tuple(answer_segment),
        examples=tuple(examples),
    )


def packed_length(example: Example) -> int:
    """Tokens an example takes in a stream."""
    return len(example.prompt) + sum(len(answer) for answer in example.answers)


def micro_batches(
    examples: Sequence[Example], max_tokens: int, padded: bool = False
) -> list[list[Example]]:
    """Splits one step's examples, in order, into groups of at most `max_tokens` computed tokens.

    An example longer than the budget gets a group of its own.
    """
    groups: list[list[Example]] = []
    rows = width = used = 0  # of the group: answers, the longest sequence, packed tokens
    for example in examples:
        longest = len(example.prompt) + max(map(len, example.answers), default=0)
        rows, width = rows + len(example.answers), max(width, longest)
        used += packed_length(example)
        if not groups or (rows * width if padded else used) > max_tokens:
            groups.append([])
            rows, width, used = len(example.answers), longest, packed_length(example)
        groups[-1].append(example)
    return groups


def pack_all(
    examples: Sequence[Example], micro_batch_tokens: int, padded: bool = False
) -> list[TokenBatch]:
    """Packed micro-batches, in the order of the examples, in main memory."""
    return [pack(group) for group in micro_batches(examples, micro_batch_tokens, padded)]


def to_batches(
    examples: Sequence[Example],
    micro_batch_tokens: int,
    device: torch.device,
    padded: bool = False,
) -> Iterator[TokenBatch]:
    """The same on the device, one at a time."""
    for group in micro_batches(examples, micro_batch_tokens, padded):
        yield pack(group).to(device)
