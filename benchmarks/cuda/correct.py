"""What the fast paths lose: log-probs and gradients beside Transformers' own model in float64.

Transformers computes norms and rotary positions in float32 there, too, so that its numbers are
exact to some 1e-7.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

import prefloop.generation.engine
from benchmarks.cuda import models, stock
from benchmarks.cuda.scale import Line, Scale
from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.generation.engine import Engine
from prefloop.generation.graphs import Graphs
from prefloop.generation.protocol import Sample
from prefloop.generation.sampler import Sampling
from prefloop.losses.sft import sft_loss
from prefloop.models import heads
from prefloop.models.model import LoadedModel
from prefloop.models.precision import Products, autocast

engines: Any = prefloop.generation.engine
EXACT = 1e-4
"""Most error of float32: nats of a log-prob, share of the gradient's norm."""
BOUND = 1.3
"""Most error of bfloat16, in units of that of Transformers' padded model under autocast."""


class Error(NamedTuple):
    """Of log-probs: the largest and the root mean square, in nats; of a gradient: of its norm."""

    largest: float
    usual: float
    gradient: float | None


def correctness(scale: Scale, device: torch.device) -> Iterator[Line]:
    """A line for each path; AssertionError at the end where one was beyond its bound."""
    with TemporaryDirectory() as name:
        models.write_base(Path(name), scale.check)
        model = models.load_policy(name, device, trained=True)
    assert model.packed
    plain: Any = copy.deepcopy(model.hf).double()
    plain.set_attn_implementation("sdpa")
    draw, vocabulary = random.Random(0), scale.check["vocab_size"]
    rows = [models.random_row(draw, p, a, vocabulary) for p, a in scale.lengths]
    wrong: list[str] = []
    for line in [*_training(model, plain, rows), *_decoding(model, plain, rows, scale)]:
        yield line
        if not line["holds"]:
            wrong.append(line["what"])
    assert not wrong, f"beyond their bounds: {'; '.join(wrong)}"


def _training(model: LoadedModel, plain: Any, rows: list[Example]) -> Iterator[Line]:
    """What a training step computes."""
    exact = one_by_one(plain, rows, model.device)
    exact_gradient = _gradient(list(plain.parameters()), exact)
    batch = pack(rows).to(model.device)

    def packed(dtype: Products, varlen: bool) -> Tensor:
        return heads.answer_log_probs(replace(model, dtype=dtype, varlen=varlen), batch)

    def error(compute: Callable[[], Tensor]) -> Error:
        found = compute()
        gradient = _gradient(model.trainable(), found)
        apart = float((gradient - exact_gradient).norm() / exact_gradient.norm())
        return _error(found, exact)._replace(gradient=apart)

    theirs = error(lambda: padded(model, rows))
    yield _line("Transformers, padded, bfloat16", theirs, None)
    yield _line("packed, float32", error(lambda: packed("float32", False)), None)
    yield _line("packed, bfloat16", error(lambda: packed("bfloat16", False)), theirs)
    if model.varlen:
        yield _line("FlashAttention, bfloat16", error(lambda: packed("bfloat16", True)), theirs)


def _decoding(model: LoadedModel, plain: Any, rows: list[Example], scale: Scale) -> Iterator[Line]:
    """The log-probs of sampled tokens, as they were when they were drawn."""
    kinds: tuple[Products, ...] = ("float32", "bfloat16")
    for dtype in kinds:
        with seen_graphs() as made:
            samples = _sample(replace(model, dtype=dtype), rows, scale.new)
        works = [graph.works and bool(graph.recorded) for graph in made]
        assert all(works) and len(works) == (model.device.type == "cuda"), works
        answered = [
            replace(
                row,
                answers=tuple(s.tokens for s in group),
                answer_masks=tuple((True,) * len(s.tokens) for s in group),
            )
            for row, group in zip(rows, samples, strict=True)
        ]
        with torch.no_grad():
            exact = one_by_one(plain, answered, model.device)
            theirs = _error(padded(model, answered), exact)
        drawn = torch.tensor([x for g in samples for s in g for x in s.log_probs])
        what = f"decode steps{' by graphs' if works else ''}, {dtype}"
        error = _error(drawn.to(model.device), exact)
        yield _line(what, error, theirs if dtype == "bfloat16" else None)


def _sample(model: LoadedModel, rows: list[Example], new: int) -> list[list[Sample]]:
    """Two answers to each prompt; fewer slots than answers, so that some follow others."""
    sampling = Sampling(max_new_tokens=new, temperature=1.0)
    return Engine(model, 3).generate([row.prompt for row in rows], 2, sampling, seed=1)


@contextmanager
def seen_graphs() -> Iterator[list[Graphs]]:
    """Within it, the decode graphs that engines make are collected."""
    made: list[Graphs] = []
    build = engines.as_graphs

    def as_graphs(*args: Any) -> Any:
        step = build(*args)
        if isinstance(step, Graphs):
            made.append(step)
        return step

    engines.as_graphs = as_graphs
    try:
        yield made
    finally:
        engines.as_graphs = build


def one_by_one(plain: Any, rows: Sequence[Example], device: torch.device) -> Tensor:
    """Log-probs [N] of answers' tokens, each sequence alone."""
    alone = ([each] for each in stock.sequences_of(rows))
    return torch.cat([stock.answer_log_probs(plain, one, device) for one in alone])


def padded(model: LoadedModel, rows: Sequence[Example]) -> Tensor:
    """The same by Transformers as its users run it in bfloat16."""
    with stock.as_it_came(model.hf), autocast(model.device, "bfloat16"):
        return stock.answer_log_probs(model.hf, stock.sequences_of(rows), model.device)


def _gradient(parameters: list[Any], log_probs: Tensor) -> Tensor:
    """Of the mean loss, as one vector in float64."""
    loss = sft_loss(log_probs).sum / len(log_probs)
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, parameters)])


def _error(found: Tensor, exact: Tensor) -> Error:
    gap = found.detach().double() - exact.detach().double()
    return Error(float(gap.abs().max()), float(gap.square().mean().sqrt()), None)


def _line(what: str, error: Error, theirs: Error | None) -> Line:
    """`theirs` bounds what is in bfloat16."""
    result = f"log-probs off by {error.usual:.1e} nats (root mean square), {error.largest:.1e} "
    result += "at most"
    if error.gradient is not None:
        result += f"; gradient by {error.gradient:.1e} of its norm"
    holds = True
    if theirs is not None:
        result += f"; {error.usual / theirs.usual:.2f} times Transformers' error"
        holds = error.usual <= BOUND * theirs.usual
        if error.gradient is not None and theirs.gradient is not None:
            result += f", gradient {error.gradient / theirs.gradient:.2f} times"
            holds &= error.gradient <= BOUND * theirs.gradient
    elif "float32" in what:
        holds = error.largest <= EXACT and (error.gradient or 0.0) <= EXACT
    if not holds:
        result += "; TOO FAR"
    return {"what": what, "result": result, "holds": holds} | error._asdict()
