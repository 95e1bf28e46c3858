"""Steps of SFT and DPO: forward, backward and AdamW, with Transformers' padded model beside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import model_flops
from benchmarks.cuda import meter, models, stock
from benchmarks.cuda.scale import Line, Scale
from prefloop.config import DPOConfig, SFTConfig, TrainingConfig
from prefloop.data.batches import TokenBatch, pack_all
from prefloop.data.tokenize import Example
from prefloop.models.heads import sequence_log_probs
from prefloop.models.model import LoadedModel
from prefloop.training import optim
from prefloop.training.preference import Preference
from prefloop.training.sft import SFT
from prefloop.training.start import model_options
from prefloop.training.step import optimizer_step

LORA: dict[str, Any] = {"lora_rank": 16, "gradient_checkpointing": True}
"""How the model is trained that is too large to be trained whole."""


class FreshReference:
    """References (training/reference.py) of a policy as it is now, without a file or a digest."""

    digest = ""

    def __init__(
        self, config: DPOConfig, policy: LoadedModel, examples: list[Example], cache: Path
    ) -> None:
        sums = sequence_log_probs(policy, examples, config.micro_batch_tokens)
        parts = sums.split([len(e.answers) for e in examples])
        self.log_probs = {id(e): part for e, part in zip(examples, parts, strict=True)}

    def of(self, batch: TokenBatch) -> Tensor:
        """See References."""
        return torch.cat([self.log_probs[id(e)] for e in batch.examples])


def training(shape: str, scale: Scale, device: torch.device) -> Iterator[Line]:
    """Seconds, tokens a second, MFU and peak memory; weights in float32, products in bfloat16."""
    rate = meter.product_rate(scale, device)
    yield {"what": "products in bfloat16", "result": f"{rate / 1e12:,.3g} TFLOP/s", "flops": rate}
    with TemporaryDirectory() as name:
        base = Path(name) / "base"
        models.write_base(base, scale.shapes[shape])
        settings: dict[str, Any] = {
            "model": str(base), "data": "rows", "output": Path(name) / "run", "lr": 1e-6,
            "dtype": "bfloat16", "micro_batch_tokens": scale.budget[shape],
        } | ({} if shape in scale.stock_budget else LORA)  # fmt: skip
        meter.free(device)
        sft, dpo = SFTConfig(**settings), DPOConfig(**settings)
        model = models.load_policy(sft.model, device, **model_options(sft))
        rows = pairs(scale, shape)
        singles = [replace(e, answers=e.answers[:1], answer_masks=e.answer_masks[:1], tiers=((0,),))
                   for e in rows]  # fmt: skip
        for config, examples in ((sft, singles), (dpo, rows)):
            yield from _steps(shape, scale, model, config, examples, rate)


def pairs(scale: Scale, shape: str) -> list[Example]:
    """Rows of two answers, of random tokens and lengths."""
    draw, vocabulary = random.Random(0), scale.shapes[shape]["vocab_size"]

    def row(index: int) -> Example:
        prompt, *answers = (draw.randint(*x) for x in (scale.prompt, scale.answer, scale.answer))
        return models.random_row(draw, prompt, tuple(answers), vocabulary, index)

    return [row(index) for index in range(scale.pairs)]


def _steps(
    shape: str,
    scale: Scale,
    model: LoadedModel,
    config: TrainingConfig,
    examples: list[Example],
    rate: float,
) -> Iterator[Line]:
    """One method's step, and Transformers' own."""
    device, budget = model.device, scale.budget[shape]
    batches: list[Any] = pack_all(examples, budget)
    positions = [(b.position_ids, b.target_ids.numel()) for b in batches]
    flops = sum(model_flops(model, where, head, trains=True) for where, head in positions)
    tokens = sum(len(p) + len(a) for p, a in stock.sequences_of(examples))
    parameters = {"policy": model.trainable()}
    optimizer = optim.build_optimizer(parameters, config, {})
    method: Any
    if isinstance(config, DPOConfig):
        name = "dpo"
        method = Preference(config, model, examples, [], Path(), FreshReference)
    else:
        name = "sft"
        assert isinstance(config, SFTConfig)
        method = SFT(config, model, examples, [])
    steps = {name: partial(optimizer_step, method, batches, parameters, optimizer, config)}
    if shape in scale.stock_budget:
        of = stock.step(model, examples, optimizer, name, scale.stock_budget[shape])
        steps[f"{name}, Transformers"] = of  # type: ignore[assignment]
    for what, step in steps.items():
        meter.free(device)
        spent = meter.seconds(step, device, scale.rounds)
        yield _line(what, spent, tokens, flops / spent / rate, meter.peak_gib(device))


def _line(what: str, spent: float, tokens: int, mfu: float, peak: float | None) -> Line:
    """Tokens are those of whole sequences, however often a prompt is computed."""
    result = f"{spent:.3f} s a step, {tokens / spent:,.0f} tokens/s, MFU {mfu:.1%}"
    if peak is not None:
        result += f", peak {peak:.1f} GiB"
    return {"what": what, "result": result, "seconds": spent, "tokens_per_second": tokens / spent,
            "mfu": mfu, "peak_gib": peak}  # fmt: skip
