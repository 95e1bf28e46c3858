"""A generation prompt that opens a thought: fit to generate, not to train on chats."""

import io
import json

import pytest

SHORT = "--device cpu --max-new-tokens 8 --max-length 64".split()
UNFIT = "the chat template prints an answer otherwise than its generation prompt begins it"


def test_check_warns(case, models, prefloop):
    told = prefloop("check", "--model", models / "r1")
    assert told.code == 0
    assert "warning: chat template" in told.out and UNFIT in told.out
    assert "answers end with <eos>" in told.out


def test_it_generates(case, models, prefloop, tmp_path, monkeypatch):
    model = ("--model", models / "r1", *SHORT)
    assert prefloop("generate", *model, "--prompt", "Name a bird.").code == 0
    words = ("--data", "prompts.jsonl", "--output", tmp_path / "s.jsonl")
    assert prefloop("sample", *model, *words).code == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert all(len(row["completions"]) == 4 for row in rows)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert prefloop("chat", *model).code == 0


def test_ppo_samples_from_it(case, models, prefloop, tmp_path):
    words = ("--model", models / "r1", "--data", "prompts.jsonl", "--output", tmp_path / "run")
    function = ("--reward-function", "tests.training.rewards:by_length", "--batch-size", 1)
    told = prefloop("ppo", *words, *SHORT, *function, "--max-steps", 1)
    assert told.code == 0, told.err


@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_training_on_its_chats_is_refused(command, case, models, prefloop, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Yes", "No"))
    row = {"prompt": chat, "chosen": good, "rejected": bad}
    row = {"prompt": chat, "completion": good} if command == "sft" else row
    (case / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ("--model", models / "r1", "--data", "rows.jsonl", "--output", tmp_path / "run")
    told = prefloop(command, *words, "--device", "cpu")
    assert told.code == 2 and "rows.jsonl:1: " + UNFIT in told.err
    assert "Traceback" not in told.err
