"""Null content, and content in parts."""

from pathlib import Path

from tests.outside.conftest import Run


def test_null_is_told(models: Path, case: Path, prefloop: Run) -> None:
    check = ("check", "--model", models / "chatml", "--kind", "demonstration", "--data")
    told = prefloop(*check, "null_with_tool_calls.jsonl")
    assert (told.code, "`messages[1].tool_calls` cannot be learned" in told.err) == (2, True)
    told = prefloop(*check, "null_system.jsonl")
    assert (told.code, "null_system.jsonl:1: `messages[0].content` is null" in told.err) == (
        2,
        True,
    )


def test_text_parts_are_joined(models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", "text_parts.jsonl")
    assert told.code == 0, told.err
    assert "user\\nName a bird.<|im_end|>" in told.out
    assert "[[Heron.<|im_end|>]]" in told.out
