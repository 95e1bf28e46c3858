"""The run directory: settings, provenance, metrics, samples, checkpoints, model. Imports no torch.

config.yaml      every setting, as resolved
run.json         versions, revision, command, rows used and dropped, cost, status
metrics.jsonl    one object a logged step
samples.jsonl    what the model wrote on the way
checkpoints/     step-N folders; each stands there complete or not at all
model/           the result, a plain Hugging Face folder
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from prefloop import provenance
from prefloop.config import TrainingConfig
from prefloop.config.resolve import as_dict
from prefloop.errors import UserError
from prefloop.files import append, check_folder, write_atomic
from prefloop.resume import (
    checkpoint_step,
    checkpoints,
    discard,
    flaw,
    named_checkpoint,
    newest_sound,
    pass_over,
    read_record,
    require_same,
)
from prefloop.terminal import shown
from prefloop.tracking import Tracker, open_tracker

Status = Literal["running", "finished", "interrupted", "failed"]

BEFORE_STEP_1 = (
    "config.yaml",
    "run.json",
    "tensorboard",
    "reference_log_probs.safetensors",
    "bad_rows.jsonl",
)
FROM_STEP_1 = ("metrics.jsonl", "samples.jsonl", "checkpoints", "model", "value_model")
"""What a run directory holds when nothing has been trained yet, and from then on."""
LOCK = ".lock"  # held by the process that writes
SAVE_SECONDS = 30.0
"""A killed run's record of its cost is at most this old."""


class Run:
    """One run directory, open for writing; a context manager that records how the run ended.

    On ranks other than the first (`writes=False`) it reads the same state and writes nothing.
    """

    def __init__(self, directory: Path, record: dict[str, Any], *, writes: bool) -> None:
        self.directory = directory
        self.record = record
        self.resume_from: Path | None = None
        self._writes = writes
        self._is_new = not (directory / "run.json").exists()
        self._tracker: Tracker | None = None
        self._made = False  # whether this run made its directory
        self._unlock: Callable[[], object] | None = None  # while it holds its directory
        self._before = {key: record.get(key, 0.0) for key in ("wall_seconds", "cpu_seconds")}
        self._wall, self._cpu = time.monotonic(), provenance.cpu_seconds()
        self._saved_at = self._wall
        provenance.reset_peak_memory()

    @classmethod
    def open(cls, config: TrainingConfig, command: str, *, writes: bool = True) -> Self:
        """Start a run in `config.output` or go on with the one it holds, as `config.resume` says.

        `finished` then tells whether nothing is left to do, and `resume_from` which checkpoint
        to load. Raises UserError when the directory holds a run that this one must not touch.
        """
        directory, settings = config.output, as_dict(config)
        previous = read_record(directory)
        if previous is not None:
            if config.resume == "never":
                raise UserError(
                    f"{directory} holds a run already; give another --output or --resume auto"
                )
            require_same(directory, config, command, previous)
        # 1. What to go on from.
        if config.resume in ("auto", "never"):
            checkpoint = newest_checkpoint(directory)
        else:
            checkpoint = named_checkpoint(config, command)
            if writes and (wrong := flaw(checkpoint)):
                raise UserError(f"--resume {checkpoint}: {wrong}; name another")
        if previous is None and writes:
            _require_free(directory)
        finished = previous is not None and previous["status"] == "finished"
        finished &= config.resume == "auto"  # a checkpoint named outright is gone on from
        damaged: dict[Path, str] = {}
        if writes and not finished and config.resume == "auto":
            checkpoint, damaged = newest_sound(directory)
        # 2. The trackers' packages must be there before anything is written.
        tracker = None
        if writes and not finished:
            tracker = open_tracker(config.track, directory, settings)
        # 3. Write.
        made = not directory.exists()
        lock = None
        if writes and not finished:
            _make_directory(directory)
            lock = _lock(directory)
            for left in directory.glob(".new-*"):  # by a writer that was killed
                left.unlink()
        run = cls(directory, previous or _new_record(config, command), writes=writes)
        run._made = made
        if lock is not None:  # let go when the run ends, or is forgotten, or the process dies
            run._unlock = weakref.finalize(run, os.close, lock)
        run.record["status"] = "finished" if finished else "running"
        run.resume_from, run._tracker = checkpoint, tracker
        pass_over(damaged, checkpoint)
        if finished and writes:
            print(f"{shown(str(directory))}: finished already, nothing to do", flush=True)
        elif writes:
            run.record |= {"versions": provenance.versions(), "revision": provenance.revision()}
            if previous is not None:
                run.record["resumed"] += 1
                run.lines_until(checkpoint_step(checkpoint) if checkpoint else -1)
            write_atomic(directory / "config.yaml", _yaml(settings))
            run._save()
        return run

    @property
    def finished(self) -> bool:
        """Whether the run is done: a command that is given again says so and stops."""
        return bool(self.record["status"] == "finished")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoints"

    @property
    def model(self) -> Path:
        """Folder of the final model."""
        return self.directory / "model"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl (numbers that are not finite become null)."""
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        if self._tracker:
            self._tracker.log(step, {k: v for k, v in metrics.items() if math.isfinite(v)})
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._save()

    def log_samples(self, step: int, samples: Iterable[Mapping[str, object]]) -> None:
        """Append one line a sample to samples.jsonl."""
        self._append("samples.jsonl", [{"step": step, **sample} for sample in samples])

    def lines_until(self, step: int) -> dict[Path, tuple[str, str]]:
        """Each file of lines as it is, and as it is without later steps and a line cut short."""
        texts = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if path.exists():
                text = path.read_text(encoding="utf-8", errors="replace")
                lines = text.splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step(line, path) <= step]
                texts[path] = "".join(lines), "".join(kept)
        return texts

    def go_on(self, step: int, logged: int) -> None:
        """The run goes on after `step`: what was done beyond it is dropped, and its lines too.

        `logged`: the last step whose lines stay.
        """
        if not self._writes:
            return
        for path in self.checkpoints.glob("step-*"):
            if checkpoint_step(path) > step:
                discard(path)
        for path in self.checkpoints.glob(".step-*.tmp"):  # of one that was killed
            shutil.rmtree(path)
        for path, (text, kept) in self.lines_until(logged).items():
            if kept != text:
                write_atomic(path, kept)

    def set_rows(self, counts: Mapping[str, object], of: str = "data") -> None:
        """Record how many rows were read, used and dropped, and why (`RowCounts.as_dict`)."""
        self.note(rows={**self.record.get("rows", {}), of: dict(counts)})

    def note(self, **facts: object) -> None:
        """Record facts in run.json."""
        self.record |= facts
        self._save()

    def finish(self, status: Status, **facts: object) -> None:
        """Record how the run ended, with its cost over all its resumptions."""
        self.note(status=status, ended=_now(), **facts)
        if self._tracker:
            self._tracker.close()
            self._tracker = None
        self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record an end that `finish` did not: interrupted, or failed."""
        discarded = False
        if self.record["status"] == "running":
            if isinstance(error, UserError) and self._is_new and self._writes:
                discarded = self._discard()
            if not discarded:
                stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                try:
                    self.finish("interrupted" if stopped else "failed" if error else "finished")
                except UserError as failure:  # no room: the error that came first is told
                    if error is None:
                        raise
                    print(shown(f"prefloop: {failure}"), file=sys.stderr)
        self._let_go()
        if discarded and self._made and not self.directory.is_symlink():
            with contextlib.suppress(OSError):  # something else was put into it meanwhile
                self.directory.rmdir()

    def _let_go(self) -> None:
        """Give the directory free for others."""
        if self._unlock:
            (self.directory / LOCK).unlink(missing_ok=True)
            self._unlock()
            self._unlock = None

    def _append(self, name: str, rows: list[dict[str, object]]) -> None:
        if not self._writes or not rows:
            return
        text = "".join(json.dumps(_plain(r), ensure_ascii=False) + "\n" for r in rows)
        append(self.directory / name, text)

    def _save(self) -> None:
        if not self._writes:
            return
        self._saved_at = time.monotonic()
        self.record |= {
            "wall_seconds": self._before["wall_seconds"] + self._saved_at - self._wall,
            "cpu_seconds": self._before["cpu_seconds"] + provenance.cpu_seconds() - self._cpu,
            "peak_memory_gib": max(
                self.record.get("peak_memory_gib", 0.0), provenance.peak_memory_gib()
            ),
        }
        write_atomic(self.directory / "run.json", json.dumps(self.record, indent=2) + "\n")

    def _discard(self) -> bool:
        """Take back a run that the user's mistake ended before it had computed anything."""
        if any((self.directory / name).exists() for name in FROM_STEP_1):
            return False
        if self._tracker:
            self._tracker.close()
        for name in BEFORE_STEP_1:
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return True


def is_written(directory: Path) -> bool:
    """Whether a process of this machine holds the run directory: it writes the run now."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with most steps in a run directory."""
    return next(iter(checkpoints(directory)), None)


def model_path(path: str) -> str:
    """A model's folder or hub id, where `path` may also be a run directory that holds one."""
    model = Path(path) / "model"
    return str(model) if (Path(path) / "run.json").exists() and model.is_dir() else path


def _new_record(config: TrainingConfig, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "status": "running",
        "started": _now(),
        "seed": config.seed,
        "device": config.device,
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "resumed": 0,
        "rows": {},
    }


def _require_free(directory: Path) -> None:
    """A new run must not write over what is not a run's.

    A lock without a record is of a run that was killed as it began; nothing of it is lost.
    """
    check_folder(directory)
    begun = (directory / LOCK).exists()
    for name in (*(() if begun else BEFORE_STEP_1), *FROM_STEP_1):
        if (directory / name).exists():
            raise UserError(
                f"--output {directory} holds {name}, and no run that it belongs to; "
                "give another --output"
            )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: {error.strerror}; choose another") from error


def _lock(directory: Path) -> int:
    """The descriptor of the directory's lock, held; UserError where another process holds it."""
    lock = os.open(directory / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"{directory}: another process is writing this run; wait for it, or give another "
            "--output"
        ) from error
    return lock


def _yaml(settings: dict[str, object]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _plain(value: object) -> object:
    """`value` with null for numbers that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _step(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        shown = line.strip()[:60]
        raise UserError(f"{path}: not a line of a run: {shown!r}; remove it") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
