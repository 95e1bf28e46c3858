"""The models that TRL and prefloop both start from, and the files of TRL's numbers.

Weights follow from seeds, so a fixture holds no weights but a fingerprint of them. Imported by the
fixture scripts: no prefloop here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.tiny import LLAMA2, tiny_model, tiny_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
POLICY, REFERENCE, SCORER, CRITIC = 0, 1, 2, 3  # seeds
EOS = 2


def text_tokenizer() -> PreTrainedTokenizerFast:
    """No chat template; BOS before every text."""
    return tiny_tokenizer(chat=False, bos=True)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's template: it prints BOS itself, and nothing after the stop token."""
    return tiny_tokenizer(template=LLAMA2)


def marked_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with its answers marked, which TRL needs to train on every assistant turn."""
    answer = " {{ message['content'] }} {{ eos_token }}"
    assert answer in LLAMA2
    marked = "{% generation %}" + answer + "{% endgeneration %}"
    return tiny_tokenizer(template=LLAMA2.replace(answer, marked))


def causal_lm(seed: int) -> PreTrainedModel:
    """A tiny Llama whose EOS logit is drawn wider, so that some sampled answers stop."""
    model = tiny_model("llama", seed=seed, eos_token_id=EOS)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 4.0
    return model


def scorer(seed: int) -> PreTrainedModel:
    """A tiny Llama with one label: reward model or critic."""
    config = tiny_model("llama", eos_token_id=EOS).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def fingerprint(model: nn.Module) -> list[float]:
    """Three sums over all weights that change with any of them; equal up to rounding."""
    flat = torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])
    place = torch.arange(len(flat), dtype=torch.float64)
    return [flat.abs().sum().item(), (flat * place.cos()).sum().item(), (flat * place).sum().item()]


def grad_norm(model: nn.Module) -> float:
    """Norm of all gradients together."""
    return (
        sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
        ** 0.5
    )


def write(name: str, content: dict[str, Any]) -> None:
    """Writes one fixture file."""
    FIXTURES.mkdir(exist_ok=True)
    (FIXTURES / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read(name: str) -> dict[str, Any]:
    """Reads one fixture file."""
    content: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return content
