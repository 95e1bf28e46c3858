"""The independent side: one plain Transformers forward per sequence, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def token_log_probs(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """log pi(y_t | x, y_<t) of each answer token."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def token_values(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Values of the states before each answer token and after the last, [T + 1]."""
    ids = torch.tensor([[*prompt, *answer]])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(hidden).squeeze(-1)  # type: ignore[no-any-return]


def score(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Score at the last token."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0, 0]  # type: ignore[no-any-return]
