"""How a training command begins: checks, ranks, seeds, the run directory, the model's options."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.models.heads import smallest_pass
from prefloop.models.load import pick_device
from prefloop.models.model import LoadedModel, ModelOptions
from prefloop.models.sharding import mesh_shape, shard
from prefloop.models.weights import storage_of
from prefloop.peers import patiently
from prefloop.runs import Run
from prefloop.training.adamw import require_bitsandbytes


def start(config: TrainingConfig, command: str) -> tuple[Run, torch.device]:
    """Checks settings, joins the ranks, seeds, opens the run directory, says where to compute."""
    validate(config)
    require_bitsandbytes(config.optimizer)
    device = pick_device(distributed.local_device(config.device))
    distributed.start(device)
    mesh_shape(config)
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # ours take none of these two; a user's reward function may
    np.random.seed(config.seed % 2**32)
    if distributed.world() > 1:  # every rank sees the directory as it was before the first writes
        run = Run.open(config, command, writes=False)
        distributed.barrier()
    with patiently():  # a checkpoint may be large
        if distributed.rank() == 0:
            run = Run.open(config, command)
            run.record["device"] = str(device)
        run.resume_from, *_ = distributed.gather(run.resume_from)  # which is sound
    return run, device


def divide(config: TrainingConfig, models: Iterable[LoadedModel | None]) -> None:
    """Divides the run's models among its processes, as the settings ask."""
    shape, there = mesh_shape(config), [model for model in models if model is not None]
    if shape is not None:
        shard(there, shape, smallest_pass)


def is_divided(config: TrainingConfig) -> bool:
    """Whether models come to `divide` that may be unread until then; PEFT copies those layers that
    it is to train whole.
    """
    return mesh_shape(config) is not None and not config.modules_to_save


def model_options(config: TrainingConfig) -> ModelOptions:
    """What of the settings concerns the loading of a trained model."""
    return {
        "storage": storage_of(config),
        "trained": True,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_targets": config.lora_targets,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "gradient_checkpointing": config.gradient_checkpointing,
        "divided": is_divided(config),
        "template_args": template_arguments(config.template_args),
    }
