"""What Tab offers: asked as the shells ask, and by the shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefloop.commands import COMMANDS
from prefloop.console.completion import SCRIPTS, candidates
from tests.console.terminal import Typed

SOURCE = str(Path(__file__).parents[2] / "src")
DEFINED = f'prefloop() {{ "{sys.executable}" -m prefloop "$@"; }}\n'


def offered(line):
    """The words alone; the last of the line is the one that is begun."""
    return [found.split("\t")[0] for found in candidates(line.split(" "), COMMANDS)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fe", ["fetch-model", "fetch-data"]),
        ("label s", ["serve", "score"]),
        ("label add", ["add-user"]),
        ("evaluate ", ["winrate", "judge", "people", "reward-model"]),
        ("dpo --bet", ["--beta"]),
        ("dpo --loss si", ["sigmoid", "sigmoid-norm", "simpo"]),
        ("dpo --loss simpo --bet", ["--beta"]),
        ("dpo --beta 0.1 --bet", []),  # given already
        ("dpo --no-i", ["--no-ipo-average"]),
        ("dpo --data rows.jsonl --dat", ["--data"]),  # it takes several
        ("label add-user --role ", ["labeller", "admin"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("sft --help", ["--help", "--help-all"]),
        ("dpo --output ", []),  # files
        ("dpo --config ", []),
        ("run ", []),
        ("xyzzy --", []),
    ],
)
def test_candidates(line, words):
    assert offered(line) == words


def test_every_command_and_flag_can_be_reached():
    assert set(offered("")) == {name.split()[0] for name in COMMANDS}
    assert {"--model", "--lr", "--help"} <= set(offered("sft --chat "))


def test_candidates_say_what_they_mean():
    assert candidates(["dem"], COMMANDS) == [
        "demo\tThe whole loop on a real model, with a report at the end."
    ]


def run(*words, **more):
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=True, **more
    ).stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dpo --loss si", ["sigmoid", "sigmoid-norm", "simpo"]),
        ("label ex", ["export"]),
        ("dpo --beta", ["--beta"]),
        ("dpo --output ", []),
    ],
)
def test_bash(line, words):
    typed = ["prefloop", *line.split(" ")]
    listed = " ".join(f"'{word}'" for word in typed)
    script = f"{DEFINED}{SCRIPTS['bash']}\nCOMP_WORDS=({listed}); COMP_CWORD={len(typed) - 1}\n"
    script += '_prefloop; for word in "${COMPREPLY[@]}"; do echo "$word"; done\n'
    assert run("bash", "-c", script) == words


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish():
    script = f"function prefloop; '{sys.executable}' -m prefloop $argv; end\n{SCRIPTS['fish']}\n"
    found = run("fish", "--no-config", "-c", f"{script}complete -C 'prefloop dpo --loss si'")
    assert found == ["sigmoid", "sigmoid-norm", "simpo"]
    found = run("fish", "--no-config", "-c", f"{script}complete -C 'prefloop '")
    assert found[0].split("\t")[0] == "chat" and len(found) > 10
    found = run("fish", "--no-config", "-c", f"{script}complete -C 'prefloop run pyproj'",
                cwd=Path(SOURCE).parent)  # fmt: skip
    assert found == ["pyproject.toml"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh(tmp_path):
    """On a terminal, whose line shows what Tab has put in."""
    (tmp_path / ".zshrc").write_text(
        f"autoload -Uz compinit && compinit -u -D\n{DEFINED}{SCRIPTS['zsh']}\nPS1='ready> '\n"
    )
    environment = {"ZDOTDIR": str(tmp_path), "PYTHONPATH": SOURCE, "TERM": "xterm"}
    with Typed(["zsh", "-i"], environment) as shell:
        shell.wait_for("ready> ")
        for typed, put_in in (("prefloop lab", "el"), ("exp", "ort"), ("--for", "m"), ("k", "to")):
            shell.type(typed + "\t")
            shell.wait_for(typed[-1] + put_in)
