"""Commands in processes of their own: when one ends, all of its memory is given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from prefloop.config.resolve import as_dict
from prefloop.errors import Terminated, UserError
from prefloop.files import write_atomic

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED, TERMINATED = 130, 143  # exit codes of the command line
AGAIN = "the same command goes on there"
SAVING = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(24 * 3600)}
"""torchrun kills ranks that have not ended so many seconds after a signal, and 30 are not enough to
end a step and save. Those before torch 2.12 do so all the same.
"""


def run_apart(command: str, config: Any, settings: Path, program: Sequence[str] = ()) -> None:
    """Carry out a command as `prefloop COMMAND --config SETTINGS` would, and wait for it.

    Its settings are written to the YAML file `settings`. What it says goes where our own words go.
    Signals that would end us end the command, which saves first: then KeyboardInterrupt, or
    Terminated. UserError where it failed by a mistake of the user's, which it has told, or where
    it was killed; RuntimeError where by one of ours. `program`, which may be a launcher of several
    processes, stands for `python -m prefloop`.
    """
    import yaml

    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    settings.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(settings, text)
    words = [*(program or (sys.executable, "-m", "prefloop")), *command.split()]
    code, signals = _wait_for([*words, "--config", str(settings)])
    if signals and (code == 0 or (program and code == 1)):
        code = -signals[0]  # it was done before it heard; or torchrun, which ends so with its ranks
    shown = f"`prefloop {command} --config {settings}`"
    if code in (TERMINATED, -signal.SIGTERM, -signal.SIGHUP):
        raise Terminated
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"{shown} was killed by {name}: out of memory, perhaps; {AGAIN}")
    if code == 2:
        raise UserError(f"{shown} failed, and says why above; once that is mended, {AGAIN}")
    if code:
        raise RuntimeError(f"{shown} failed with exit code {code}, and says why above")


def _wait_for(words: Sequence[str]) -> tuple[int, list[int]]:
    """The exit code of a program, negative where a signal ended it, and our signals, which are
    handed on.

    It has a process group of its own, so that Ctrl-C on a terminal reaches it once and not twice:
    the second would end it before it has saved.
    """
    got: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if process is not None:
            process.send_signal(number)

    before = {int(number): signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, hand_on)
    try:
        if not got:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, env=SAVING | os.environ, process_group=0
            )
            for number in got:  # it came while the process was being made
                process.send_signal(number)
            return process.wait(), got
        return -got[0], got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
