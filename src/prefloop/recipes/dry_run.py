"""`prefloop run --dry-run`: what a pipeline would do, how long that takes, and in how much memory.

Time is that of the multiplications that the rows need, at the speed at which this machine was just
seen to multiply; sampling takes longer for each, as it is bound by memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prefloop import sources
from prefloop.config import DPOConfig, PPOConfig, TrainingConfig
from prefloop.config.resolve import as_dict
from prefloop.data import stream
from prefloop.data.encoder import Encoder
from prefloop.data.formats import Kind
from prefloop.data.tokenize import tokenize
from prefloop.errors import UserError, first_line
from prefloop.models.load import load_tokenizer, pick_device
from prefloop.models.weights import kept, storage_of
from prefloop.progress import in_words
from prefloop.recipes.pipeline import Stage, fingerprint
from prefloop.recipes.plan_table import work_of
from prefloop.records import RowCounts
from prefloop.resume import checkpoint_step, read_record
from prefloop.runs import model_path, newest_checkpoint
from prefloop.training.bare_models import META, read_config
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import CPU_CONCURRENT, CPU_TOKENS, full_plan
from prefloop.training.planning import in_words as size_in_words

KINDS: dict[str, Kind] = {"sft": "demonstration", "reward": "preference", "ppo": "prompt"}
MODELS = ("model", "ref_model", "reward_model", "value_model")
FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".db")
LOOKED_AT = 200  # rows whose tokens are counted
EFFICIENCY = 0.5
"""Share of the speed of large products that a training step reaches."""
DECODING = 4.0
"""How much longer a token takes that is sampled than one that is read, at most answers at once."""


def tell(stages: Sequence[Stage], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Print each stage's state and, where it will run and can be planned, its time and memory.

    `known`: what each stage was last run with, as the pipeline's record has it.
    """
    running: dict[str, Stage] = {}  # by output: what has yet to be made
    speeds: dict[tuple[torch.device, torch.dtype], float] = {}
    total, unknown = 0.0, []
    for number, stage in enumerate(stages, start=1):
        awaited = [made for output, made in running.items() if _names(stage, output)]
        state = _state(stage, known.get(stage.name), [made.name for made in awaited])
        print(f"[{number}/{len(stages)}] {stage.name} ({stage.command}): {state}", flush=True)
        if state.startswith("nothing changed"):
            continue
        for path in _absent(stage, running):
            print(f"    not there yet: {path}")
        if (output := getattr(stage.config, "output", None)) is not None:
            running[str(output)] = stage
        if isinstance(stage.config, TrainingConfig):
            seconds = _plan(stage, running, speeds)
            total += seconds or 0.0
            unknown += [stage.name] if seconds is None else []
        else:
            unknown.append(stage.name)
    more = f", and what {', '.join(unknown)} may take" if unknown else ""
    print(f"in all: about {in_words(total)}{more}")


def _state(stage: Stage, known: Mapping[str, Any] | None, awaited: Sequence[str]) -> str:
    """What `prefloop run` would do with a stage."""
    output = getattr(stage.config, "output", None)
    there = output is None or output.exists()
    if awaited:
        return f"runs, after {' and '.join(awaited)}"
    if known is None:
        return "runs"
    if known["fingerprint"] != fingerprint(stage):
        return "changed: runs anew" + (", its old output is moved aside" if there else "")
    if known["status"] == "finished":
        return "nothing changed, skipped" if there else "runs: its output is gone"
    return "goes on where it was interrupted"


def _names(stage: Stage, output: str) -> bool:
    """Whether a stage's settings name another's output."""
    pattern = re.compile(re.escape(output) + r"(?![\w.-])")
    return any(pattern.search(text) for text in _texts(stage))


def _texts(stage: Stage) -> Iterator[str]:
    for name, value in as_dict(stage.config).items():
        if name != "output":
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield text


def _absent(stage: Stage, running: Mapping[str, Stage]) -> list[str]:
    """Files that a stage reads, that are not there and that no stage before it makes."""
    place = getattr(stage.config, "to_labels", None)
    names = [re.sub(r"=[\d.]+$", "", text).partition("#")[0] for text in _texts(stage)]
    stores = {str(place).partition("#")[0], getattr(stage.config, "store", None)}
    return [
        name
        for name in dict.fromkeys(names)
        if name.endswith(FILES)
        and not Path(name).exists()
        and name not in {*running, *stores}
        and not any(name.startswith(f"{made}/") for made in running)
    ]


# --- time and memory -----------------------------------------------------------------------------


def _plan(
    stage: Stage,
    running: Mapping[str, Stage],
    speeds: dict[tuple[torch.device, torch.dtype], float],
) -> float | None:
    """Prints a training stage's memory and time; returns its seconds, None where not known."""
    settings = _standing_in(stage.config, running)
    device = pick_device(settings.device)
    try:
        roles = roles_of(settings, device)
        plan = full_plan(work_of(settings), settings, roles, device)
    except Exception as error:  # an architecture may differ in any way, and a hub be out of reach
        print(f"    not planned: {first_line(error)}")
        return None
    memory = f"{size_in_words(plan.peak)} at most, in {plan.when}"
    try:
        tokens, steps = _tokens(settings)
    except UserError as error:
        print(f"    {memory}; time is known once its rows are there ({error})")
        return None
    dtype = kept(storage_of(settings), device, trained=True).products
    key = (device, dtype)
    speeds[key] = speeds.get(key) or _speed(device, dtype)
    products = tokens * _weights(settings.model) * _passes(settings)
    seconds = products / (EFFICIENCY * speeds[key])
    seconds *= 1 - _done(stage, steps)
    print(f"    {steps} steps, {tokens:,} tokens: about {in_words(seconds)}; {memory}")
    return seconds


def _standing_in(settings: Any, running: Mapping[str, Stage]) -> Any:
    """The settings, with the model that a stage begins from in the place of the one it will make,
    and with numbers in the place of `auto`.
    """

    def start(path: str) -> str:
        while path in running:
            path = running[path].config.model
        return model_path(path)

    changes: dict[str, Any] = {}
    for name in MODELS:
        value = getattr(settings, name, None)
        if isinstance(value, str):
            changes[name] = start(value)
        elif value:
            changes[name] = tuple(map(start, value))
    if not settings.micro_batch_tokens:
        changes["micro_batch_tokens"] = CPU_TOKENS
    if getattr(settings, "max_concurrent", 1) == 0:
        changes["max_concurrent"] = CPU_CONCURRENT
    return replace(settings, **changes)


def _tokens(settings: TrainingConfig) -> tuple[int, int]:
    """Tokens that are trained on, by the mean of some rows, and optimiser steps."""
    kind: Kind = KINDS.get(_command(settings), "preference")
    if isinstance(settings, DPOConfig) and settings.loss == "kto":
        kind = "unpaired"
    counts = RowCounts(bad_rows="drop")
    records = [
        record
        for part in sources.load_parts(settings.data, kind, counts, settings.chat)
        for record in part
    ]
    encoder = Encoder(load_tokenizer(settings.model))
    looked_at = records[:LOOKED_AT]
    examples = tokenize(looked_at, encoder, settings.max_length, "right", counts)
    if not examples:
        raise UserError(f"{settings.data}: no row of it can be read")
    lengths = [len(e.prompt) + sum(map(len, e.answers)) for e in examples]
    each = sum(lengths) / len(lengths)
    rows = max(1, round(len(records) * (1 - settings.eval_fraction)))
    batch, epochs, most = settings.batch_size, settings.epochs, settings.max_steps
    if not isinstance(settings, PPOConfig):
        steps = stream.total_steps(rows, batch, epochs, most)
        return round(steps * min(batch, rows) * each), steps
    batch *= settings.num_minibatches
    of_iteration = settings.ppo_epochs * settings.num_minibatches
    steps = most or stream.total_steps(rows, batch, epochs, 0) * of_iteration
    answers = settings.samples_per_prompt * settings.max_new_tokens
    return round(-(-steps // of_iteration) * min(batch, rows) * (each + answers)), steps


def _command(settings: TrainingConfig) -> str:
    return type(settings).__name__.removesuffix("Config").lower()


def _passes(settings: TrainingConfig) -> float:
    """Operations a weight and token: 2 forward; backward 2 for inputs and 2 for weights."""
    step = 2.0 + 2.0 + (0.0 if settings.lora_rank else 2.0)
    step += 2.0 if settings.gradient_checkpointing else 0.0
    if isinstance(settings, PPOConfig):
        critic = settings.advantage == "gae"
        beside = critic + bool(settings.kl_coef) + len(settings.reward_models)
        return 2.0 * (DECODING + beside) + step * settings.ppo_epochs * (1 + critic)
    if isinstance(settings, DPOConfig) and settings.loss not in ("simpo", "orpo"):
        return step + 2.0  # the reference
    return step


def _weights(model: str) -> int:
    """Weights that each token is multiplied by: all but a separate table of embeddings."""
    with META:
        built = AutoModelForCausalLM.from_config(read_config(model))
    count = sum(parameter.numel() for parameter in built.parameters())
    table, head = built.get_input_embeddings(), built.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    return int(count if tied else count - table.weight.numel())


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of large products, seen for a fifth of a second."""
    size = 1024
    left = torch.ones(size, size, device=device, dtype=dtype)
    done, began = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - began < 0.2:
        total = float((left @ left)[0, 0])
        done += 1
    assert total == size
    return 2.0 * done * size**3 / (time.perf_counter() - began)


def _done(stage: Stage, steps: int) -> float:
    """Share of a stage's steps that an interrupted run has behind it."""
    record = read_record(stage.config.output)
    if record is None or record["status"] == "finished":
        return 0.0
    newest = newest_checkpoint(stage.config.output)
    return checkpoint_step(newest) / max(steps, 1) if newest else 0.0
