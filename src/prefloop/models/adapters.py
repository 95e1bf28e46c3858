"""LoRA through PEFT: adding adapters, switching them off for the reference, merging them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.config import PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefloop import hub
from prefloop.errors import UserError, first_line

EMBEDDINGS = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|lm_head)\S*weight$")
MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Kinds whose fused kernels read some layers' weights past their adapters: PEFT refuses those."""


def add_lora(module: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Fresh adapters on all linear layers that can have them; a scorer's head is trained whole."""
    scorer = hasattr(module, "score")
    left_out = ["score"] if scorer else []
    if module.config.model_type in MAMBA:
        left_out += ["out_proj", "conv1d"]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        exclude_modules=left_out or None,
        task_type=TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scorer else None,
    )
    try:
        with quiet():
            wrapped = get_peft_model(module, config)
    except Exception as error:  # PEFT refuses in many ways
        raise UserError(
            f"{module.name_or_path}: PEFT cannot add adapters to {type(module).__name__} "
            f"({first_line(error)}); train all weights with --lora-rank 0"
        ) from error
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


@contextmanager
def active(module: nn.Module, names: tuple[str, ...] | None) -> Iterator[None]:
    """Within it, the module's adapters of these names add to it and no others; None: as it stands.

    PEFT's own switches also say which parameters learn; here that stays as it is.
    """
    layers = [] if names is None else tuner_layers(module)
    before = [layer._active_adapter for layer in layers]
    if names is None or all(x == list(names) for x in before):
        yield
        return
    for layer in layers:
        layer._active_adapter = list(names)
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name


def now_and_again(
    module: nn.Module,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a part's forward pass and of its recomputation: with the same adapters on."""
    names = {tuple(layer.active_adapters) for layer in tuner_layers(module)}
    return nullcontext(), active(module, names.pop()) if len(names) == 1 else nullcontext()


def tuner_layers(module: nn.Module) -> list[Any]:
    """The layers that have adapters."""
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def has_adapters(module: nn.Module) -> bool:
    """Whether the model is trained through adapters."""
    return isinstance(module, PeftModel)


class LowRank(NamedTuple):
    """What a layer with plain LoRA computes: base(x), and up(down(x)) * scale of each adapter."""

    base: nn.Module
    halves: tuple[nn.Module, ...]  # down and up of each
    scales: tuple[float, ...]


def low_rank(layer: nn.Module) -> LowRank | None:
    """That of a layer, of the adapters that are on; None where it computes anything else."""
    if type(layer) is not LoraLinear or layer.merged:
        return None
    active = [] if layer.disable_adapters else layer.active_adapters
    names = [name for name in active if name in layer.lora_A]
    drops = [layer.lora_dropout[name] for name in names]
    if any(isinstance(drop, nn.Dropout) and drop.training and drop.p for drop in drops):
        return None
    if any(name in layer.lora_variant for name in names):
        return None
    halves = tuple(half[name] for name in names for half in (layer.lora_A, layer.lora_B))
    return LowRank(layer.base_layer, halves, tuple(layer.scaling[name] for name in names))


def is_adapter_folder(path: str) -> bool:
    """Whether the folder holds a PEFT adapter and not whole weights."""
    return (Path(path) / "adapter_config.json").exists()


def is_scorer_adapter(path: str) -> bool:
    """Whether an adapter folder belongs to a sequence classifier."""
    return bool(PeftConfig.from_pretrained(path).task_type == TaskType.SEQ_CLS)


def require_there(path: str, what: str = "") -> None:
    """UserError for what is no folder here and no hub can give, before the hub is asked for it."""
    if Path(path).exists():
        return
    owner, *rest = path.split("/")
    local = len(rest) > 1 or (rest and (owner in ("", ".", "..", "~", "runs") or not rest[0]))
    if local or "\\" in path or (rest and Path(owner).is_dir()):
        raise UserError(
            f"{what}{path}: not a model folder or hub id: nothing is there; mend the path"
        )
    if not hub.is_cached(path, "config.json", "adapter_config.json", "tokenizer_config.json"):
        hub.require_hub(what + path)


def load_merged(kind: Any, path: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base model named by an adapter folder, with the adapter merged in, and how it loaded."""
    config = PeftConfig.from_pretrained(path)
    base, info = kind.from_pretrained(base_path(path, config), **options)
    if (Path(path) / "config.json").exists():  # a scorer's: its pad token, its mean score
        own = AutoConfig.from_pretrained(path)
        own._attn_implementation = base.config._attn_implementation
        rows = own.get_text_config().vocab_size
    else:
        own, rows = base.config, embedding_rows(path)
    if rows and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # tokens were added to train it
    base.config = own
    config.task_type = None  # a policy's adapter may become a critic's start
    with quiet():
        merged = PeftModel.from_pretrained(base, path, config=config).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.requires_grad_(True)  # PEFT froze it
    return merged, info


def base_path(path: str, config: PeftConfig) -> str:
    """The base's folder or hub id; a relative one is sought beside the adapter, too."""
    name = config.base_model_name_or_path
    if not name:
        raise UserError(
            f"{path}: adapter_config.json names no base model; give base_model_name_or_path there"
        )
    beside = Path(path) / name
    found = name if Path(name).exists() or not beside.exists() else str(beside)
    require_there(found, f"{path}: its base model ")
    return found


def embedding_rows(path: str) -> int | None:
    """Rows of the embeddings that the adapter's weights bring along, whole ones or as modules."""
    file = Path(path) / "adapter_model.safetensors"
    if not file.exists():
        return None
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (not a mapping)
            if "lora_" not in name and EMBEDDINGS.search(name):
                return int(weights.get_slice(name).get_shape()[0])
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings of what is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an old name of is_activation_checkpointing
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        yield
