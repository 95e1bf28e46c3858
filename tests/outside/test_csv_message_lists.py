"""Message lists in CSV cells, as JSON, Python and NumPy write them."""

from pathlib import Path

import pytest

from tests.outside.conftest import Run


@pytest.mark.parametrize("name", ["content_first", "indented", "python_repr", "numpy_repr"])
def test_they_are_chats(name: str, models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", f"{name}.csv")
    assert told.code == 0, told.err
    assert "<|im_start|>user\\nName a bird.<|im_end|>\\n<|im_start|>assistant\\n'" in told.out
    assert "[[Heron.<|im_end|>]]" in told.out


def test_demonstrations_too(models: Path, case: Path, prefloop: Run) -> None:
    data = ("--data", "python_repr_messages.csv", "--kind", "demonstration")
    told = prefloop("check", "--model", models / "chatml", *data)
    assert told.code == 0, told.err
    assert "[[Heron.<|im_end|>]]" in told.out


@pytest.mark.parametrize(
    "cell",
    [
        """"[{'role': 'user', 'content': 'Name a bird.'}, ...]\"""",
        """"[{'role': 'user', 'content': name()}]\"""",
        """"[{""role"": ""user"", ""content"": ""Name\"""",
    ],
)
def test_what_cannot_be_read_is_never_trained_as_text(
    cell: str, models: Path, case: Path, prefloop: Run
) -> None:
    (case / "x.csv").write_text(f"prompt,chosen,rejected\n{cell}, a, b\n")
    told = prefloop("check", "--model", models / "chatml", "--data", "x.csv")
    assert told.code == 2
    assert "x.csv:2: `prompt` looks like a list of messages" in told.err
    assert "json.dumps" in told.err
