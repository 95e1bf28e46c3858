"""LoRA through PEFT: adding adapters, switching them off for the reference, merging them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.config import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


def add_lora(module: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Fresh adapters on all linear layers; a scorer's head is trained whole."""
    scorer = hasattr(module, "score")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        exclude_modules=["score"] if scorer else None,
        task_type=TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scorer else None,
    )
    with quiet():
        wrapped = get_peft_model(module, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def unwrap(module: nn.Module) -> PreTrainedModel:
    """The Transformers model inside, adapters still in place."""
    inner = module.get_base_model() if isinstance(module, PeftModel) else module
    assert isinstance(inner, PreTrainedModel)
    return inner


def without_adapters(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it, a model with adapters computes what it did before they were added."""
    return module.disable_adapter() if isinstance(module, PeftModel) else nullcontext()


def has_adapters(module: nn.Module) -> bool:
    """Whether the model is trained through adapters."""
    return isinstance(module, PeftModel)


def is_adapter_folder(path: str) -> bool:
    """Whether the folder holds a PEFT adapter and not whole weights."""
    return (Path(path) / "adapter_config.json").exists()


def is_scorer_adapter(path: str) -> bool:
    """Whether an adapter folder belongs to a sequence classifier."""
    return bool(PeftConfig.from_pretrained(path).task_type == TaskType.SEQ_CLS)


def load_merged(kind: Any, path: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base model named by an adapter folder, with the adapter merged in, and how it loaded."""
    config = PeftConfig.from_pretrained(path)
    base, info = kind.from_pretrained(config.base_model_name_or_path, **options)
    if (Path(path) / "config.json").exists():  # a scorer's: its pad token, its mean score
        own = AutoConfig.from_pretrained(path)
        if own.vocab_size != base.config.vocab_size:
            base.resize_token_embeddings(own.vocab_size, mean_resizing=False)
        own._attn_implementation = base.config._attn_implementation
        base.config = own
    config.task_type = None  # a policy's adapter may become a critic's start
    with quiet():
        merged = PeftModel.from_pretrained(base, path, config=config).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.requires_grad_(True)  # PEFT froze it
    return merged, info


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings of what is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an old name of is_activation_checkpointing
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        yield
