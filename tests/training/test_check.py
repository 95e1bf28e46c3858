"""`prefloop check` tells what training would see."""

import json
from pathlib import Path

import pytest

from prefloop import CheckConfig, UserError, check
from tests.tiny import tiny_tokenizer


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


def rows(folder, *items):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def test_template_rows_lengths_and_the_first_row_as_trained(tmp_path, model, capsys):
    data = rows(
        tmp_path,
        {"prompt": "ask", "chosen": "ya", "rejected": "no"},
        {"prompt": "ask" * 50, "chosen": "ya", "rejected": "no"},
    )
    check(CheckConfig(model=model, data=data, max_length=20, truncation="drop"))
    said = capsys.readouterr().out
    assert "<|im_end|>, trained" in said
    assert "read 2 rows, used 1, dropped 1" in said
    assert "prompt tokens: median 3, 95 % up to 3, longest 3" in said  # bytes a, s, k
    assert "answer tokens: median 3, 95 % up to 3, longest 3" in said  # y, a, the stop token
    assert f"first row ({data}:1): 'ask'" in said
    assert "'[[ya<|im_end|>]]'" in said


def test_only_the_assistants_turns_are_marked(tmp_path, model, capsys):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    data = rows(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
    check(CheckConfig(model=model, data=data, kind="demonstration"))
    said = capsys.readouterr().out
    assert "[[b<|im_end|>]]" in said
    assert "[[d<|im_end|>]]" in said
    assert "[[c" not in said


def test_prompts(tmp_path, model, capsys):
    check(CheckConfig(model=model, data=rows(tmp_path, {"prompt": "abc"}), kind="prompt"))
    assert "prompt tokens: median 2" in capsys.readouterr().out  # `ab` is one token of the tiny BPE


def test_wrong_rows_are_the_users_mistake(tmp_path, model):
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        check(CheckConfig(model=model, data=rows(tmp_path, {"text": "abc"})))
    with pytest.raises(UserError, match="no tokenizer"):
        check(CheckConfig(model=str(Path(tmp_path))))
