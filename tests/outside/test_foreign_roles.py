"""Roles as other tools call them."""

import json
from pathlib import Path

import pytest

from tests.outside.conftest import Run


@pytest.mark.parametrize("name", ["human", "human_gpt", "sharegpt"])
def test_they_are_read_and_told(name: str, models: Path, case: Path, prefloop: Run) -> None:
    data = ("--data", f"{name}.jsonl", "--kind", "demonstration")
    told = prefloop("check", "--model", models / "chatml", *data)
    assert told.code == 0, told.err
    assert "'<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'" in told.out
    assert "[[Ho.<|im_end|>]]" in told.out
    assert "role `human` read as user" in told.out


@pytest.mark.parametrize(
    ("role", "read"), [("prompter", "user"), ("AI", "assistant"), ("chatbot", "assistant")]
)
def test_others(role: str, read: str, models: Path, case: Path, prefloop: Run) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]
    turns[read == "assistant"]["role"] = role
    (case / "x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    told = prefloop(
        "check", "--model", models / "two-roles", "--data", "x.jsonl", "--kind", "demonstration"
    )
    assert told.code == 0, told.err
    assert "[INST] Hi [/INST]" in told.out
    assert f"role `{role}` read as {read}" in told.out


def test_a_new_role_may_pass(models: Path, case: Path, prefloop: Run) -> None:
    turns = [("ipython", "1"), ("user", "Hi"), ("assistant", "Ho.")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    (case / "x.jsonl").write_text(json.dumps(row) + "\n")
    data = ("--data", "x.jsonl", "--kind", "demonstration")
    assert prefloop("check", "--model", models / "chatml", *data).code == 0
