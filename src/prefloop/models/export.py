"""Plain Hugging Face folders, written whole or not at all."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from prefloop.models import adapters
from prefloop.models.model import LoadedModel
from prefloop.runs import model_path


def export_model(model: LoadedModel, folder: Path) -> None:
    """Saves weights and tokenizer for Transformers, vLLM, TRL and lm-eval as they are.

    LoRA gives a PEFT adapter folder; where training began from an adapter itself, whole weights
    with both merged, since an adapter cannot name another adapter as its base.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module: Any = model.module
    with _own_dropout(model):
        if isinstance(module, PeftModel) and adapters.is_adapter_folder(model_path(model.source)):
            module = copy.deepcopy(module).merge_and_unload()
        with adapters.quiet():
            module.save_pretrained(str(temporary))
        if model.is_scorer:  # with an adapter too: its pad token, its mean score
            model.hf.config.save_pretrained(str(temporary))
    model.tokenizer.save_pretrained(str(temporary))
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _own_dropout(model: LoadedModel) -> Iterator[None]:
    """Within it, the configuration says the dropout that the model came with."""
    for holder, name, rate in model.dropout:
        setattr(holder, name, rate)
    try:
        yield
    finally:
        for holder, name, _ in model.dropout:
            setattr(holder, name, 0.0)
