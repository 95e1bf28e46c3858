"""What models and rows say never reaches a terminal raw, nor is read as rich's markup."""

import io
import json
import logging
import time

import pytest
from rich.console import Console

from prefloop.cli import main
from prefloop.config import ChatConfig
from prefloop.console.chat import chat
from prefloop.progress import Progress
from prefloop.records import RowCounts
from prefloop.terminal import CONTROLS, as_is, shown
from tests.labelling.small import put
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import REWARDS, write_rows

CLEARS = "\x1b[2J\x07\x9b31m\u202e"
"""Clears the screen, rings, colours by a single byte, and turns the direction of writing."""
NAME = f"[bold]x[/bold] [red{CLEARS}"
NAMED = "[bold]x[/bold] [red\\x1b[2J\\x07\\x9b31m\\u202e"


@pytest.fixture
def babbler(tmp_path):
    """A model of random weights: every eighth of the bytes that it writes is a control."""
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


@pytest.fixture
def on_a_terminal(monkeypatch):
    """rich takes what it prints to for a wide terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")


def assert_harmless(text, *parts):
    """Of control characters, those alone that rich paints with."""
    for part in parts:
        assert part in text
    assert CLEARS not in text
    for control in ("\x1b[2J", "\x07", "\x9b", "\u202e"):
        assert control not in text


def test_text_with_brackets_is_no_markup():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(as_is(NAME))
    assert console.file.getvalue() == NAMED + "\n"
    assert shown(NAMED) == NAMED  # once written out, it stays


def test_chat(babbler):
    out = io.StringIO()
    config = ChatConfig(model=babbler, max_new_tokens=60, device="cpu")
    chat(config, io.StringIO("Hi\nAgain\n"), out)
    assert not CONTROLS.search(out.getvalue())
    assert "\\x" in out.getvalue()


@pytest.mark.parametrize("command", ["generate", "sample", "compare"])
def test_answers_and_rows(command, babbler, tmp_path, capfd, on_a_terminal):
    said = {f"chosen {CLEARS}": "a", f"answer {CLEARS}": "b"}
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "a" + CLEARS} | said])
    words = ["--data", data, "--device", "cpu", "--max-new-tokens", 60]
    if command == "compare":
        words += [
            "--sft",
            babbler,
            "--models",
            f"{NAME}={babbler}",
            f"_$x_$={babbler}",
            "--output",
            tmp_path / "c",
        ]
        words += ["--judge", f"{REWARDS}:by_length"]
    else:
        words += ["--model", babbler, *(["--output", tmp_path / "o.jsonl"] * (command == "sample"))]
    assert main([command, *map(str, words)]) == 0
    told = capfd.readouterr()
    assert_harmless(told.out + told.err)
    if command == "generate":
        assert "\\x" in told.out
    if command == "compare":
        assert NAMED in told.out  # the table
        assert NAMED + ": answers" in told.err  # the bar
        answers = (tmp_path / "c/answers.jsonl").read_text()
        assert json.loads(answers.splitlines()[-1])  # the file keeps what was said
    else:
        assert "answer \\x1b[2J" in told.err


def test_the_report_on_labels(tmp_path, capfd, on_a_terminal):
    row = {"prompt": "p", "completions": ["a", "b"], "tiers": [[1], [0]], "labeller": NAME}
    put(tmp_path, [row])
    words = ["label", "report", "--store", str(tmp_path / "labels.db")]
    assert main(words) == 0
    assert_harmless(capfd.readouterr().out, NAMED)


def test_results_as_json(tmp_path, capfd):
    write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    words = ["label", "import", "--store", str(tmp_path / "l.db"), "--project", f"p{CLEARS}\x7f"]
    assert main([*words, "--data", str(tmp_path / "r.jsonl")]) == 0
    told = capfd.readouterr().out
    assert_harmless(told)
    assert "\x7f" not in told


def test_errors_and_counts(babbler, tmp_path, capfd):
    good = {"prompt": "p", "completion": "a"}
    data = write_rows(tmp_path / "d.jsonl", [good, {CLEARS: "x"}, good | {f"x{CLEARS}": 1}])
    words = ["check", "--model", babbler, "--data", str(data), "--kind", "demonstration"]
    assert main(words) == 2
    told = capfd.readouterr()
    assert_harmless(told.out + told.err, "columns `\\x1b[2J")
    counts = RowCounts(1)
    counts.drop(f"bad row: columns `{CLEARS}`")
    assert_harmless(counts.summary(), "\\x1b[2J")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=300)
    with Progress(NAME, 2, every=0.01, console=console) as progress:
        progress.advance(note="[i]half[/i]")
        while "half" not in console.file.getvalue():
            time.sleep(0.01)
    assert_harmless(console.file.getvalue(), NAMED, "[i]half[/i]")


def test_the_log(capfd, monkeypatch):
    log = logging.getLogger("prefloop")
    monkeypatch.setattr(log, "handlers", [])
    assert main(["check", "--model", "a/b/c"]) == 2  # it sets the log up
    log.warning("%s does not suit", NAME)
    assert_harmless(capfd.readouterr().err, f"{NAMED} does not suit")
