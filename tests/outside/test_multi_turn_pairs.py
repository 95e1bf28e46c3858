"""Multi-turn pairs as mixes hold them: a prompt that the lists say again, sides that differ."""

from pathlib import Path

import pytest

from tests.outside.conftest import Run


@pytest.mark.parametrize("name", ["prompt_is_first", "prompt_is_last", "prompt_without_system"])
def test_a_prompt_said_again_adds_nothing(
    name: str, models: Path, case: Path, prefloop: Run
) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", f"{name}.jsonl")
    assert told.code == 0, told.err
    assert "[[Wren.<|im_end|>]]" in told.out
    assert told.out.count("Name a bird.") == 1
    assert ("Be brief." in told.out) == (name == "prompt_without_system")
    assert ("Another?" in told.out) == (name != "prompt_without_system")


@pytest.mark.parametrize("form", ["messages", "transcripts"])
def test_sides_that_differ_earlier_are_dropped_and_counted(
    form: str, models: Path, case: Path, prefloop: Run
) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", f"differ_as_{form}.jsonl")
    assert told.code == 0, told.err
    assert "read 2 rows, used 1, dropped 1 (" in told.out
    assert "differ before the last answer" in told.out
