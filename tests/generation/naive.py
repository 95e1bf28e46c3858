"""Decoding as it is defined: the whole sequence through plain Transformers for every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prefloop.models.load import FLOAT32, make_ready, prepare_training
from prefloop.models.model import LoadedModel
from prefloop.models.weights import kept
from tests.tiny import Arch, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = [[5 + (7 * i * i + 3 * n) % 250 for i in range(n)] for n in (3, 11, 1, 8, 20)]


def policy(arch: Arch = "llama", *, lora_rank: int = 0, **overrides: object) -> LoadedModel:
    model = tiny_model(arch, **overrides)  # type: ignore[arg-type]
    ready = make_ready(model, tiny_tokenizer(), CPU, "tiny", kept(FLOAT32, CPU, True))
    prepare_training(ready, "tiny", False, lora_rank=lora_rank)
    assert ready.packed
    return ready


def unpacked(arch: Arch = "llama") -> LoadedModel:
    """The same policy as one that failed the self-test."""
    model = tiny_model(arch)
    model.set_attn_implementation("sdpa")
    return LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), False, "tiny")


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], new: int, stop: int = -1) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(scores.argmax()))
        if ids[-1] == stop:
            break
    return ids[len(prompt) :]
