"""Going on: from every checkpoint to the same bits, after SIGINT and after kill -9."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefloop.cli import main
from prefloop.errors import UserError
from prefloop.resume import seal
from tests.training.small import (
    REWARDS,
    assert_same_run,
    flags,
    lines,
    only_checkpoint,
    python,
    settings,
    train,
)

ROOT = Path(__file__).parents[2]
PPO = {"batch_size": 3, "ppo_epochs": 2, "num_minibatches": 2}
RUNS = {  # name: command, settings of a run of some steps
    "sft": ("sft", {"batch_size": 2, "lora_rank": 0}),
    "sft-8bit": ("sft", {"batch_size": 2, "optimizer": "adamw8bit", "lr_floor": 0.1}),
    "sft-bfloat16": ("sft", {"batch_size": 2, "dtype": "bfloat16", "weights": "bfloat16"}),
    "reward": ("reward", {"batch_size": 3, "epochs": 2.0}),
    "reward-lora": ("reward", {"batch_size": 3, "epochs": 2.0, "lora_rank": 2}),
    "dpo": ("dpo", {"batch_size": 3, "epochs": 2.0}),
    "kto": ("dpo", {"batch_size": 3, "loss": "kto", "data": "pairs.jsonl"}),
    "ppo": ("ppo", PPO | {"kl_target": 0.01, "kl_horizon": 20.0, "samples_per_prompt": 2}),
    "ppo-stops": ("ppo", PPO | {"target_kl": 1e-3, "ppo_epochs": 4, "lr": 3e-3}),
    "ppo-ptx": (
        "ppo",
        PPO
        | {"ptx_coef": 0.5, "sft_data": "sft.jsonl", "lora_rank": 2}
        | {"critic_warmup": 1, "ema_reference": 0.3},
    ),
    "ppo-random": ("ppo", PPO | {"reward_function": f"{REWARDS}:random", "normalize_scores": True}),
    "rloo": ("ppo", PPO | {"advantage": "rloo", "samples_per_prompt": 2, "ema_reference": 0.3}),
}


def with_paths(world, changes):
    named = {k: str(world / changes[k]) for k in ("data", "sft_data") if k in changes}
    return changes | named


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_leads_to_the_same_bits(name, world, tmp_path):
    command, changes = RUNS[name]
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    changes = with_paths(world, changes) | {"eval_fraction": 0.2}
    whole = tmp_path / "whole"
    train(command, world, whole, save_every=1, keep_checkpoints=100, **changes)
    steps = [line["step"] for line in lines(whole)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 4
    chosen = (2, 3, 4, steps[-2]) if command == "ppo" else (1, steps[-2])
    for step in chosen:
        again = tmp_path / f"from-{step}"
        only_checkpoint(whole, again, step)
        train(command, world, again, **changes)
        assert_same_run(whole, again)
        record = json.loads((again / "run.json").read_text())
        assert (record["status"], record["resumed"]) == ("finished", 1)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_one_seed_gives_the_same_bits_twice_and_another_seed_others(name, world, tmp_path):
    command, changes = RUNS[name]
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(command, world, tmp_path / folder, seed=seed, **with_paths(world, changes))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_the_ppo_cases_pass_through_what_they_are_for(world, tmp_path):
    """Steps without a batch after target_kl; a beta that moves."""
    train("ppo", world, tmp_path / "a", **RUNS["ppo-stops"][1])
    skipped = [line for line in lines(tmp_path / "a") if "policy/approxkl_avg" not in line]
    assert skipped
    train("ppo", world, tmp_path / "b", **RUNS["ppo"][1])
    betas = {line["kl_coef"] for line in lines(tmp_path / "b") if "kl_coef" in line}
    assert len(betas) > 1


CHANGED = {  # what is changed between an interruption and the resumption
    "sft": ("sft", {}, "sft.jsonl"),
    "dpo": ("dpo", {}, "rank.jsonl"),
    "ppo": ("ppo", {"batch_size": 3}, "prompts.jsonl"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_rows_that_changed_meanwhile_are_told(name, world, tmp_path):
    command, changes, rows = CHANGED[name]
    data = tmp_path / "rows.jsonl"
    text = (world / rows).read_text()
    data.write_text(text)
    changes = {"batch_size": 3, "save_every": 1, "data": str(data)} | changes
    train(command, world, tmp_path / "whole", keep_checkpoints=99, **changes)
    only_checkpoint(tmp_path / "whole", tmp_path / "again", 1)
    first, *others = text.splitlines(keepends=True)
    data.write_text("".join([*others, first]))
    with pytest.raises(UserError, match="not those that the run began with"):
        train(command, world, tmp_path / "again", **changes)
    data.write_text(text)
    train(command, world, tmp_path / "again", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_another_reference_or_reward_model_is_told(world, tmp_path):
    for fixed in ("ref_model", "reward_model"):
        path = tmp_path / fixed
        shutil.copytree(world / ("rm" if fixed == "reward_model" else "reference"), path)
        whole, again = tmp_path / f"{fixed}-whole", tmp_path / f"{fixed}-again"
        changes = {"batch_size": 3, "save_every": 1, fixed: str(path), "advantage": "rloo"}
        changes |= {"samples_per_prompt": 2, "keep_checkpoints": 99}
        train("ppo", world, whole, **changes)
        only_checkpoint(whole, again, 1)
        tensors = load_file(path / "model.safetensors")
        save_file(
            {name: tensor + 1e-3 for name, tensor in tensors.items()},
            path / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(UserError, match="not those that the run began with"):
            train("ppo", world, again, **changes)


def test_a_flipped_byte_in_what_a_run_wrote_is_told(world, tmp_path):
    """Before anything is learned from it."""
    train("reward", world, tmp_path / "rm", max_steps=1)
    file = tmp_path / "rm" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors: not as .* says that it was written"):
        train("ppo", world, tmp_path / "ppo", reward_model=str(tmp_path / "rm"))
    assert not (tmp_path / "ppo").exists()


def test_a_run_that_is_finished_is_left_alone(world, tmp_path, capsys):
    train("sft", world, tmp_path / "run", batch_size=4)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    train("sft", world, tmp_path / "run", batch_size=4)
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_checkpoint_half_written_does_not_count(world, tmp_path):
    changes = {"batch_size": 2, "save_every": 2, "keep_checkpoints": 99}
    train("sft", world, tmp_path / "whole", **changes)
    again = tmp_path / "again"
    only_checkpoint(tmp_path / "whole", again, 4)
    torn = again / "checkpoints" / ".step-6.tmp"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"PK half")
    train("sft", world, again, **changes)
    assert_same_run(tmp_path / "whole", again)


def test_a_flipped_byte_costs_one_checkpoint(world, tmp_path, capsys):
    changes = {"batch_size": 2, "save_every": 2}
    train("sft", world, tmp_path / "whole", **(changes | {"keep_checkpoints": 99}))
    again = tmp_path / "again"
    only_checkpoint(tmp_path / "whole", again, 2)
    shutil.copytree(tmp_path / "whole/checkpoints/step-4", again / "checkpoints/step-4")
    state = again / "checkpoints/step-4/state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 4
    state.write_bytes(data)
    train("sft", world, again, **changes)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "sha256" in line]
    assert said.endswith("; kept as damaged-step-4-1, the run goes on from step-2")
    assert_same_run(tmp_path / "whole", again)
    kept = sorted(path.name for path in (again / "checkpoints").iterdir())
    assert kept == ["damaged-step-4-1", "step-4", "step-5"]
    assert (again / "checkpoints/damaged-step-4-1/state.pt").read_bytes() == data


def test_a_named_checkpoint_is_gone_on_from(world, tmp_path):
    changes = {"batch_size": 2, "save_every": 2, "keep_checkpoints": 99}
    whole = tmp_path / "whole"
    train("sft", world, whole, **changes)
    again = tmp_path / "again"
    only_checkpoint(whole, again, 4)
    train("sft", world, again, resume=str(whole / "checkpoints" / "step-2"), **changes)
    assert_same_run(whole, again)


# --- processes that are shot ---------------------------------------------------------------------

LONG = {  # name: command, settings of a run that lasts long enough to be hit
    "sft": ("sft", {"batch_size": 1, "epochs": 15.0}),
    "reward": ("reward", {"batch_size": 1, "epochs": 15.0}),
    "dpo": ("dpo", {"batch_size": 1, "epochs": 15.0}),
    "ppo": (
        "ppo",
        {"batch_size": 2, "ppo_epochs": 3, "num_minibatches": 2, "epochs": 6.0},
    ),
}


ENDS = {  # a signal that is saved at: exit code and last word
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (143, "terminated"),
}


def shoot(words, output, number, after):
    """Runs the command in a process of its own and signals it once `after` steps are logged."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        python("-m", "prefloop", *words),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def check_interruption(name, number, world, tmp_path, **saving):
    command, changes = LONG[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(command, world, whole, **changes)
    words = [command, *flags(settings(command, world, broken, **changes)), *flags(saving)]
    code, errors = shoot(words, broken, number, after=8)
    record = json.loads((broken / "run.json").read_text())
    kept = sorted(path.name for path in (broken / "checkpoints").iterdir())
    if number in ENDS:
        exit_code, word = ENDS[number]
        assert (code, record["status"]) == (exit_code, "interrupted"), errors
        assert errors.endswith(f"prefloop: {word}\n")
        assert kept == [f"step-{lines(broken)[-1]['step']}"]
    else:
        assert (code, record["status"]) == (-signal.SIGKILL, "running")
    assert not (broken / "model").exists()
    assert kept
    assert main([*words, "--resume", "auto"]) == 0
    assert_same_run(whole, broken)


@pytest.mark.parametrize("number", ENDS)
def test_ppo_interrupted_goes_on_to_the_same_bits(number, world, tmp_path):
    check_interruption("ppo", number, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_interrupted_goes_on_to_the_same_bits(name, world, tmp_path):
    check_interruption(name, signal.SIGINT, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_killed_goes_on_to_the_same_bits(name, world, tmp_path):
    """A save every 5 steps, which for PPO (6 an iteration) is in mid-iteration."""
    check_interruption(name, signal.SIGKILL, world, tmp_path, save_every=5)


def test_a_function_as_reward_is_found_again(world, tmp_path):
    changes = {
        "reward_function": f"{REWARDS}:by_length",
        "batch_size": 4,
        "save_every": 1,
        "keep_checkpoints": 99,
    }
    train("ppo", world, tmp_path / "whole", **changes)
    only_checkpoint(tmp_path / "whole", tmp_path / "again", 2)
    train("ppo", world, tmp_path / "again", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def damaged(name, path):
    if name == "garbage":
        path.write_bytes(b"not a pickle")
    elif name == "a list":
        torch.save([1], path)
    else:
        state = torch.load(path, weights_only=True)
        models = {"policy": {n: t[:1] for n, t in state["models"]["policy"].items()}}
        torch.save(state | {"models": models}, path)
    seal(path.parent)


@pytest.mark.parametrize("name", ["garbage", "a list", "other shapes"])
def test_a_checkpoint_that_holds_something_else_is_told_in_one_line(name, world, tmp_path):
    changes = {"batch_size": 3, "save_every": 1, "keep_checkpoints": 9}
    train("sft", world, tmp_path / "whole", **changes)
    only_checkpoint(tmp_path / "whole", tmp_path / "again", 1)
    damaged(name, tmp_path / "again" / "checkpoints" / "step-1" / "state.pt")
    with pytest.raises(UserError, match=r"step-1: not a") as caught:
        train("sft", world, tmp_path / "again", **changes)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_beyond_the_last_step_is_told(world, tmp_path):
    changes = {"batch_size": 3, "save_every": 1, "keep_checkpoints": 9}
    train("sft", world, tmp_path / "whole", **changes)
    late = str(tmp_path / "whole" / "checkpoints" / "step-3")
    with pytest.raises(UserError, match="of step 3, beyond the 2 steps of this run"):
        train("sft", world, tmp_path / "again", resume=late, max_steps=2, **changes)


def test_an_export_that_fails_costs_no_step(world, tmp_path):
    """A model/ that cannot be replaced: mended, the run only writes its result."""
    train("sft", world, tmp_path / "whole", batch_size=3)
    run = tmp_path / "run"
    train("sft", world, run, batch_size=3, save_every=1)
    before = lines(run)
    shutil.rmtree(run / "model")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    train("sft", world, run, batch_size=3, save_every=1)
    assert lines(run) == before
    assert_same_run(tmp_path / "whole", run)
    assert not (tmp_path / "whole" / "checkpoints").exists()
