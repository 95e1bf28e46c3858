"""`prefloop run PIPELINE.yaml`: stages in order; what has not changed is skipped.

    stages:
      - name: sft
        command: sft
        settings: {model: HuggingFaceTB/SmolLM2-135M-Instruct, data: demonstrations.jsonl}
      - name: dpo
        command: dpo
        settings: {model: "${sft}", data: preferences.jsonl, beta: 0.1}

A stage's output is its setting `output`, or a folder (a file NAME.jsonl, where the command writes
rows) of its name under the pipeline's output;
`${name}` in a later stage's settings stands for it. A stage is skipped when it has finished with
the same settings and the same contents of the files they name; it resumes when it was interrupted;
when settings or contents changed, its old output is moved aside and it starts anew. With `ranks: N`
a stage that trains runs in N processes, one a GPU. `pipeline.json` in the pipeline's output keeps
each stage's fingerprint, status and cost.

An item with `rounds` and `stages` of its own repeats them: in round R, `sample` is the stage
`sample-R`, `${round}` is R, and `${policy}` is the output of the last stage of the round before, in
the first round `start`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from prefloop.config import RunConfig, TrainingConfig
from prefloop.config.checks import validate
from prefloop.config.resolve import as_dict, build, nearest, read_yaml
from prefloop.errors import UserError
from prefloop.files import check_folder, set_aside, write_atomic
from prefloop.provenance import cpu_seconds
from prefloop.recipes.apart import AGAIN, run_apart

RECORD = "pipeline.json"
COSTS = ("cpu_seconds", "wall_seconds")
NOT_INPUTS = ("output", "resume")
WORDS = ("round", "policy")
STORES = ("store", "to_labels", "judge_cache")
"""Settings that name a place to work in: what it holds is not part of a stage's fingerprint."""


ROWS = ("sample", "generate", "rank", "label export")
"""Commands whose output is a file of rows, and not a folder."""
NUMBERS = ("evaluate winrate", "evaluate judge", "evaluate reward-model")
"""Those whose output is one JSON object."""


class Command(Protocol):
    """A command's settings class, its function, and what prints the result."""

    @property
    def config(self) -> type:
        """The class of its settings."""

    @property
    def function(self) -> Callable[[Any], Any]:
        """What carries it out."""

    @property
    def show(self) -> Callable[[Any], None]:
        """Prints what the function gave back."""


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline with its settings, checked."""

    name: str
    command: str
    config: Any
    ranks: int = 1
    """Processes that share it, which torchrun starts."""


Start = Callable[[str, Any, Path, Sequence[str]], None]
"""See run_apart."""


def run(config: RunConfig, commands: Mapping[str, Command], start: Start = run_apart) -> None:
    """Run the stages of a pipeline in order; `start` those that have ranks."""
    root = config.output or Path("runs") / config.pipeline.stem
    check_folder(root)
    stages = read_stages(config.pipeline, root, commands, config.seed)
    record = _Record(root / RECORD)
    if config.dry_run:
        from prefloop.recipes.dry_run import tell

        tell(stages, record.stages)
        return
    for number, stage in enumerate(stages, start=1):
        heading = f"[{number}/{len(stages)}] {stage.name} ({stage.command})"
        output = getattr(stage.config, "output", None)
        print_of = fingerprint(stage)
        known = record.stages.get(stage.name)
        there = output is None or output.exists()
        same = known is not None and known["fingerprint"] == print_of
        if known and same and known["status"] == "finished" and there:
            print(f"{heading}: nothing changed, skipped", flush=True)
            continue
        if known and not same and output is not None and output.exists():
            aside = set_aside(output, f"{output.name}.old")
            print(f"{heading}: changed; the old output is now {aside}", flush=True)
        print(f"{heading}: running", flush=True)
        goes_on = known if known and same and known["status"] == "started" else {}
        cost = _Cost(goes_on)
        record.set(stage.name, print_of, "started", cost)
        try:
            if stage.ranks > 1:
                _run_on_ranks(stage, root / "stages" / f"{stage.name}.yaml", start)
            else:
                command = commands[stage.command]
                command.show(command.function(stage.config))
        except BaseException:
            with suppress(UserError):  # of a disk that is full the stage's own file tells
                record.set(stage.name, print_of, "started", cost)
            raise
        record.set(stage.name, print_of, "finished", cost)


def _run_on_ranks(stage: Stage, settings: Path, start: Start) -> None:
    """The stage's command, started by torchrun on this machine."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    program = (*torchrun, f"--nproc-per-node={stage.ranks}", "-m", "prefloop")
    try:
        start(stage.command, stage.config, settings, program)
    except RuntimeError as error:  # torchrun has one exit code for all that goes wrong
        raise UserError(f"{stage.name}: {error}; once that is mended, {AGAIN}") from error


def read_stages(
    path: Path, root: Path, commands: Mapping[str, Command], seed: int | None = None
) -> list[Stage]:
    """The stages of a pipeline file, each checked before any of them runs.

    `seed` is that of each stage that takes one and gives none.
    """
    content = read_yaml(path)
    if extra := next((key for key in content if key != "stages"), None):
        raise UserError(f"{path}: unknown key `{extra}`; the file holds `stages`")
    listed = content.get("stages")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: `stages` must be a list of {{name, command, settings}}")
    stages: list[Stage] = []
    outputs: dict[str, str] = {}
    for where, item, words in _unrolled(listed, path):
        known = {w: text for w, text in words.items() if w in WORDS or text[2:-1] in outputs}
        names = outputs | {w: str(_fill(text, outputs, where)) for w, text in known.items()}
        stage = _read_stage(item, where, root, names, outputs, commands, seed)
        if (output := getattr(stage.config, "output", None)) is not None:
            check_folder(Path(output).parent)
            if str(output) in outputs.values():
                raise UserError(f"{where} ({stage.name}): {output} is another's")
        stages.append(stage)
        if (output := getattr(stage.config, "output", None)) is not None:
            outputs[stage.name] = str(output)
    return stages


def _unrolled(listed: list[Any], path: Path) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """(place in messages, stage, what its `${word}`s stand for beside the earlier stages)."""
    for number, item in enumerate(listed, start=1):
        where = f"{path}: stage {number}"
        if not isinstance(item, dict) or "rounds" not in item:
            yield where, item, {}
            continue
        inner, rounds, policy = item.get("stages"), item["rounds"], item.get("start")
        if extra := next((key for key in item if key not in ("rounds", "start", "stages")), None):
            raise UserError(f"{where}: unknown key `{extra}`; a round has rounds, start and stages")
        if type(rounds) is not int or rounds < 1 or not isinstance(policy, str):
            raise UserError(f"{where}: give `rounds`, 1 or more, and `start`, the first policy")
        if not isinstance(inner, list) or not inner or not all(isinstance(i, dict) for i in inner):
            raise UserError(f"{where}: `stages` must be a list of {{name, command, settings}}")
        for turn in range(1, rounds + 1):
            words = {"round": str(turn), "policy": policy}
            for stage in inner:
                name = str(stage.get("name"))
                yield where, stage | {"name": f"{name}-{turn}"}, dict(words)
                words[name] = policy_of_next = f"${{{name}-{turn}}}"
            policy = policy_of_next


def _read_stage(
    item: object,
    where: str,
    root: Path,
    names: Mapping[str, str],
    outputs: Mapping[str, str],
    commands: Mapping[str, Command],
    seed: int | None,
) -> Stage:
    if not isinstance(item, dict) or not isinstance(item.get("settings", {}), dict):
        raise UserError(f"{where}: give {{name, command, settings}}")
    for key in item:
        if key not in ("name", "command", "settings", "ranks"):
            raise UserError(f"{where}: unknown key `{key}`; give name, command, settings or ranks")
    name, command = str(item.get("name", "")), str(item.get("command", ""))
    where = f"{where} ({name})"
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name in outputs:
        raise UserError(f"{where}: `name` must be a word of its own, used by no other stage")
    listed = [known for known in commands if known != "run"]
    if command not in listed:
        remedy = nearest(command, listed) or f"; choose from {', '.join(listed)}"
        raise UserError(f"{where}: no command `{command}`{remedy}")
    config_class = commands[command].config
    ranks = item.get("ranks", 1)
    if (
        type(ranks) is not int
        or ranks < 1
        or (ranks > 1 and not issubclass(config_class, TrainingConfig))
    ):
        raise UserError(
            f"{where}: `ranks` is {ranks!r}; give the number of processes, 1 or more, to a stage "
            "that trains (sft, reward, dpo, ppo)"
        )
    given = item.get("settings", {})
    settings = {key: _fill(value, names, where) for key, value in given.items()}
    known = {field.name for field in fields(config_class)}
    if seed is not None and "seed" in known:
        settings.setdefault("seed", seed)
    if "output" in known:
        ending = ".jsonl" if command in ROWS else ".json" if command in NUMBERS else ""
        settings.setdefault("output", str(root / (name + ending)))
    config: Any = build(config_class, settings, where)
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Stage(name, command, config, ranks)


def _fill(value: object, outputs: Mapping[str, str], where: str) -> object:
    """`value` with each `${stage}` replaced by that stage's output."""
    if isinstance(value, list):
        return [_fill(item, outputs, where) for item in value]
    if not isinstance(value, str):
        return value

    def output(match: re.Match[str]) -> str:
        if match[1] not in outputs:
            known = f"; stages before this one: {', '.join(outputs) or 'none'}"
            raise UserError(f"{where}: `{match[0]}` names no earlier stage{known}")
        return outputs[match[1]]

    return re.sub(r"\$\{([^}]*)\}", output, value)


def fingerprint(stage: Stage) -> str:
    """sha256 of a stage's command, settings and the contents of every file the settings name."""
    settings = {k: v for k, v in as_dict(stage.config).items() if k not in NOT_INPUTS}
    digest = hashlib.sha256(json.dumps([stage.command, settings], sort_keys=True).encode())
    for name, value in settings.items():
        if name in STORES:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                for file in _input_files(text):
                    digest.update(f"\0{file.name}\0".encode())
                    with file.open("rb") as content:
                        digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _input_files(text: str) -> Iterator[Path]:
    """The files behind a setting: a path, `name=path`, a source of rows with its weight or its
    split, a run directory's model, or a function's.
    """
    if re.fullmatch(r"[\w.]+:\w+", text):
        try:
            spec = importlib.util.find_spec(text.partition(":")[0])
        except (ImportError, ValueError):
            spec = None
        if spec and spec.origin and Path(spec.origin).is_file():
            yield Path(spec.origin)
        return
    source = re.sub(r"=[\d.]+$", "", text)
    place = source.partition("#")[0]  # of a store it is what is worked in: see STORES
    names = [text, text.partition("=")[2], source, place if Path(place).is_dir() else ""]
    for path in map(Path, filter(None, names)):
        if path.is_file():
            yield path
        elif path.is_dir():
            folder = path / "model" if (path / "run.json").exists() else path
            yield from sorted(file for file in folder.rglob("*") if file.is_file())
        else:
            continue
        return


class _Cost:
    """CPU and wall seconds of a stage: from now on, and before it was interrupted."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.before = {name: known.get(name, 0.0) for name in COSTS}
        self.start = self._clocks()

    def so_far(self) -> dict[str, float]:
        """By name."""
        now = self._clocks()
        return {n: round(self.before[n] + now[n] - self.start[n], 1) for n in COSTS}

    @staticmethod
    def _clocks() -> dict[str, float]:
        return dict(zip(COSTS, (cpu_seconds(), time.monotonic()), strict=True))


class _Record:
    """What each stage was last run with, and its cost: `pipeline.json` in the pipeline's output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                self.stages = {
                    name: {key: stage[key] for key in ("fingerprint", "status")}
                    | {key: float(stage[key]) for key in COSTS if key in stage}
                    for name, stage in known.items()
                }
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not a pipeline's record; remove it") from error

    def set(self, name: str, fingerprint: str, status: str, cost: _Cost) -> None:
        self.stages[name] = {"fingerprint": fingerprint, "status": status, **cost.so_far()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.stages, indent=2) + "\n")
