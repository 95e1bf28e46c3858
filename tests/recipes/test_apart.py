"""Commands in processes of their own: what they say, how they end, and signals on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefloop.config import FetchModelConfig, SFTConfig
from prefloop.config.resolve import resolve
from prefloop.errors import Terminated, UserError
from prefloop.recipes.apart import run_apart

CONFIG = FetchModelConfig(name="small")


def ending(code):
    """A program that ends so."""
    return (sys.executable, "-c", code)


def test_the_settings_are_those_of_the_command_line(tmp_path):
    config = SFTConfig(model="m", data=("a.jsonl=1", "b.jsonl=2"), output=tmp_path / "run", lr=2e-5)
    program = ending("import sys; assert sys.argv[1:3] == ['sft', '--config'], sys.argv")
    run_apart("sft", config, tmp_path / "stages" / "sft.yaml", program)
    assert resolve(SFTConfig, tmp_path / "stages" / "sft.yaml", []) == config


def test_a_command_runs_and_tells_of_the_users_mistake(tmp_path, capfd):
    """The real program: its one line comes through, and ours says what to do."""
    with pytest.raises(UserError, match="once that is mended, the same command goes on there"):
        run_apart("fetch-model", CONFIG, tmp_path / "s.yaml")
    assert "no model 'small'; known: gemma-3-270m, smollm2-135m-instruct" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise SystemExit(2)", UserError, "says why above"),
        ("raise SystemExit(1)", RuntimeError, "exit code 1"),
        ("raise SystemExit(130)", KeyboardInterrupt, None),
        ("raise SystemExit(143)", Terminated, None),
        ("import os; os.kill(os.getpid(), 9)", UserError, "SIGKILL: out of memory, perhaps"),
    ],
)
def test_how_it_ended_is_how_we_end(tmp_path, code, error, words):
    with pytest.raises(error, match=words) as caught:
        run_apart("fetch-model", CONFIG, tmp_path / "s.yaml", ending(code))
    assert caught.type is error


WAITS = """
import pathlib, signal, sys
got = []
signal.signal(signal.{name}, lambda number, frame: got.append(number))
pathlib.Path({ready!r}).touch()
while not got:
    signal.pause()
import time
time.sleep(0.2)  # it saves
pathlib.Path({saved!r}).write_text(str(got))
raise SystemExit({code})
"""


@pytest.mark.parametrize(
    ("number", "code", "error"),
    [
        (signal.SIGINT, 130, KeyboardInterrupt),
        (signal.SIGTERM, 143, Terminated),
        (signal.SIGHUP, 143, Terminated),
    ],
)
def test_our_signals_end_it_and_it_saves_first(tmp_path, number, code, error):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    program = WAITS.format(name=number.name, ready=str(ready), saved=str(saved), code=code)

    def send():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    with pytest.raises(error) as caught:
        run_apart("fetch-model", CONFIG, tmp_path / "s.yaml", ending(program))
    assert caught.type is error
    assert saved.read_text() == str([int(number)])  # once
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("code", [0, 1])
def test_a_launcher_that_our_signal_ends_is_no_failure(tmp_path, code):
    """torchrun's exit code is 1 then; and what was done before it heard has ended all the same."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    program = WAITS.format(name="SIGTERM", ready=str(ready), saved=str(saved), code=code)

    def send():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Terminated):
        run_apart("fetch-model", CONFIG, tmp_path / "s.yaml", ending(program))
    assert saved.exists()


def test_ctrl_c_on_a_terminal_reaches_it_once(tmp_path):
    """A terminal sends SIGINT to the whole foreground group, in which only we are."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    program = WAITS.format(name="SIGINT", ready=str(ready), saved=str(saved), code=130)
    ours = f"""
import sys
from pathlib import Path
from prefloop.config import FetchModelConfig
from prefloop.recipes.apart import run_apart
run_apart("fetch-model", FetchModelConfig(), Path({str(tmp_path / "s.yaml")!r}),
          (sys.executable, "-c", {program!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", ours], process_group=0)
    while not ready.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == -signal.SIGINT  # as Python ends on KeyboardInterrupt
    assert Path(saved).read_text() == str([int(signal.SIGINT)])
