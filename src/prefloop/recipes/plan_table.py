"""`prefloop check --config RUN.yaml`: a run's memory as a table, and what of it fits a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prefloop.config import (
    CheckConfig,
    DPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainingConfig,
)
from prefloop.config.checks import validate
from prefloop.config.resolve import build, read_yaml
from prefloop.errors import UserError
from prefloop.models.load import pick_device
from prefloop.recipes.pipeline import Command, read_stages
from prefloop.resume import read_record
from prefloop.training import ppo, preference, reward, sft
from prefloop.training.bare_models import Role
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import (
    CPU_CONCURRENT,
    CPU_TOKENS,
    GIB,
    REST,
    SHARE,
    Plan,
    does_not_fit,
    free_memory,
    full_plan,
    in_words,
    longest_micro_batch,
    most_concurrent,
)
from prefloop.training.rehearsal import Work
from prefloop.training.tracing import KINDS, Part

COMMANDS: dict[str, type[TrainingConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
}


def check_plan(config: CheckConfig, commands: Mapping[str, Command]) -> None:
    """Print what each rank of a run will hold, by model and part, and what fits; of a pipeline,
    each training stage's.
    """
    assert config.config is not None
    content = read_yaml(config.config)
    if "stages" not in content:
        settings = read_run(config.config, content, config.command)
        print_plan(settings, config.memory, config.ranks)
        return
    starts: dict[str, str] = {}  # by the folders that stages will write
    for stage in read_stages(config.config, Path("runs") / config.config.stem, commands):
        if stage.command in COMMANDS:
            print(f"\n{stage.name} ({stage.command})")
            print_plan(_begun(stage.config, starts), config.memory, config.ranks)
            starts[str(stage.config.output)] = stage.config.model


def _begun(settings: Any, starts: Mapping[str, str]) -> Any:
    """With models that are not trained yet replaced by what they begin from."""

    def begun(path: Any) -> Any:
        if isinstance(path, (list, tuple)):
            return tuple(map(begun, path))
        while path in starts and not Path(path).exists():
            path = starts[path]
        return path

    names = ("model", "ref_model", "reward_model", "value_model", "monitor")
    paths = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    changed = {name: begun(path) for name, path in paths.items() if begun(path) != path}
    for name, path in changed.items():
        print(f"{paths[name]} is not there yet: planned as {path}, which it begins from")
    return replace(settings, **changed)


def print_plan(settings: Any, asked: str | None, ranks: int = 1) -> None:
    """A table of one run, and what fits `asked` (such as 24GB), or else this machine's device."""
    if settings.batch_size < ranks:
        raise UserError(
            f"--ranks {ranks}: a step has --batch-size {settings.batch_size} rows, too few for one "
            "each; raise --batch-size, or give fewer ranks"
        )
    settings = replace(settings, batch_size=-(-settings.batch_size // ranks))  # a rank's
    shards = _shards(settings, ranks)
    device = _device(settings, asked)
    memory = GIB * float(asked.rstrip("GiB")) if asked is not None else free_memory(device)
    room = SHARE[device.type] * memory if memory is not None else None
    work, roles = replace(work_of(settings), ranks=shards), roles_of(settings, device)
    settings = _settled(work, settings, roles, device, room)
    whole = full_plan(work, settings, roles, device)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has room for every column
    console.print(table(whole, ranks))
    for line in _lines(work, settings, roles, device, room, whole):
        print(line)


def _shards(settings: TrainingConfig, ranks: int) -> int:
    """How many of the ranks divide a model, as the settings ask."""
    if settings.shard == "none":
        return 1
    if settings.mesh == "auto":
        return ranks
    replicas, shards = map(int, settings.mesh.split("x"))
    if ranks > 1 and replicas * shards != ranks:
        raise UserError(
            f"--mesh {settings.mesh} is of {replicas * shards} processes, and --ranks {ranks}"
            "; give one of them another value"
        )
    return shards


def read_run(path: Path, content: dict[str, Any], command: str | None) -> Any:
    """The settings of a training run, checked, in a YAML file or a run directory's config.yaml."""
    named = content.pop("command", None)
    record = read_record(path.parent) if path.name == "config.yaml" else None
    command = command or (str(named) if named else None) or (record or {}).get("command")
    if command not in COMMANDS:
        raise UserError(
            f"{path}: which command it is for is not known; give --command sft, reward, dpo or ppo"
        )
    settings: Any = build(COMMANDS[command], {"output": "run", "data": "rows"} | content, str(path))
    validate(settings)
    return settings


def work_of(settings: TrainingConfig) -> Work:
    """What the command of these settings does."""
    if isinstance(settings, DPOConfig):
        return preference.work(settings)
    return {SFTConfig: sft.WORK, RewardConfig: reward.WORK, PPOConfig: ppo.WORK}[type(settings)]


def _device(settings: TrainingConfig, memory: str | None) -> torch.device:
    """Where it will run: a GPU that is spoken of need not be there."""
    if memory is not None and settings.device != "cpu":
        return torch.device("cuda")
    return pick_device(settings.device)


def _settled(
    work: Work,
    settings: Any,
    roles: Sequence[Role],
    device: torch.device,
    memory: float | None,
) -> Any:
    """With numbers in the place of `auto`, as a run would take them."""
    if isinstance(settings, PPOConfig) and not settings.max_concurrent:
        most = CPU_CONCURRENT
        if memory is not None and device.type == "cuda":
            most = most_concurrent(work, settings, roles, device, memory)
        settings = replace(settings, max_concurrent=max(most, 1))
    if not settings.micro_batch_tokens:
        most = CPU_TOKENS
        if memory is not None and device.type == "cuda":
            most = longest_micro_batch(work, settings, roles, device, memory)
        settings = replace(settings, micro_batch_tokens=max(most, 1))
    return settings


def table(whole: Plan, ranks: int) -> Table:
    """GiB by model and part at the peak."""
    kinds = [kind for kind in KINDS if any(part.kind == kind for part in whole.parts)]
    each = f"each of {ranks} ranks" if ranks > 1 else "each rank"
    rows = Table(title=f"GiB of {each} at the peak, in {whole.when}")
    rows.add_column("model")
    for kind in (*kinds, "sum"):
        rows.add_column(kind, justify="right")
    models = list(dict.fromkeys(part.model for part in whole.parts))
    for model in models:
        sizes = [whole.parts.get(Part(model, kind), 0) for kind in kinds]
        rows.add_row(model, *map(_cell, sizes), _cell(sum(sizes)))
    if len(models) > 1:
        sizes = [sum(s for p, s in whole.parts.items() if p.kind == kind) for kind in kinds]
        rows.add_row("all", *map(_cell, sizes), _cell(sum(sizes)))
    return rows


def _cell(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _lines(
    work: Work,
    settings: Any,
    roles: Sequence[Role],
    device: torch.device,
    memory: float | None,
    whole: Plan,
) -> list[str]:
    lines = [
        f"peak: {whole.peak / GIB:.2f} GiB with micro-batches of {whole.tokens} tokens, rows of "
        f"--max-length {settings.max_length}"
    ]
    if memory is None:
        return lines
    share, rest = SHARE[device.type], REST[device.type]
    room = f"{in_words(memory)} ({share:.0%} of what is there; the rest: {rest})"
    most = longest_micro_batch(work, settings, roles, device, memory)
    if not most:
        least = full_plan(work, replace(settings, micro_batch_tokens=1), roles, device)
        return [*lines, f"does not fit: {does_not_fit(settings, least, memory)}"]
    if whole.peak > memory:
        lines.append(f"does not fit {room}: lower --micro-batch-tokens to {most}")
    else:
        lines.append(f"fits {room}")
    return [*lines, f"longest micro-batch that fits: {most} tokens"]
