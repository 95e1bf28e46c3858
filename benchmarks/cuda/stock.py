"""Transformers' own side: the same model, as its users write a step or have answers written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.cuda.models import STORED, config_of
from prefloop.data.tokenize import Example
from prefloop.losses.preference import sigmoid_loss
from prefloop.models.model import LoadedModel
from prefloop.models.precision import autocast

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts with an answer each."""


@contextmanager
def as_it_came(hf: Any) -> Iterator[None]:
    """Within it, the model computes as Transformers does, with sdpa."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def sequences_of(examples: Sequence[Example]) -> Sequences:
    """Each answer behind its own copy of the prompt."""
    return [(e.prompt, a) for e in examples for a in e.answers]


def log_probs(hf: Any, group: Sequences, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T] of the tokens of padded sequences, and which of them are answers' [B, T]."""
    ids = [torch.tensor([*p, *a], device=device) for p, a in group]
    batch = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    logits = hf(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.gather(-1, batch[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    places = torch.arange(batch.shape[1] - 1, device=device)
    starts = torch.tensor([[len(p) - 1] for p, _ in group], device=device)
    return picked, (places >= starts) & mask[:, 1:].bool()


def answer_log_probs(hf: Any, group: Sequences, device: torch.device) -> Tensor:
    """Of the answers' tokens alone [N], in their order."""
    picked, answers = log_probs(hf, group, device)
    return picked[answers]


def step(
    model: LoadedModel, examples: Sequence[Example], optimizer: Any, name: str, budget: int
) -> Callable[[], float]:
    """A step of `sft` or `dpo` under autocast, padded, with the logits of every token."""
    hf, sequences = model.hf, sequences_of(examples)
    longest = max(len(p) + len(a) for p, a in sequences)
    per = max(2, budget // longest // 2 * 2)  # padded sequences in the same budget of tokens
    groups = [sequences[i : i + per] for i in range(0, len(sequences), per)]
    tokens = sum(len(a) for _, a in sequences)

    def take() -> float:
        total = 0.0
        optimizer.zero_grad()
        with as_it_came(hf):
            for group in groups:
                with autocast(model.device, "bfloat16"):
                    picked, answers = log_probs(hf, group, model.device)
                sums = (picked * answers).sum(1)
                if name == "sft":
                    loss = -sums.sum() / tokens
                else:
                    pairs, zeros = len(sequences) / 2, torch.zeros_like(sums[::2])
                    loss = sigmoid_loss(sums[::2], sums[1::2], zeros, zeros, beta=0.1).sum / pairs
                loss.backward()
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
        optimizer.step()
        return total

    return take


def writer(
    shape: Mapping[str, Any], device: torch.device
) -> Callable[[Sequence[Sequence[int]], int], None]:
    """`generate`, of a model all in bfloat16, of prompts of one length: so many tokens to each."""
    torch.manual_seed(0)
    with device:
        hf: Any = AutoModelForCausalLM.from_config(config_of(shape), dtype=STORED).eval()

    @torch.no_grad()
    def write(prompts: Sequence[Sequence[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=device)
        written = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
        assert written.shape[1] == ids.shape[1] + new

    return write
