"""Columns and keys that change what a row means: tools, pictures, flags of single turns."""

import json
from pathlib import Path

import pytest

from tests.outside.conftest import Run


@pytest.mark.parametrize(
    ("file", "kind"), [("tools.jsonl", "demonstration"), ("tools_pairs.jsonl", "preference")]
)
def test_tools_go_to_the_template(
    file: str, kind: str, models: Path, case: Path, prefloop: Run
) -> None:
    check = ("--data", file, "--kind", kind)
    told = prefloop("check", "--model", models / "tools", *check)
    assert told.code == 0, told.err
    assert '<|im_start|>system\\n[{"type": "function", "function": {"name": "tide"' in told.out
    told = prefloop("check", "--model", models / "chatml", *check)
    assert (told.code, f"{file}:1: the chat template ignores `tools`" in told.err) == (2, True)


def test_tools_as_json_text_and_for_prompts(models: Path, case: Path, prefloop: Run) -> None:
    row = json.loads((case / "tools_pairs.jsonl").read_text())
    row["tools"] = json.dumps(row["tools"])
    (case / "x.jsonl").write_text(json.dumps(row) + "\n")
    for kind in ("preference", "unpaired", "prompt"):
        told = prefloop("check", "--model", models / "tools", "--data", "x.jsonl", "--kind", kind)
        assert told.code == 0, told.err
        assert '"name": "tide"' in told.out.split("first row")[1].split("user")[0]


@pytest.mark.parametrize(
    ("file", "kind", "what"),
    [
        ("images.jsonl", "preference", "column `images` cannot be used"),
        ("images_in_message.jsonl", "demonstration", "`messages[0].images` cannot be learned"),
    ],
)
def test_pictures_are_refused(
    file: str, kind: str, what: str, models: Path, case: Path, prefloop: Run
) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", file, "--kind", kind)
    assert (told.code, f"{file}:1: {what}" in told.err) == (2, True)


@pytest.mark.parametrize("name", ["image", "audio", "videos", "history", "documents", "functions"])
def test_their_kin_too_and_empty_ones_not(
    name: str, models: Path, case: Path, prefloop: Run
) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for value, code in ((["x"], 2), ([], 0), (None, 0), ("", 0)):
        (case / "x.jsonl").write_text(json.dumps(pair | {name: value}) + "\n")
        told = prefloop("check", "--model", models / "plain", "--data", "x.jsonl")
        assert told.code == code, (value, told.err)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_turn_kept_out_is_not_trained(
    flag: dict[str, object], models: Path, case: Path, prefloop: Run
) -> None:
    turns = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]
    messages = [{"role": r, "content": c} for r, c in turns]
    messages[1] |= flag  # type: ignore[arg-type]
    (case / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    check = ("check", "--model", models / "chatml", "--data", "x.jsonl", "--kind", "demonstration")
    told = prefloop(*check)
    assert told.code == 0, told.err
    assert "[[two<|im_end|>]]" in told.out
    assert "[[one" not in told.out
    messages[3] |= flag  # type: ignore[arg-type]
    (case / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert "no answer of `messages` is trained" in prefloop(*check).err
