"""The command line: exit codes, one-line errors, help without torch."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import prefloop
from prefloop.cli import main
from prefloop.commands import COMMANDS, Command
from prefloop.config import DemoConfig
from prefloop.errors import AGAIN, Terminated, UserError

HEAVY = ("torch", "transformers", "tyro", "numpy", "yaml", "peft")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_function_of_the_package(name):
    command = COMMANDS[name]
    for known in (command.function, command.config):
        assert getattr(prefloop, known.__name__) is known
        assert known.__name__ in prefloop.__all__


def commands(function):
    """A command line whose `demo` does what the test says."""
    return {**COMMANDS, "demo": Command(DemoConfig, function)}


@pytest.mark.parametrize(
    ("result", "printed"),
    [
        (None, ""),
        (Path("a/b"), "a/b\n"),
        ({"win_rate": 0.5}, '{\n  "win_rate": 0.5\n}\n'),
    ],
)
def test_what_a_command_gives_back_is_printed(result, printed, capsys):
    assert main(["demo"], commands(lambda config: result)) == 0
    assert capsys.readouterr().out == printed


def test_help_is_fast_and_imports_nothing_heavy():
    """Under half a second: of CPU time, which does not depend on what else runs."""
    code = (
        "import sys, time\nfrom prefloop.cli import main\nassert main(['--help']) == 0\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
        "assert time.process_time() < 0.5"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_import_prefloop_imports_nothing_heavy():
    code = f"import sys, prefloop\nassert not [n for n in {HEAVY} if n in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: prefloop {name}" in said
    assert "--config " in said


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["evaluate"]])
def test_overviews(words, capsys):
    assert main(words) == 0
    assert "evaluate winrate" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prefloop ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dop"], "no command `dop`; did you mean dpo?"),
        (["evaluate", "winrat"], "no command `evaluate winrat`; did you mean evaluate winrate?"),
        (["xyzzy"], "no command `xyzzy`; see prefloop --help"),
        (["demo", "--sede", "1"], "unknown flag --sede; did you mean --seed?"),
        (["demo", "--config"], "--config needs the path of a YAML file"),
        (["demo", "--config", "absent.yaml"], "absent.yaml: No such file"),
        (["demo", "--seed", "-1"], "--seed is -1; it must be 0 or more"),
    ],
)
def test_the_users_mistake_is_one_line_and_exit_2(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("prefloop: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_settings_reach_the_command(tmp_path):
    seen = []
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nquick: true\n")
    for flag in (["--config", str(path)], [f"--config={path}"]):
        assert main(["demo", *flag, "--seed", "4"], commands(seen.append)) == 0
    assert seen == [replace(DemoConfig(), seed=4, quick=True)] * 2


def test_a_pipeline_and_a_models_name_need_no_flag(capsys):
    assert main(["run", "absent.yaml"]) == 2
    assert "absent.yaml: No such file" in capsys.readouterr().err
    assert main(["fetch-model", "xyzzy"]) == 2
    assert "xyzzy" in capsys.readouterr().err


def test_exit_codes(capsys):
    def raising(error):
        def command(config):
            raise error

        return commands(command)

    assert main(["demo"], raising(UserError("rows.jsonl:3:\nempty"))) == 2
    assert capsys.readouterr().err == "prefloop: rows.jsonl:3: empty\n"
    assert main(["demo"], raising(KeyboardInterrupt())) == 130
    assert main(["demo"], raising(Terminated())) == 143
    assert capsys.readouterr().err.endswith("prefloop: terminated\n")
    assert main(["demo"], raising(MemoryError())) == 2
    assert capsys.readouterr().err.startswith("prefloop: out of memory (MemoryError); ")
    full = OSError(errno.ENOSPC, "No space left on device", "events.1")
    assert main(["demo"], raising(full)) == 2
    said = "a file cannot be written or read ([Errno 28] No space left on device: 'events.1')"
    assert capsys.readouterr().err == f"prefloop: {said}; {AGAIN}\n"
    with pytest.raises(RuntimeError):  # Python prints the traceback and exits with 1
        main(["demo"], raising(RuntimeError("ours")))


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_have_their_exit_codes(number, code, word, tmp_path):
    (tmp_path / "judge.py").write_text(
        "import os, time\n"
        "def score(prompts, completions):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(20)\n"
    )
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    words = "evaluate winrate --answers a.jsonl --baseline a.jsonl --judge judge:score".split()
    done = subprocess.run(
        [sys.executable, "-m", "prefloop", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job ignores SIGINT
    )
    assert (done.returncode, done.stderr) == (code, f"prefloop: {word}\n")


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m prefloop sft --help | head -1", shell=True, capture_output=True
    )
    assert done.stderr == b""
