"""How a run ends: its numbers are right, and the next command that it names works."""

import json
import math
import shlex

import pytest

from prefloop.cli import main
from prefloop.training.loop import _bar_note
from tests.tiny import tiny_tokenizer
from tests.training.small import flags, settings, write_rows, write_world


@pytest.fixture
def world(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(capsys, command, world, output, **changes):
    """What a run printed: its lines on standard error by their first word, and standard output."""
    words = flags(settings(command, world, world / output, **changes))
    assert main([command, *words]) == 0
    told = capsys.readouterr()
    return {line.split(":")[0]: line for line in told.err.splitlines()}, told.out


def test_a_summary_says_what_was_learned_and_what_it_cost(world, capsys):
    """Before the first step of DPO the policy is its reference: loss ln 2, half of the pairs."""
    changes = {"eval_fraction": 0.4, "max_steps": 3, "lr": 1e-3, "loss": "sigmoid"}
    told, out = ended(capsys, "dpo", world, "out", **changes)
    record = json.loads((world / "out/run.json").read_text())
    last = json.loads((world / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert record["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told["held out"].startswith(
        f"held out: loss 0.693 -> {last['eval/loss']:.3f}, accuracy 0.500 -> "
    )
    assert last["eval/loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert told["dpo"].startswith(f"dpo: 3 steps, {record['tokens']:,} tokens in ")
    assert told["model"] == f"model: {world / 'out/model'}"
    assert out == f"{world / 'out'}\n"


def test_without_held_out_rows_the_training_rows_are_told(world, capsys):
    told, _ = ended(capsys, "sft", world, "out", max_steps=3, batch_size=4)
    losses = [
        json.loads(line)["loss"] for line in (world / "out/metrics.jsonl").read_text().splitlines()
    ]
    assert told["training rows, first and last"].endswith(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    assert "held_out_before" not in json.loads((world / "out/run.json").read_text())


def test_ppo_tells_scores_and_kl_from_its_iterations(world, capsys):
    told, _ = ended(
        capsys, "ppo", world, "out", max_steps=4, ppo_epochs=2, batch_size=4, kl_coef=0.1
    )
    assert "score " in told["training rows, first and last"]
    assert "KL 0.000 -> " in told["training rows, first and last"]  # the policy is its reference


@pytest.mark.parametrize(
    ("command", "following", "changes"),
    [
        ("sft", "generate", {"eval_fraction": 0.3}),
        pytest.param("reward", "ppo", {}, marks=pytest.mark.slow),
        ("dpo", "generate", {"data": "pairs.jsonl"}),
        ("ppo", "generate", {}),
    ],
)
def test_the_next_command_works_as_it_stands(world, capsys, command, following, changes):
    changes = {"max_steps": 1, "batch_size": 4, **changes}
    told, _ = ended(capsys, command, world, "my run", **changes)
    words = shlex.split(told["next"])
    assert words[:3] == ["next:", "prefloop", following]
    assert main(words[2:]) == 0


def test_after_chats_one_talks(world, capsys, monkeypatch):
    import io

    tiny_tokenizer().save_pretrained(world / "model")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the boat"}]
    write_rows(world / "chats.jsonl", [{"messages": said}] * 4)
    told, _ = ended(capsys, "sft", world, "out", max_steps=1, data="chats.jsonl")
    words = shlex.split(told["next"])
    assert words[:3] == ["next:", "prefloop", "chat"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main(words[2:]) == 0
    assert capsys.readouterr().out


def test_a_second_output_does_not_take_the_firsts_name(world, capsys):
    (world / "ppo").mkdir()
    told, _ = ended(capsys, "reward", world, "out", max_steps=1)
    assert f"--output {world / 'ppo-2'} " in told["next"]


def test_the_live_line():
    """Loss, score, KL and speed; PPO's score is that of the iteration's first step."""
    latest = {"loss": 0.12345, "tokens_per_second": 1234.5, "objective/scores": 1.5}
    latest["objective/kl"] = 0.25
    assert _bar_note(latest, True) == "loss 0.1235 · score 1.500 · KL 0.250 · 1,234 tokens/s"
    assert _bar_note(latest, False).startswith("left out · score")
