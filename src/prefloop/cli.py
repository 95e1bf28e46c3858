"""`prefloop COMMAND`: find the command, resolve its settings, run it, turn errors into exit codes.

Exit 0: done; 2: the user's mistake, told in one line; 1: ours, with a traceback; 130: interrupted;
143: terminated.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType

from prefloop.commands import COMMANDS, Command
from prefloop.config.resolve import flag, nearest, resolve
from prefloop.console.help import overview, page
from prefloop.errors import (
    AGAIN,
    RankFailed,
    Terminated,
    UserError,
    disk_error,
    first_line,
    out_of_memory,
)
from prefloop.terminal import shown

# How long idle threads spin for their next piece of work. Not at all makes decoding take 1.7 times
# as long on two free cores; as long as libgomp would, 2.5 times as long beside a busy program; this
# little costs 1.3 times in either case. Read by torch's OpenMP when it is loaded, after this.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can lack
if not sys.stderr.isatty():  # no bars in log files
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

HELP = {"-h", "--help", "--help-all"}
DONE, OURS, YOURS, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(
    argv: Sequence[str] | None = None, commands: Mapping[str, Command] = MappingProxyType(COMMANDS)
) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
            stream.reconfigure(errors="replace")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with _told_to_other_ranks():
            return _dispatch(words, commands)
    except UserError as error:
        _say(" ".join(str(error).split()))
        return YOURS
    except Terminated:
        _say("terminated")
        return TERMINATED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except RankFailed as error:
        _say(str(error))
        return error.code
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if out_of_memory(error):
            message = f"out of memory ({first_line(error)}); take less at once, or a smaller model"
        elif (failed := disk_error(error)) is not None:
            message = f"a file cannot be written or read ({first_line(failed)}); {AGAIN}"
        else:
            raise
        _say(message)
        return YOURS
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(message: str) -> None:
    """One line, of one rank of several."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    rank = "" if alone else f"rank {os.environ.get('RANK', '?')}: "
    print(shown(f"prefloop: {rank}{message}"), file=sys.stderr)


@contextmanager
def _told_to_other_ranks() -> Iterator[None]:
    """Each of several ranks hears why another ended."""
    try:
        yield
    except BaseException as error:
        if "torch.distributed" in sys.modules:
            from prefloop.peers import lost_rank

            if (failed := lost_rank(error)) is not None:
                raise failed from error
        raise


def _dispatch(words: list[str], commands: Mapping[str, Command]) -> int:
    if not words or words[0] in HELP | {"help"}:
        print(overview(commands))
        return DONE
    if words[0] == "--complete":  # asked by the shell, at each Tab
        from prefloop.console.completion import candidates

        print("".join(f"{line}\n" for line in candidates(words[1:], commands)), end="")
        return DONE
    if words[0] == "--version":
        from importlib.metadata import version

        print("prefloop", version("prefloop"))
        return DONE
    name = words[0]
    if name in ("evaluate", "label"):
        if not set(words[1:]) - HELP:
            print(overview(commands, f"{name} "))
            return DONE
        name = " ".join(words[:2])
    if name not in commands:
        known = nearest(name, commands) or "; see prefloop --help"
        raise UserError(f"no command `{name}`{known}")
    command, flags = commands[name], words[len(name.split()) :]
    if not HELP.isdisjoint(flags):
        print(page(name, command, whole="--help-all" in flags))
        return DONE
    if command.positional and flags and not flags[0].startswith("-"):
        flags = [flag(command.positional), *flags]
    yaml_path = None
    if not hasattr(command.config, "config"):  # `check` reads another's
        yaml_path, flags = _take_config(flags)
    config: object = resolve(command.config, yaml_path, flags)
    _log_to_stderr()
    command.show(command.function(config))
    return DONE


def _take_config(flags: list[str]) -> tuple[Path | None, list[str]]:
    """Split `--config FILE` off the flags."""
    rest, path = [], None
    words = iter(flags)
    for word in words:
        if word == "--config":
            path = next(words, "")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    if path == "":
        raise UserError("--config needs the path of a YAML file")
    return (None if path is None else Path(path)), rest


def _log_to_stderr() -> None:
    """Show what prefloop itself has to say while it works."""
    log = logging.getLogger("prefloop")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Shown())
        log.addHandler(handler)


class _Shown(logging.Formatter):
    """Messages name models and rows, which others named."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does; the trainers' loop saves first."""
    raise Terminated
