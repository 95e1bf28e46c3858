"""Llamas of random weights, drawn on the device: no folder of 16 GB is written or read."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Unpack

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefloop.data.tokenize import Example
from prefloop.models import adapters, shared
from prefloop.models.export import export_model
from prefloop.models.load import FLOAT32, load_tokenizer, make_ready, prepare_training
from prefloop.models.model import SCORE_POSITION, LoadedModel, LoraOptions
from prefloop.models.weights import Kept, Storage, kept, settle

SPECIALS = ("<pad>", "<bos>", "<eos>")
STORED = torch.bfloat16
"""The type of most folders of today, and of these models before they are kept in another."""


def config_of(shape: Mapping[str, Any]) -> LlamaConfig:
    """A Llama's configuration."""
    more: dict[str, Any] = {"dtype": STORED, "architectures": ["LlamaForCausalLM"], **shape}
    return LlamaConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=8192, **more
    )


def write_base(folder: Path, shape: Mapping[str, Any]) -> None:
    """A model folder without weights: a configuration, and a tokenizer of bytes, filled up."""
    config_of(shape).save_pretrained(folder)
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{number}" for number in range(len(words), shape["vocab_size"])]
    core = Tokenizer(BPE(vocab={each: i for i, each in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIALS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos
    )
    tokenizer.save_pretrained(folder)


def random_text(draw: random.Random, length: int) -> str:
    """Of so many tokens."""
    return "".join(draw.choices(ascii_lowercase, k=length))


def draw(
    config: LlamaConfig, device: torch.device, plan: Kept, scorer: bool = False
) -> PreTrainedModel:
    """Random weights; each layer is kept as `plan` says before the next is drawn."""
    kind: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    depth, shallow = config.num_hidden_layers, copy.deepcopy(config)
    shallow.num_hidden_layers, shallow.num_labels = 1, 1
    torch.manual_seed(0)
    with device:
        module: Any = kind.from_config(shallow, dtype=STORED)
    layers: nn.ModuleList = module.model.layers
    make: Any = type(layers[0])
    settle(layers[0], device, plan)
    for number in range(1, depth):
        with device:
            layer = make(module.config, number).to(STORED)
        for weight in layer.parameters():
            if weight.ndim > 1:  # norms begin as ones
                weight.data.normal_(0.0, config.initializer_range)
        settle(layer, device, plan)
        layers.append(layer)
    module.config.num_hidden_layers = depth
    if scorer:
        head = torch.empty(1, config.hidden_size)
        shared.draw_head(head, 0)
        module.score.weight.data.copy_(head)
        setattr(module.config, SCORE_POSITION, "rendered")
    drawn: PreTrainedModel = module.eval()
    return drawn


def load_policy(
    path: str,
    device: torch.device,
    storage: Storage = FLOAT32,
    *,
    scorer: bool = False,
    trained: bool = False,
    gradient_checkpointing: bool = False,
    divided: bool = False,
    template_args: Mapping[str, Any] | None = None,
    **lora: Unpack[LoraOptions],
) -> LoadedModel:
    """As prefloop loads the model of a folder; the weights that it lacks are drawn.

    `scorer`: with a head for scores.
    """
    plan = kept(storage, device, trained and not lora.get("lora_rank"))
    module = draw(AutoConfig.from_pretrained(path), device, plan, scorer)
    model = make_ready(module, load_tokenizer(path), device, path, plan, divided)
    prepare_training(model, path, gradient_checkpointing, **lora)
    return replace(model, template_args=template_args, source_dtype=STORED)


def write_reward_adapter(base: Path, folder: Path, rank: int) -> None:
    """A reward model as an adapter of the base, its weights drawn."""
    config = AutoConfig.from_pretrained(base)
    config.num_labels = 1
    setattr(config, SCORE_POSITION, "rendered")
    kind: Any = AutoModelForSequenceClassification
    with torch.device("meta"):
        module = kind.from_config(config, dtype=torch.float32)
        module.name_or_path = str(base.resolve())
        adapted = adapters.add_lora(module, rank, 2.0 * rank)
    generator = torch.Generator().manual_seed(1)
    for key, part in adapted.named_modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.requires_grad:
                values = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
                part._parameters[name] = nn.Parameter(0.1 * values if "lora_B" in key else values)
    cpu = torch.device("cpu")
    model = LoadedModel(adapted, load_tokenizer(str(base)), cpu, True, str(base))
    export_model(model, folder)


def random_ids(draw: random.Random, length: int, vocabulary: int) -> tuple[int, ...]:
    """Tokens that are no special ones."""
    return tuple(draw.randrange(len(SPECIALS), vocabulary) for _ in range(length))


def random_row(
    draw: random.Random, prompt: int, answers: tuple[int, ...], vocabulary: int, index: int = 0
) -> Example:
    """A row of these lengths, its first answer the best; all answer tokens are in the loss."""
    return Example(
        random_ids(draw, prompt, vocabulary),
        tuple(random_ids(draw, length, vocabulary) for length in answers),
        tuple((True,) * length for length in answers),
        tuple((number,) for number in range(len(answers))),
        index=index,
    )
