"""What a run will hold, before it is run: its own step, rehearsed on tensors without memory.

Nothing is read but the models' configurations. A model of two layers is rehearsed and one of three,
and what each stage of a step holds at its peak is a straight line in their number.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from prefloop import distributed, provenance
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.config.ranges import is_pattern
from prefloop.data.batches import micro_batches, packed_length
from prefloop.data.tokenize import Example
from prefloop.errors import UserError, first_line
from prefloop.models.pieces import split_answers
from prefloop.models.sharding import mesh_shape
from prefloop.runs import Run
from prefloop.training.bare_models import Role
from prefloop.training.full_rows import answers_an_iteration, full_row, full_rows, rows_a_step
from prefloop.training.planned_roles import roles_of
from prefloop.training.rehearsal import BETWEEN, Rehearsal, Work
from prefloop.training.sharded_plan import shard
from prefloop.training.tracing import KINDS, Parts

GIB = 2**30
FEWEST = 2
"""Layers of the smaller model that is rehearsed: one at the top, one at the bottom."""
SHARE = {"cuda": 0.9, "cpu": 0.7}
"""Of free memory, what a plan may fill. The rest of a GPU's is for CUDA's context (0.3 to 0.5 GiB),
cuBLAS's workspaces (8 MiB, 32 on Hopper), graphs and gaps; of a machine's, for libraries and gaps.
"""
REST = {"cuda": "the context, workspaces, graphs and gaps", "cpu": "libraries and gaps"}
CPU_TOKENS = 8192
"""What `--micro-batch-tokens auto` is where no GPU bounds it."""
CPU_CONCURRENT = 64
STAGES = {
    "reference": "computing the reference",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "update": "the update",
    "sampling": "sampling",
    "scoring": "scoring",
}


@dataclass(frozen=True)
class Plan:
    """What each rank holds at the peak of each stage, in bytes by part."""

    tokens: int
    """Of the longest micro-batch."""
    stages: Mapping[str, Parts]

    @cached_property
    def fullest(self) -> str:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def parts(self) -> Parts:
        """What is held at the peak."""
        return self.stages[self.fullest]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def when(self) -> str:
        """The stage of the peak in words."""
        return STAGES[self.fullest]

    def line(self) -> str:
        """Peak, stage, and the models' parts, in GiB."""
        models: dict[str, dict[str, int]] = {}
        for part, size in sorted(self.parts.items(), key=lambda item: KINDS.index(item[0].kind)):
            models.setdefault(part.model, {})[part.kind] = size
        parts = "; ".join(
            f"{model} {in_words(sum(kinds.values()))} ("
            + ", ".join(f"{kind} {in_words(size)}" for kind, size in kinds.items())
            + ")"
            for model, kinds in models.items()
        )
        return (
            f"planned memory of each rank: {in_words(self.peak)} at most, in {self.when}, with "
            f"micro-batches of {self.tokens} tokens: {parts}"
        )


def in_words(size: float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.1f} GiB" if size > GIB else f"{size / 2**20:.1f} MiB"


# --- One plan -----------------------------------------------------------------------------------


def plan(
    work: Work,
    config: TrainingConfig,
    roles: Sequence[Role],
    device: torch.device,
    rows: Sequence[Example],
) -> Plan:
    """The memory of a training command whose steps have these rows, the longest first.

    Where they make several micro-batches, gradients stand while one is computed.
    """
    most = config.micro_batch_tokens
    parts = split_answers(rows, most) if isinstance(config, PPOConfig) else rows  # they learn alone
    rows, *others = micro_batches(parts, most)
    tokens, several = sum(map(packed_length, rows)), bool(others)

    def rehearse(layers: Mapping[str, int]) -> dict[str, Parts]:
        return Rehearsal(work, config, roles, device, rows, several, layers).run()

    def whole(sections: Mapping[str, Parts]) -> Plan:
        stages = _whole_stages(sections)
        if work.ranks > 1:
            stages = shard(stages, roles, config, device, work.ranks)
        return Plan(tokens, stages)

    depth = {role.name: role.config.get_text_config().num_hidden_layers for role in roles}
    alike = all(role.regular for role in roles) and not _layers_chosen(config, roles)
    if max(depth.values()) <= FEWEST + 1 or not alike:
        return whole(rehearse(depth))
    low = {name: min(layers, FEWEST) for name, layers in depth.items()}
    sections = base = rehearse(low)
    for layers in set(depth.values()):  # roles of one depth grow together
        further = layers - FEWEST
        if further > 0:
            grown = {n: low[n] + (depth[n] == layers) for n in low}
            sections = _on_line(sections, base, rehearse(grown), further)
    return whole(sections)


def _layers_chosen(config: TrainingConfig, roles: Sequence[Role]) -> bool:
    """Whether adapters may sit on some layers alone: targets are a pattern, or numbered."""
    given = [config.lora_targets, *(role.adapter.target_modules for role in roles if role.adapter)]
    names = {n for each in given for n in ((each,) if isinstance(each, str) else each or ())}
    return any(is_pattern(name) or re.search(r"\d+\.", name) for name in names)


def _on_line(
    start: Mapping[str, Parts], low: Mapping[str, Parts], high: Mapping[str, Parts], further: int
) -> dict[str, Parts]:
    """`start` with `further` times what `high` holds beyond `low`, at each section's peak."""
    return {
        section: {
            part: parts.get(part, 0)
            + further * (high[section].get(part, 0) - low[section].get(part, 0))
            for part in {*parts, *high[section]}
        }
        for section, parts in start.items()
        if not section.startswith(BETWEEN)
    }


def _whole_stages(sections: Mapping[str, Parts]) -> dict[str, Parts]:
    """Each stage as it is in the fullest of its sections."""
    fullest: dict[str, Parts] = {}
    for section, parts in sections.items():
        stage = next((stage for stage in STAGES if section.startswith(stage)), BETWEEN)
        held = {part: size for part, size in parts.items() if size > 0}
        if sum(held.values()) > sum(fullest.get(stage, {}).values()):
            fullest[stage] = held
    fullest.pop(BETWEEN, None)
    return fullest


# --- What fits ----------------------------------------------------------------------------------


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 if none does; what fits is taken to be less."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def full_plan(
    work: Work, config: TrainingConfig, roles: Sequence[Role], device: torch.device
) -> Plan:
    """With the fullest micro-batch of `--micro-batch-tokens` tokens."""
    rows = full_rows(config, config.micro_batch_tokens)
    further = [full_row(config)] if len(rows) < rows_a_step(config) else []
    return plan(work, config, roles, device, [*rows, *further])


def longest_micro_batch(
    work: Work, config: TrainingConfig, roles: Sequence[Role], device: torch.device, memory: float
) -> int:
    """Tokens of the longest micro-batch whose plan keeps to `memory` bytes; 0 if none does."""

    def fits(tokens: int) -> bool:
        chosen = replace(config, micro_batch_tokens=tokens)
        return full_plan(work, chosen, roles, device).peak <= memory

    row = full_row(config)
    each = packed_length(row)
    if rows := largest(lambda rows: fits(rows * each), rows_a_step(config)):
        return rows * each
    one = len(row.prompt) + len(row.answers[0])  # a row's answers can be computed one by one
    return one if one < each and fits(one) else 0


def most_concurrent(
    work: Work, config: PPOConfig, roles: Sequence[Role], device: torch.device, memory: float
) -> int:
    """Answers that can be sampled at once with `memory` bytes; 0 if not one."""

    def fits(count: int) -> bool:
        chosen = replace(config, max_concurrent=count, micro_batch_tokens=1)
        stages = full_plan(work, chosen, roles, device).stages
        return sum(stages["sampling"].values()) <= memory

    return largest(fits, answers_an_iteration(config))


# --- At the start of a run ----------------------------------------------------------------------


def settle(work: Work, config: TrainingConfig, run: Run, device: torch.device) -> Any:
    """The settings with numbers in the place of `auto`, which the run records: what fits a GPU.

    A run that goes on takes what it took before. Says first where no setting of these would fit.
    """
    work = _divided(work, config)
    if distributed.rank() == 0:
        _warn_early(work, config, device)
    names = [n for n in ("max_concurrent", "micro_batch_tokens") if getattr(config, n, 1) == 0]
    if not names:
        return config
    values: dict[str, Any] = {n: v for n, v in run.record.get("auto", {}).items() if n in names}
    for name in names:
        if name not in values:
            value = _automatic(name, work, replace(config, **values), device)
            values[name] = min(distributed.gather(value))
    run.note(auto=values)
    if distributed.rank() == 0:
        words = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
        print(f"auto: {words}", file=sys.stderr)
    return replace(config, **values)


def _divided(work: Work, config: TrainingConfig) -> Work:
    """As the run's ranks share it."""
    shape = mesh_shape(config)
    return replace(work, ranks=shape[-1]) if shape else work


def _warn_early(work: Work, config: TrainingConfig, device: torch.device) -> None:
    """A line where what stands whatever the rows are is too much, before anything is loaded."""
    try:
        roles = roles_of(config, device)
    except UserError:  # of a model that cannot be read; loading says it
        return
    least, free = at_least(config, roles) / work.ranks, free_memory(device)
    if free is not None and least > SHARE[device.type] * free:
        print(
            f"WARNING: the models' weights, gradients and moments alone take {in_words(least)} or "
            f"more of each rank's memory, and {in_words(free)} are free; prefloop check --config "
            "says what to change",
            file=sys.stderr,
        )


def at_least(config: TrainingConfig, roles: Sequence[Role]) -> float:
    """Bytes that the models, their gradients and their moments take, by the number of weights;
    without adapters, and as if every weight were kept as linear layers are.
    """
    moments = 2 if config.optimizer == "adamw8bit" else 8
    total = 0.0
    for role in roles:
        if role.on is None:
            each = 0.5 if role.kept.nf4 else role.kept.matrices.itemsize
            learns = role.trained and not config.lora_rank
            total += role.numel * (2 * each + moments if learns else each)
    return total


def _automatic(name: str, work: Work, config: TrainingConfig, device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CONCURRENT if name == "max_concurrent" else CPU_TOKENS
    roles, free = roles_of(config, device), free_memory(device)
    assert free is not None
    memory = SHARE["cuda"] * free
    if name == "max_concurrent":
        assert isinstance(config, PPOConfig)
        value = most_concurrent(work, config, roles, device, memory)
    else:
        value = longest_micro_batch(work, config, roles, device, memory)
    if not value:
        least = full_plan(work, replace(config, micro_batch_tokens=1), roles, device)
        raise UserError(does_not_fit(config, least, memory))
    return value


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process has or can have; None where the system does not say."""
    if device.type != "cuda":
        return provenance.free_memory()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device)


def does_not_fit(config: TrainingConfig, least: Plan, memory: float) -> str:
    """What to change where not even one row fits."""
    remedies = []
    if least.fullest == "sampling":
        remedies.append("lower --max-concurrent or --max-new-tokens")
    if not config.lora_rank:
        remedies.append("give --lora-rank 16")
    if not config.gradient_checkpointing:
        remedies.append("give --gradient-checkpointing")
    remedies.append("lower --max-length, or take a smaller model or more GPU memory")
    return (
        f"a micro-batch of one row needs {in_words(least.peak)} in {least.when}, and there are "
        f"{in_words(memory)}; {', '.join(remedies)}"
    )


def announce(
    work: Work,
    config: TrainingConfig,
    run: Run,
    device: torch.device,
    examples: Sequence[Example],
) -> None:
    """Prints and records what the longest micro-batch of these rows will need, before it is tried.

    A model that cannot be rehearsed is trained all the same.
    """
    if distributed.rank() > 0:
        return
    rows = sorted(examples, key=packed_length, reverse=True)[: rows_a_step(config)]
    work = _divided(work, config)
    try:
        planned = plan(work, config, roles_of(config, device), device, rows)
    except Exception as error:  # an architecture may differ in any way
        print(f"memory is not planned: {first_line(error)}", file=sys.stderr)
        return
    run.note(planned_gib=round(planned.peak / GIB, 3))
    print(planned.line() + _room(work, config, device, planned), file=sys.stderr)


def _room(work: Work, config: TrainingConfig, device: torch.device, planned: Plan) -> str:
    """How much there is, and what would fit a GPU."""
    free, kind = free_memory(device), device.type
    if free is None:
        return ""
    memory = SHARE[kind] * free
    told = f"{in_words(memory)}, {SHARE[kind]:.0%} of what is free (the rest: {REST[kind]})"
    if planned.peak > memory:
        return f"; WARNING: that is more than the {told}"
    if kind != "cuda":
        return ""
    most = longest_micro_batch(work, config, roles_of(config, device), device, memory)
    return f"; of {told}, which hold --micro-batch-tokens {most}"
