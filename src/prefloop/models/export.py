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

from prefloop.models import adapters, shared
from prefloop.models.model import LoadedModel
from prefloop.runs import model_path


def export_model(model: LoadedModel, folder: Path) -> None:
    """Saves weights and tokenizer for Transformers, vLLM, TRL and lm-eval as they are.

    LoRA gives a PEFT adapter folder, on the whole weights that lie below; where training began from
    an adapter that had to be merged, whole weights with both merged.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module: Any = model.module
    merges = isinstance(module, PeftModel) and adapters.is_adapter_folder(model_path(model.source))
    with _own_dropout(model):
        if model.adapters not in (None, (shared.POLICY,)):
            shared.save_adapters(model, temporary)
        elif model.adapters is None and merges:
            copy.deepcopy(module).merge_and_unload().save_pretrained(str(temporary))
        else:
            one = {"selected_adapters": [shared.POLICY]} if isinstance(module, PeftModel) else {}
            with adapters.quiet():
                module.save_pretrained(str(temporary), **one)
        if model.is_scorer:  # with an adapter too: its pad token, its mean score
            model.config.save_pretrained(str(temporary))
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
