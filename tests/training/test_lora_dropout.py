"""Training with dropout in the adapters: by seed and step alone, and in training alone."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from prefloop.data.formats import load
from prefloop.data.tokenize import tokenize
from prefloop.models.load import load_policy
from prefloop.records import RowCounts
from tests.models.plain import plain_log_probs
from tests.training.small import (
    CPU,
    assert_close_runs,
    assert_same_run,
    lines,
    only_checkpoint,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA = {"lora_rank": 2, "lora_dropout": 0.4, "batch_size": 3, "epochs": 2.0}


@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_training_with_dropout_resumes_to_the_same_bits(command, world, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(command, world, whole, save_every=1, keep_checkpoints=99, **LORA)
    only_checkpoint(whole, again, 3)
    train(command, world, again, **LORA)
    assert_same_run(whole, again)
    train(command, world, tmp_path / "none", **LORA | {"lora_dropout": 0.0})
    train(command, world, tmp_path / "other", **LORA | {"lora_dropout": 0.2})
    losses = [[line["loss"] for line in lines(tmp_path / n)] for n in ("whole", "none", "other")]
    first, *later = zip(*losses, strict=True)
    assert first[0] == first[1] == first[2]  # fresh adapters add nothing, whatever they read
    assert all(len(set(step)) == 3 for step in later)


def test_recomputed_activations_drop_the_same(world, tmp_path):
    for name, recompute in (("a", False), ("b", True)):
        train("sft", world, tmp_path / name, gradient_checkpointing=recompute, **LORA)
    assert_close_runs(tmp_path / "a", tmp_path / "b")


def test_evaluation_drops_nothing(world, tmp_path):
    """The last held-out loss is that of the exported adapter in PEFT, which has no dropout here."""
    run = train(
        "sft",
        world,
        tmp_path / "run",
        eval_data=str(world / "sft.jsonl"),
        **LORA | {"lora_dropout": 0.9, "lr": 0.05},
    )
    plain = AutoPeftModelForCausalLM.from_pretrained(run.model).eval()
    policy = load_policy(str(run.model), CPU)
    records = load(str(world / "sft.jsonl"), "demonstration", RowCounts())
    examples = tokenize(records, policy.encoder, 128, "error", RowCounts())
    with torch.no_grad():
        theirs = -plain_log_probs(plain, examples).mean()
    assert abs(lines(run.directory)[-1]["eval/loss"] - float(theirs)) < 1e-5
