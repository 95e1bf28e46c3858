"""Plain Hugging Face folders, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peft import PeftModel

from prefloop.models import adapters
from prefloop.models.load import LoadedModel


def export_model(model: LoadedModel, folder: Path) -> None:
    """Saves weights and tokenizer for Transformers, vLLM, TRL and lm-eval as they are.

    LoRA gives a PEFT adapter folder; where training began from an adapter itself, whole weights
    with both merged, since an adapter cannot name another adapter as its base.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module = model.module
    if isinstance(module, PeftModel) and adapters.is_adapter_folder(model.source):
        module = module.merge_and_unload()
    module.save_pretrained(str(temporary))
    model.tokenizer.save_pretrained(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
