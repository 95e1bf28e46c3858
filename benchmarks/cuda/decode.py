"""Answers written at once: tokens a second, beside the bandwidth's bound and `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import prefloop.generation.engine
from benchmarks.ceilings import weight_bytes
from benchmarks.cuda import meter, models, stock
from benchmarks.cuda.scale import Line, Scale
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage

engines: Any = prefloop.generation.engine
WARM = 4
"""Tokens that Transformers writes before it is timed, once."""


def decoding(shape: str, scale: Scale, device: torch.device, nf4: bool = False) -> Iterator[Line]:
    """A line for each number of answers; ours by graphs, for some also without.

    `nf4`: of a model in 4 bits with adapters, as PPO's policy is; Transformers' is not beside it.
    """
    speed = meter.bandwidth(scale, device)
    yield {"what": "copies", "result": f"{speed / 1e12:.3g} TB/s", "bytes_per_second": speed}
    meter.free(device)
    with TemporaryDirectory() as name:
        models.write_base(Path(name), scale.shapes[shape])
        rank = scale.fits["ppo-8b"]["lora_rank"] if nf4 else 0
        storage = Storage("bfloat16", "nf4" if nf4 else "auto")
        model = models.load_policy(name, device, storage, lora_rank=rank)
    write = None if nf4 else stock.writer(scale.shapes[shape], device)
    for count in scale.counts:
        yield _line(model, scale, count, speed, write)


def _line(model: LoadedModel, scale: Scale, count: int, speed: float, write: Any) -> Line:
    device, tokens = model.device, count * scale.new
    prompts = [list(range(10, 10 + scale.asked)) for _ in range(count)]
    ours = partial(generate, model, prompts, scale.new)
    spent = meter.seconds(ours, device, scale.rounds)
    bound = scale.new * step_bytes(model, count, scale.asked + scale.new / 2) / speed
    result = f"{tokens / spent:,.0f} tokens/s, {bound / spent:.1%} of the bandwidth's bound"
    line: Line = {"what": f"{count} answers", "seconds": spent, "share": bound / spent}
    if count in scale.counts[::2]:  # enough to see what graphs are good for
        with without_graphs():
            line["plain"] = meter.timed(ours, device)
        result += f"; without graphs {tokens / line['plain']:,.0f}"
    if write is None:
        return line | {"result": result}
    write(prompts, WARM)
    theirs = meter.timed(partial(write, prompts, scale.new), device)
    result += f"; Transformers {tokens / theirs:,.0f}"
    return line | {"result": result, "transformers": theirs}


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within it, engines launch each kernel of a step by itself."""
    graphs, engines.as_graphs = engines.as_graphs, lambda step, *_: step
    try:
        yield
    finally:
        engines.as_graphs = graphs


@torch.no_grad()
def generate(model: LoadedModel, prompts: list[list[int]], new: int) -> None:
    """Answers of `new` tokens each."""
    sampling = Sampling(max_new_tokens=new, temperature=1.0)
    groups = Engine(model, len(prompts)).generate(prompts, 1, sampling, seed=0)
    assert all(len(sample.tokens) == new for group in groups for sample in group)


def step_bytes(model: LoadedModel, count: int, length: float) -> float:
    """Bytes that a decode step must read: every matrix once, and the keys and values of `count`
    answers of `length` tokens, all in bfloat16.
    """
    config = model.hf.config
    pair = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    states = count * length * float(pair)
    return weight_bytes(model, torch.bfloat16) + states * torch.bfloat16.itemsize
