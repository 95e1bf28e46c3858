"""The loop: schedule, clipping, logging, saving, precision, memory; and that a seed decides all."""

import math
from dataclasses import replace

import pytest
import torch

from prefloop.config import SFTConfig
from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.losses.sft import sft_loss
from prefloop.models.heads import answer_log_probs, answer_scores
from prefloop.training import optim
from tests.training.cases import CASES, run_case
from tests.training.small import (
    assert_same_run,
    checkpoint,
    lines,
    policy,
    train,
    weights,
)

SHORT = (Example((9, 40, 41), ((50, 51, 4), (60, 4)), ((True,) * 3, (True,) * 2)),)


@pytest.mark.parametrize("name", ["sft", "bradley-terry", "dpo-sigmoid", "ppo-gae", "dpo-kto"])
def test_a_seed_decides_everything(name, world, tmp_path):
    for folder in ("one", "two"):
        run_case(name, world, tmp_path / folder)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    run_case(name, world, tmp_path / "other", seed=1)
    assert lines(tmp_path / "other") != lines(tmp_path / "one")


def test_lr_factor_by_hand():
    """10 steps with 2 of warm-up: 1/2, 1, then 8 steps that fall from 1 and end above 0."""
    linear = [optim.lr_factor(step, 10, 0.2, "linear") for step in range(10)]
    assert linear == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [optim.lr_factor(step, 10, 2, "cosine") for step in (2, 6)]
    assert cosine == pytest.approx([1.0, 0.5])
    floor = [
        optim.lr_factor(step, 10, 0, kind, 0.2) for kind in ("linear", "cosine") for step in (0, 5)
    ]
    assert floor == pytest.approx([1.0, 0.6, 1.0, 0.6])
    assert optim.lr_factor(9, 10, 0, "linear", 0.2) == pytest.approx(0.2 + 0.8 * 0.1)
    assert optim.lr_factor(1, 10, 2, "linear", 0.2) == 1.0  # warm-up rises from 0 all the same
    assert optim.lr_factor(9, 10, 0.0, "constant") == 1.0
    assert optim.lr_factor(0, 3, 0.1, "linear") == 1.0  # one step of warm-up is none


def test_lr_clipping_and_lines_as_asked(world, tmp_path):
    """The gradient's norm is logged as it was before clipping; AdamW's first step has size lr."""
    common = {"batch_size": 2, "warmup": 2.0, "eval_fraction": 0.25, "lr": 1e-3}
    train("sft", world, tmp_path / "a", log_every=2, eval_every=3, **common)
    rows = lines(tmp_path / "a")
    assert [row["step"] for row in rows] == [2, 4]  # the last one is always logged
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 0.5e-3])
    assert "eval/loss" in rows[1]
    train("sft", world, tmp_path / "b", max_grad_norm=1e-3, **common)
    assert lines(tmp_path / "b")[0]["grad_norm"] > 0.1
    # Clipped or not, the first step of AdamW is the same but for epsilon: compare the second.
    assert lines(tmp_path / "b")[3]["loss"] != rows[1]["loss"]


def test_checkpoints_kept(world, tmp_path):
    train("sft", world, tmp_path / "a", batch_size=1, save_every=2, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step-8", "step-9"]
    state = checkpoint(tmp_path / "a", 8)
    assert (state["step"], set(state["models"])) == (8, {"policy"})
    assert all(float(s["step"]) == 8 for s in state["optimizer"]["state"].values())


def test_weight_decay_falls_on_matrices_only():
    config = SFTConfig(model="m", data="d", output="o", weight_decay=0.1, adam_eps=1e-5)
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build_optimizer({"policy": [matrix, bias]}, config, {})
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optim.set_lr(optimizer, 0.5)
    optimizer.step()
    assert matrix.detach().flatten().tolist() == pytest.approx([1 - 0.5e-5 * 0.1] * 4)
    assert bias.tolist() == [1.0, 1.0]
    assert optimizer.defaults["eps"] == 1e-5


def gradients(model, batch, dtype="float32"):
    loss = sft_loss(answer_log_probs(replace(model, dtype=dtype), batch)).sum
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.requires_grad}
    model.module.zero_grad()
    return float(loss.detach()), grads


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_recomputes_the_same_gradients(rank, world):
    batch = pack(SHORT)
    torch.manual_seed(0)
    plain = policy(world, lora_rank=rank)
    torch.manual_seed(0)
    saving = policy(world, lora_rank=rank, gradient_checkpointing=True)
    first, second = gradients(plain, batch), gradients(saving, batch)
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        torch.testing.assert_close(grad, second[1][name], rtol=0, atol=1e-6, msg=name)


def test_checkpointing_keeps_fewer_activations(world):
    """Not the same graph twice: tensors saved for the backward pass are fewer."""

    def saved(model):
        count = 0

        def note(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            answer_log_probs(model, pack(SHORT * 8)).sum()
        return count

    assert saved(policy(world, gradient_checkpointing=True)) < 0.5 * saved(policy(world))


def test_bfloat16_is_autocast_over_float32_masters(world, tmp_path):
    """bf16 has 8 bits of mantissa: the loss of a batch stays within 1 % of float32's."""
    for dtype in ("float32", "bfloat16"):
        train("sft", world, tmp_path / dtype, dtype=dtype, batch_size=4)
    exact, rough = lines(tmp_path / "float32"), lines(tmp_path / "bfloat16")
    for left, right in zip(exact, rough, strict=True):
        assert right["loss"] != left["loss"]
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-2)
    for tensor in weights(tmp_path / "bfloat16").values():
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("name", ["bradley-terry", "dpo-sigmoid", "ppo-gae"])
def test_every_method_runs_in_bfloat16_with_checkpointing(name, world, tmp_path):
    assert name in CASES
    run_case(name, world, tmp_path / "run", dtype="bfloat16", gradient_checkpointing=True)
    rows = lines(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 1e-3 for row in rows)


def test_scores_and_log_softmax_are_float32_in_bfloat16(world):
    batch, model = pack(SHORT), policy(world)
    log_probs = answer_log_probs(replace(model, dtype="bfloat16"), batch)
    assert log_probs.dtype == torch.float32
    exact = answer_log_probs(model, batch)
    assert (log_probs - exact).abs().max() < 0.1


def test_scorers_have_no_gradient_where_frozen(world, tmp_path):
    """LoRA trains its adapters alone: the base stays as it was, to the bit."""
    model = policy(world, lora_rank=2)
    names = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    with pytest.raises(AssertionError):
        answer_scores(model, pack(SHORT))
