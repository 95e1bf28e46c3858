"""The independent way: Transformers' own forward, one unpadded sequence at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefloop.data.tokenize import Example
from prefloop.models import selftest
from prefloop.models.model import LoadedModel
from tests.tiny import Arch, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SHAPES = ((9, (4,)), (1, (1, 6)), (14, (3, 1, 8)), (5, (2, 2, 11, 7)), (2, (9, 1, 1, 5, 20)))
"""Lengths of prompts and of their answers; the windows of the tiny models are 6 tokens."""


def loaded(module: PreTrainedModel) -> LoadedModel:
    """The model after the self-test, as loading a folder would give it."""
    model = LoadedModel(module, tiny_tokenizer(), CPU, False, "tiny")
    selftest.choose_path(model)
    return model


def with_plain_twin(module: PreTrainedModel) -> tuple[LoadedModel, PreTrainedModel]:
    """The model as this package runs it, and a copy as Transformers does."""
    twin = copy.deepcopy(module)
    return loaded(module), twin


def tiny_scorer(arch: Arch, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random sequence classifier with one label."""
    config = tiny_model(arch).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return module.eval()


def random_examples(
    shapes: Sequence[tuple[int, Sequence[int]]] = SHAPES, seed: int = 0, vocabulary: int = 268
) -> list[Example]:
    """Random ids of these lengths; of three answer tokens the second is not in the loss."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (length,), generator=generator).tolist())

    return [
        Example(
            prompt=ids(prompt),
            answers=tuple(ids(length) for length in answers),
            answer_masks=tuple(tuple(t % 3 != 1 for t in range(n)) for n in answers),
            index=index,
        )
        for index, (prompt, answers) in enumerate(shapes)
    ]


def sequences(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Each answer's whole sequence, and the places in it of its loss tokens."""
    found = []
    for example in examples:
        for answer, mask in zip(example.answers, example.answer_masks, strict=True):
            start = len(example.prompt)
            ids = [*example.prompt, *answer]
            found.append((ids, [start + i for i, keep in enumerate(mask) if keep and start + i]))
    return found


def plain_log_probs(module: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """log pi [N] of the loss tokens."""
    parts = []
    for ids, places in sequences(examples):
        log_p = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        parts.append(torch.stack([log_p[place - 1, ids[place]] for place in places]))
    return torch.cat(parts)


def plain_scores(module: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Scores [A] of the answers."""
    return torch.cat(
        [module(input_ids=torch.tensor([ids])).logits[0] for ids, _ in sequences(examples)]
    )


def plain_values(module: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The head's output [N] on the state before each loss token."""
    parts = []
    for ids, places in sequences(examples):
        hidden = module.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        head: Any = module.score
        parts.append(head(hidden)[:, 0][torch.tensor(places) - 1])
    return torch.cat(parts)


def gradients(module: PreTrainedModel, numbers: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the numbers, by parameter."""
    weights = torch.randn(len(numbers), generator=torch.Generator().manual_seed(7))
    module.zero_grad()
    (numbers * weights.to(numbers.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_close(ours: Tensor, plain: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the larger of 1 and the largest plain number."""
    assert ours.shape == plain.shape
    worst = float((ours - plain).detach().abs().max())
    assert worst <= tolerance * max(1.0, float(plain.detach().abs().max()))


def assert_same_gradients(
    ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float
) -> None:
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert_close(ours[name], gradient, tolerance)


def varlen_by_hand(
    q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa=None
):
    """What torch documents of varlen_attn: q [T, H, D], its mask aligned at the last key."""
    assert q.dtype == k.dtype == v.dtype and ends_q.dtype == ends_k.dtype == torch.int32
    assert enable_gqa in (None, q.shape[1] != k.shape[1])  # torch 2.11 does not ask
    assert v.shape[2] == q.shape[2]
    assert int(ends_q.diff().max()) == longest_q and int(ends_k.diff().max()) == longest_k
    output = []
    for index in range(len(ends_q) - 1):
        queries = slice(int(ends_q[index]), int(ends_q[index + 1]))
        keys = slice(int(ends_k[index]), int(ends_k[index + 1]))
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        ahead = torch.arange(columns) - (torch.arange(rows)[:, None] + columns - rows)
        seen = ahead <= window_size[1]
        if window_size[0] >= 0:
            seen &= ahead >= -window_size[0]
        parts = (x[rows_].transpose(0, 1) for x, rows_ in ((q, queries), (k, keys), (v, keys)))
        attended = scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=scale, enable_gqa=True
        )
        output.append(attended.transpose(0, 1))
    return torch.cat(output)
