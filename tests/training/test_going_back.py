"""Going on with what was asked: other settings, an earlier step, another day's template."""

import json

import pytest
import yaml

from prefloop.errors import UserError
from prefloop.resume import seal
from prefloop.runs import newest_checkpoint
from tests.tiny import CHATML, tiny_model, tiny_tokenizer
from tests.training.small import (
    REWARDS,
    assert_close_runs,
    assert_same_run,
    checkpoint,
    lines,
    only_checkpoint,
    train,
    weights,
    write_rows,
)
from tests.training.test_keeper import broken_run

SFT = {"batch_size": 2, "save_every": 1, "keep_checkpoints": 99}  # 9 rows: 5 steps


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train("sft", world, output, **SFT)
    return output


def at(output, step):
    return str(output / "checkpoints" / f"step-{step}")


# --- a template that prints the date --------------------------------------------------------------


def say(role, text):
    return [{"role": role, "content": text}]


def chat_rows(folder):
    asked = [say("user", text) for text in ("a boat", "the oath", "that", "thin bath", "took a")]
    good, bad = ([say("assistant", f"{text} {n}") for n in range(5)] for text in ("the", "a boat"))
    write_rows(
        folder / "sft.jsonl",
        [{"prompt": p, "completion": c} for p, c in zip(asked, good, strict=True)],
    )
    write_rows(
        folder / "dpo.jsonl",
        [
            {"prompt": p, "chosen": c, "rejected": r}
            for p, c, r in zip(asked, good, bad, strict=True)
        ],
    )
    write_rows(folder / "ppo.jsonl", [{"prompt": p} for p in asked])


def save_model(folder, day):
    """A model whose template prints a date."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = f"<|im_start|>system\nToday is {day}.<|im_end|>\n{CHATML}"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "ppo"])
def test_rows_are_known_whatever_the_template_prints(name, world, tmp_path):
    chat_rows(tmp_path)
    command = "dpo" if name == "kto" else name
    data = tmp_path / f"{'dpo' if name in ('reward', 'kto') else name}.jsonl"
    changes = {"model": str(tmp_path / "model"), "data": str(data)}
    changes |= {"batch_size": 2, "save_every": 1, "keep_checkpoints": 99}
    changes |= {"loss": "kto"} if name == "kto" else {}
    if name == "ppo":
        changes |= {"reward_function": f"{REWARDS}:by_length", "ppo_epochs": 2}
    save_model(tmp_path / "model", "Monday")
    train(command, world, tmp_path / "whole", **changes)
    only_checkpoint(tmp_path / "whole", tmp_path / "again", 1)
    save_model(tmp_path / "model", "a Tuesday")
    train(command, world, tmp_path / "again", **changes)
    mine, before = lines(tmp_path / "again"), lines(tmp_path / "whole")
    assert [line["step"] for line in mine] == [line["step"] for line in before]
    assert mine[0] == before[0]
    # Other rows are still told.
    only_checkpoint(tmp_path / "whole", tmp_path / "other", 1)
    data.write_text(data.read_text().replace("boat", "coat"))
    with pytest.raises(UserError, match="not those that the run began with"):
        train(command, world, tmp_path / "other", **changes)


# --- other settings -------------------------------------------------------------------------------


def test_settings_of_the_optimiser_are_applied_from_a_named_checkpoint(world, whole, tmp_path):
    """Each by itself: rates, decays and moments are not those that the checkpoint was made with."""
    asked = {"lr": 3e-3, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9}
    asked |= {"adam_eps": 1e-2, "max_grad_norm": 1e-3, "lr_schedule": "constant"}
    for name, value in asked.items():
        only_checkpoint(whole, tmp_path / name, 2)
        changes = SFT | {name: value}
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was .* --resume CHECK"):
            train("sft", world, tmp_path / name, **changes)
        train("sft", world, tmp_path / name, resume=at(tmp_path / name, 2), **changes)
        mine, before = lines(tmp_path / name), lines(whole)
        assert mine[:2] == before[:2]
        assert any(
            not tensor.equal(weights(whole)[key])
            for key, tensor in weights(tmp_path / name).items()
        ), name
    assert lines(tmp_path / "lr")[2]["lr"] == pytest.approx(3 * lines(whole)[2]["lr"])


def test_more_epochs_go_on_from_the_last_step(world, whole, tmp_path):
    only_checkpoint(whole, tmp_path / "run", 5)
    changes = SFT | {"epochs": 2.0}
    train("sft", world, tmp_path / "run", resume=at(tmp_path / "run", 5), **changes)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    assert lines(tmp_path / "run")[:5] == lines(whole)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_cannot_be_applied_is_refused_by_name(elsewhere, world, whole, tmp_path):
    output = tmp_path / "run"
    if not elsewhere:
        only_checkpoint(whole, output, 2)
    named = at(whole if elsewhere else output, 2)
    for name, value in (("batch_size", 3), ("train_on", "all"), ("seed", 1), ("lora_rank", 2)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was .*, now {value}"):
            train("sft", world, output, resume=named, **SFT | {name: value})
        assert output.exists() != elsewhere
    with pytest.raises(UserError, match="a run of `sft`, not of `reward`"):
        train("reward", world, output, resume=named, batch_size=2)
    loose = tmp_path / "step-2"
    loose.mkdir()
    with pytest.raises(UserError, match="stands in no run directory"):
        train("sft", world, tmp_path / "new", resume=str(loose), **SFT)


def test_less_memory_or_another_rhythm_is_no_other_run(world, whole, tmp_path):
    """What an error of memory tells to change may be changed; it only rounds differently."""
    only_checkpoint(whole, tmp_path / "run", 2)
    changes = {"micro_batch_tokens": 20, "gradient_checkpointing": True, "log_every": 1}
    train("sft", world, tmp_path / "run", **SFT | changes | {"save_every": 0})
    assert_close_runs(whole, tmp_path / "run")


def test_a_setting_that_came_later_had_its_default(world, whole, tmp_path):
    """It may be given as that; another value is a change, and so is one that has no default."""
    run = tmp_path / "run"
    only_checkpoint(whole, run, 2)
    path = run / "config.yaml"
    earlier = yaml.safe_load(path.read_text())
    for name in ("train_on", "bad_rows", "lora_rank", "eval_data"):
        del earlier[name]
    path.write_text(yaml.safe_dump(earlier))
    message = "--lora-rank was 0, now 2, --train-on was answer, now all"
    with pytest.raises(UserError, match=message):
        train("sft", world, run, **SFT | {"train_on": "all", "lora_rank": 2})
    train("sft", world, run, **SFT | {"train_on": "answer"})
    assert_same_run(whole, run)
    assert yaml.safe_load(path.read_text())["train_on"] == "answer"
    only_checkpoint(whole, tmp_path / "other", 2)
    del earlier["model"]
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(earlier))
    with pytest.raises(UserError, match="--model was None, now"):
        train("sft", world, tmp_path / "other", **SFT)


# --- an earlier step ------------------------------------------------------------------------------


def test_the_branch_that_was_left_does_not_win(world, whole, tmp_path):
    output = tmp_path / "run"
    train("sft", world, output, **SFT)
    changes = SFT | {"lr": 3e-3}
    named = at(output, 2)
    broken_run(world, output, "steps", 2, OSError(), command="sft", resume=named, **changes)
    assert newest_checkpoint(output).name == "step-3"
    assert [line["step"] for line in lines(output)] == [1, 2, 3]
    train("sft", world, output, **changes)
    only_checkpoint(whole, tmp_path / "straight", 2)
    straight = tmp_path / "straight"
    train("sft", world, straight, resume=at(straight, 2), **changes)
    assert_same_run(straight, output)


def test_nothing_is_dropped_for_a_checkpoint_that_does_not_fit(world, tmp_path):
    output, data = tmp_path / "run", tmp_path / "rows.jsonl"
    data.write_text((world / "sft.jsonl").read_text())
    train("sft", world, output, data=str(data), **SFT)
    before = lines(output)
    data.write_text(data.read_text().replace("boat", "coat"))
    with pytest.raises(UserError, match="not those that the run began with"):
        train("sft", world, output, data=str(data), resume=at(output, 2), **SFT)
    assert lines(output) == before
    assert newest_checkpoint(output).name == "step-5"


def test_a_run_goes_on_from_a_checkpoint_of_its_own(world, whole, tmp_path):
    """Killed after it took up another run's step, it does not begin at the start again."""
    output = tmp_path / "run"
    broken_run(world, output, "steps", 1, OSError(), command="sft", resume=at(whole, 2), **SFT)
    assert newest_checkpoint(output).name == "step-2"
    train("sft", world, output, **SFT)
    assert lines(output) == lines(whole)[2:]
    for key, tensor in weights(output).items():
        assert tensor.equal(weights(whole)[key])


def test_a_checkpoint_of_an_earlier_version_is_told(world, whole, tmp_path):
    import torch

    only_checkpoint(whole, tmp_path / "run", 2)
    state = checkpoint(tmp_path / "run", 2)
    state["format"] = 1
    torch.save(state, tmp_path / "run" / "checkpoints" / "step-2" / "state.pt")
    seal(tmp_path / "run" / "checkpoints" / "step-2")
    with pytest.raises(UserError, match="made by an earlier prefloop"):
        train("sft", world, tmp_path / "run", **SFT)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
