"""The same numbers on a GPU as on the CPU; `make cuda` runs these where there is one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.generation import engine, graphs
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.losses.sft import sft_loss
from prefloop.models import heads
from prefloop.models.load import FLOAT32, make_ready, prepare_training
from prefloop.models.model import LoadedModel
from prefloop.models.weights import kept
from tests.generation.naive import PROMPTS
from tests.models.plain import random_examples
from tests.tiny import ARCHS, Arch, tiny_model, tiny_tokenizer
from tests.training import small
from tests.training.cases import CASES, run_case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda", 0)
LONG = ((300, (200, 40, 3)), (5, (700,)), (150, (1, 60)))
WARM = Sampling(max_new_tokens=70, temperature=0.9, stop_token_ids={9, 60, 61})


def on_cuda(arch: Arch = "llama", lora_rank: int = 0) -> LoadedModel:
    """A tiny policy as loading it on CUDA gives it."""
    model = make_ready(tiny_model(arch), tiny_tokenizer(), CUDA, "tiny", kept(FLOAT32, CUDA, True))
    prepare_training(model, "tiny", False, lora_rank=lora_rank)
    assert model.packed
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_as_on_the_cpu(name: str, world: Path, tmp_path: Path) -> None:
    """float32: losses, metrics, evaluation and final weights, answers sampled on the way."""
    run_case(name, world, tmp_path / "cpu")
    run_case(name, world, tmp_path / "cuda", device="cuda")
    small.assert_close_runs(tmp_path / "cpu", tmp_path / "cuda", 2e-4, skip=("grad_norm",))


@pytest.mark.parametrize("more", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", ["sft", "bradley-terry", "dpo-sigmoid", "ppo-gae"])
def test_bfloat16_trains_to_nearly_the_same_loss(
    name: str, more: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    run_case(name, world, tmp_path / "exact", device="cuda", max_steps=1, **more)
    run_case(name, world, tmp_path / "half", device="cuda", max_steps=1, dtype="bfloat16", **more)
    exact, half = (small.lines(tmp_path / kind)[0] for kind in ("exact", "half"))
    if name != "ppo-gae":  # where answers are drawn, other ones
        assert half["loss"] == pytest.approx(exact["loss"], abs=0.05 * max(1, abs(exact["loss"])))
    assert half["grad_norm"] > 0


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_resumed_runs_go_on_as_they_were(command: str, world: Path, tmp_path: Path) -> None:
    small.train(command, world, tmp_path / "whole", device="cuda", save_every=2, max_steps=4)
    small.only_checkpoint(tmp_path / "whole", tmp_path / "half", 2)
    small.train(command, world, tmp_path / "half", device="cuda", save_every=2, max_steps=4)
    assert [line["step"] for line in small.lines(tmp_path / "half")][-1] == 4
    small.assert_close_runs(tmp_path / "whole", tmp_path / "half", 1e-4, skip=("grad_norm",))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral"])
def test_varlen_gradients_lose_no_more_than_rectangles(arch: Arch, checkpointing: bool) -> None:
    """Shared prompts, segments of 1 to 700 tokens: against float32's own gradient."""
    model = on_cuda(arch)
    assert model.packed and model.varlen
    if checkpointing:
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        model.module.train()
    batch = pack(random_examples(LONG)).to(CUDA)

    def gradient(dtype: str, varlen: bool) -> torch.Tensor:
        model.module.zero_grad()
        how = replace(model, varlen=varlen, dtype=dtype)
        log_probs = heads.answer_log_probs(how, batch)
        sft_loss(log_probs).sum.backward()
        return torch.cat([p.grad.flatten() for p in model.trainable() if p.grad is not None])

    exact = gradient("float32", False)
    errors = [float((gradient("bfloat16", on) - exact).norm() / exact.norm()) for on in (1, 0)]
    assert errors[0] < 1.3 * errors[1], errors
    assert errors[0] < 0.1


def assert_same_answers(ours: Any, plain: Any, dtype: str) -> None:
    """In bfloat16, products of other sizes of batch may tip a draw."""
    flat = [[sample.tokens for row in side for sample in row] for side in (ours, plain)]
    same = sum(a == b for a, b in zip(*flat, strict=True))
    assert same >= len(flat[0]) * (1.0 if dtype == "float32" else 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_decode_steps_are_graphs(
    arch: Arch, dtype: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same answers with graphs and without; the weights then move and they are so again."""
    made: list[graphs.Graphs] = []
    build = graphs.as_graphs

    def as_graphs(*args: Any) -> Any:
        made.append(build(*args))  # type: ignore[arg-type]
        return made[-1]

    model = on_cuda(arch)
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                for parameter in model.trainable():
                    parameter.mul_(1.1)
        monkeypatch.setattr(engine, "as_graphs", as_graphs)
        with caplog.at_level(logging.WARNING):
            ours = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
        monkeypatch.setattr(engine, "as_graphs", lambda step, cache, device: step)
        plain = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
        assert made[-1].works, caplog.text
        assert_same_answers(ours, plain, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_recorded(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_cuda(lora_rank=4)
    for parameter in model.trainable():
        parameter.data.normal_(std=0.1)
    ours = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
    monkeypatch.setattr(engine, "as_graphs", lambda step, cache, device: step)
    plain = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
    assert_same_answers(ours, plain, dtype)


def test_sampled_log_probs_are_the_trainers() -> None:
    """In bfloat16: prefill by varlen, steps by graphs, the trainer by varlen."""
    model = on_cuda()
    groups = Engine(replace(model, dtype="bfloat16"), 6).generate(PROMPTS, 4, WARM, seed=3)
    examples = [
        Example(tuple(p), tuple(s.tokens for s in g), tuple((True,) * len(s.tokens) for s in g))
        for p, g in zip(PROMPTS, groups, strict=True)
    ]
    sampled = torch.tensor([x for g in groups for s in g for x in s.log_probs])
    with torch.no_grad():
        how = replace(model, dtype="bfloat16")
        trained = heads.answer_log_probs(how, pack(examples).to(CUDA), WARM.temperature)
    gap = (sampled - trained.cpu()).abs()
    assert float(gap.mean()) < 0.05
