"""The run directory: settings, provenance, metrics, samples, checkpoints, model. Imports no torch.

config.yaml      every setting, as resolved
run.json         versions, revision, command, rows used and dropped, cost, status
metrics.jsonl    one object a logged step
samples.jsonl    what the model wrote on the way
checkpoints/     step-N folders; each stands there complete or not at all
model/           the result, a plain Hugging Face folder
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from prefloop.config import TrainingConfig, UserError
from prefloop.files import write_atomic
from prefloop.settings import as_dict, flag, read_yaml
from prefloop.tracking import Tracker, open_tracker

Status = Literal["running", "finished", "interrupted", "failed"]

FREE_TO_CHANGE = frozenset({"output", "resume", "track", "save_every", "keep_checkpoints"})
"""Settings that may differ when a run goes on: they change nothing that is computed."""
PACKAGES = ("prefloop", "torch", "transformers", "tokenizers", "peft", "numpy")
BEFORE_STEP_1 = frozenset(
    {"config.yaml", "run.json", "tensorboard", "reference_log_probs.safetensors"}
)
"""What a run directory holds when nothing has been trained yet."""
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
        self._before = {key: record.get(key, 0.0) for key in ("wall_seconds", "cpu_seconds")}
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()
        self._saved_at = self._wall
        _reset_peak_memory()

    @classmethod
    def open(cls, config: TrainingConfig, command: str, *, writes: bool = True) -> Self:
        """Start a run in `config.output` or go on with the one it holds, as `config.resume` says.

        `finished` then tells whether nothing is left to do, and `resume_from` which checkpoint
        to load. Raises UserError when the directory holds a run that this one must not touch.
        """
        directory, settings = config.output, as_dict(config)
        previous = _read_record(directory)
        if previous is not None:
            if config.resume == "never":
                raise UserError(
                    f"{directory} holds a run already; give another --output or --resume auto"
                )
            _require_same(directory, settings, command, previous)
        # 1. What to go on from.
        if config.resume in ("auto", "never"):
            checkpoint = newest_checkpoint(directory)
        else:
            checkpoint = Path(config.resume)
            if not checkpoint.is_dir():
                raise UserError(f"--resume {checkpoint}: no such checkpoint folder")
        finished = previous is not None and previous["status"] == "finished"
        finished &= config.resume == "auto"  # a checkpoint named outright is gone on from
        # 2. The trackers' packages must be there before anything is written.
        tracker = None
        if writes and not finished:
            tracker = open_tracker(config.track, directory, settings)
        # 3. Write.
        run = cls(directory, previous or _new_record(config, command), writes=writes)
        run.record["status"] = "finished" if finished else "running"
        run.resume_from, run._tracker = checkpoint, tracker
        if finished and writes:
            print(f"{directory}: finished already, nothing to do", flush=True)
        elif writes:
            run.record |= {"versions": _versions(), "revision": _revision()}
            if previous is not None:
                run.record["resumed"] += 1
                run.truncate_after(checkpoint_step(checkpoint) if checkpoint else -1)
            _make_directory(directory)
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

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and a last line cut short, before a run goes on."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if self._writes and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step(line) <= step]
                if kept != lines:
                    write_atomic(path, "".join(kept))

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record an end that `finish` did not: interrupted, or failed."""
        if self.record["status"] != "running":
            return
        if isinstance(error, UserError) and self._is_new and self._writes and self._holds_nothing():
            self._discard()
        else:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self.finish("interrupted" if stopped else "failed" if error else "finished")

    def _append(self, name: str, rows: list[dict[str, object]]) -> None:
        if not self._writes or not rows:
            return
        text = "".join(json.dumps(_plain(r), ensure_ascii=False) + "\n" for r in rows)
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _save(self) -> None:
        if not self._writes:
            return
        self._saved_at = time.monotonic()
        self.record |= {
            "wall_seconds": self._before["wall_seconds"] + self._saved_at - self._wall,
            "cpu_seconds": self._before["cpu_seconds"] + _cpu_seconds() - self._cpu,
            "peak_memory_gib": max(self.record.get("peak_memory_gib", 0.0), _peak_memory_gib()),
        }
        write_atomic(self.directory / "run.json", json.dumps(self.record, indent=2) + "\n")

    def _holds_nothing(self) -> bool:
        names = {path.name for path in self.directory.iterdir()}
        return names <= BEFORE_STEP_1

    def _discard(self) -> None:
        """Take back a run that the user's mistake ended before it had computed anything."""
        if self._tracker:
            self._tracker.close()
        shutil.rmtree(self.directory)


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with most steps in a run directory."""
    folder = directory / "checkpoints"
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(found, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimiser steps before a checkpoint, from its name `step-N`."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: not a checkpoint; its folder is named step-N")
    return int(match[1])


def model_path(path: str) -> str:
    """A model's folder or hub id, where `path` may also be a run directory that holds one."""
    model = Path(path) / "model"
    return str(model) if (Path(path) / "run.json").exists() and model.is_dir() else path


def _read_record(directory: Path) -> dict[str, Any] | None:
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if "status" in record and "command" in record else None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a run's record; give another --output") from error


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


def _require_same(
    directory: Path, settings: dict[str, object], command: str, previous: dict[str, Any]
) -> None:
    """UserError naming what differs between this run and the one that stands in `directory`."""
    if previous["command"] != command:
        raise UserError(
            f"{directory} holds a run of `{previous['command']}`, not of `{command}`; "
            "give another --output"
        )
    stored = read_yaml(directory / "config.yaml")
    differing = sorted(
        key
        for key in settings.keys() | stored.keys()
        if key not in FREE_TO_CHANGE and stored.get(key) != settings.get(key)
    )
    if differing:
        told = ", ".join(f"{flag(k)} was {stored.get(k)}, now {settings.get(k)}" for k in differing)
        raise UserError(
            f"{directory} holds a run with other settings ({told}); "
            "give the same ones or another --output"
        )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: {error.strerror}; choose another") from error


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


def _step(line: str) -> int:
    return int(json.loads(line)["step"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    """Git revision of prefloop's source, with `-dirty` where it was changed; None without git."""
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # ours, not a repository around us
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _reset_peak_memory() -> None:
    """Start this process's peak anew, so that one process can measure several runs (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory_gib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # type: ignore[index]
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
