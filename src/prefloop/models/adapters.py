"""LoRA through PEFT: adding adapters, switching them off for the reference, merging them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefloop import hub
from prefloop.config.ranges import ALL_LINEAR, is_pattern
from prefloop.errors import UserError, first_line
from prefloop.runs import model_path

EMBEDDINGS = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|lm_head)\S*weight$")
MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Kinds whose fused kernels read some layers' weights past their adapters: PEFT refuses those."""
ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
"""Kinds of layers that adapters are offered for."""
PEFT_TIES = {"embed_tokens", "lm_head"}
"""Names under which PEFT finds embeddings and head and keeps them one weight."""


def add_lora(
    module: PreTrainedModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (ALL_LINEAR,),
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Fresh adapters on the targets; `modules_to_save`, and a scorer's head, are trained whole.

    The adapters' dropout is off but within `adapter_dropout`. UserError for names of no layer.
    """
    scorer = hasattr(module, "score")
    left_out = ["score"] if scorer else []
    if module.config.model_type in MAMBA:
        left_out += ["out_proj", "conv1d"]
    chosen = list(targets) != [ALL_LINEAR]
    if chosen and ALL_LINEAR in targets:  # PEFT knows the word only where it stands alone
        others = [name for name in targets if name != ALL_LINEAR]
        targets = list(dict.fromkeys([*_all_linear(module, left_out), *others]))
    if chosen:
        _check_targets(module, targets, left_out)
    _check_saved(module, modules_to_save)
    saved = dict.fromkeys([*modules_to_save, *(["score"] if scorer else [])])
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets[0] if is_pattern(targets[0]) or not chosen else list(targets),
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        exclude_modules=left_out or None,
        task_type=TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM,
        modules_to_save=list(saved) or None,
        ensure_weight_tying=any(_is_end(name, layer) for name in saved for layer in _tied(module)),
    )
    try:
        with quiet():
            wrapped = get_peft_model(module, config)
    except Exception as error:  # PEFT refuses in many ways
        mend = "give other --lora-targets" if chosen else "train all weights with --lora-rank 0"
        raise UserError(
            f"{module.name_or_path}: PEFT cannot add adapters to {type(module).__name__} "
            f"({first_line(error)}); {mend}"
        ) from error
    assert isinstance(wrapped, PeftModel)
    for part in _dropouts(wrapped):
        part.p = 0.0
    return wrapped


def _all_linear(module: PreTrainedModel, left_out: Sequence[str]) -> list[str]:
    """The ends of the names of all linear layers but the heads and what is left out."""
    heads, ends = head_names(module), []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D) and name not in heads:
            end = name.rpartition(".")[2]
            ends.append(name if end.isdigit() else end)
    return [end for end in ends if end not in left_out]


def _check_targets(
    module: PreTrainedModel, targets: Sequence[str], left_out: Sequence[str]
) -> None:
    """UserError for a target that no layer has, or whose adapter could not be merged."""
    layers = {name for name, part in module.named_modules() if isinstance(part, ADAPTABLE)}
    layers = {layer for layer in layers if not any(_is_end(name, layer) for name in left_out)}
    for name in targets:
        if is_pattern(name):  # PEFT's: of the whole name
            hit = {layer for layer in layers if re.fullmatch(name, layer)}
        else:
            hit = {layer for layer in layers if _is_end(name, layer)}
        if not hit:
            raise UserError(_no_such("--lora-targets", name, module, layers))
        if hit & _tied(module):
            raise UserError(
                f"--lora-targets {name}: {module.name_or_path} uses one weight for its embeddings "
                "and its head, and an adapter would change only one of them; leave both out, or "
                "give --modules-to-save embed_tokens"
            )


def _check_saved(module: PreTrainedModel, names: Sequence[str]) -> None:
    """UserError for a name of no layer with weights of its own."""
    layers = {
        name
        for name, part in module.named_modules()
        if name and next(part.parameters(recurse=False), None) is not None
    }
    for name in names:
        if not any(_is_end(name, layer) for layer in layers):
            raise UserError(_no_such("--modules-to-save", name, module, layers))
        tied = _tied(module)
        ends = {layer.rpartition(".")[2] for layer in tied}
        if any(_is_end(name, layer) for layer in tied) and not ends <= PEFT_TIES:
            raise UserError(
                f"--modules-to-save {name}: {module.name_or_path} uses one weight for "
                f"{' and '.join(sorted(ends))}, of which PEFT would train one alone; leave it out, "
                "or train all weights with --lora-rank 0"
            )


def _no_such(setting: str, name: str, module: PreTrainedModel, layers: Iterable[str]) -> str:
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    there = ", ".join(end for end in known if not end.isdigit())
    return f"{setting} {name}: {module.name_or_path} has no such layer; there are: {there}"


def _is_end(name: str, layer: str) -> bool:
    """Whether a layer is called so, as PEFT takes names: whole, or its end from a dot on."""
    return f".{layer}".endswith(f".{name}")


def _tied(module: PreTrainedModel) -> set[str]:
    """Names of embeddings and head where they are one weight."""
    ends = [module.get_input_embeddings(), module.get_output_embeddings()]
    weights = {id(getattr(part, "weight", part)) for part in ends}
    return {n for n, part in module.named_modules() if part in ends} if len(weights) == 1 else set()


def _dropouts(module: nn.Module) -> list[nn.Dropout]:
    """The adapters' own."""
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    inside = (part for layer in layers for part in layer.lora_dropout.values())
    return [part for part in inside if isinstance(part, nn.Dropout)]


@contextmanager
def adapter_dropout(
    modules: Iterable[nn.Module], device: torch.device, seed: int
) -> Iterator[None]:
    """Within it, adapters drop inputs at the rate they were made with, by draws of `seed` alone.

    torch's generators are afterwards what they were.
    """
    rates = {
        part: module.active_peft_config.lora_dropout
        for module in modules
        if isinstance(module, PeftModel)
        for part in _dropouts(module)
    }
    if not rates:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed % 2**63)
        for part, rate in rates.items():
            part.p = rate
            part.train()
        try:
            yield
        finally:
            for part in rates:
                part.p = 0.0


def unwrap(module: nn.Module) -> PreTrainedModel:
    """The Transformers model inside, adapters still in place."""
    inner = module.get_base_model() if isinstance(module, PeftModel) else module
    assert isinstance(inner, PreTrainedModel)
    return inner


@contextmanager
def active(module: nn.Module, names: tuple[str, ...] | None) -> Iterator[None]:
    """Within it, the module's adapters of these names add to it and no others; None: as it stands.

    Modules that are trained whole beside an adapter go with it. PEFT's own switches also say which
    parameters learn; here that stays as it is.
    """
    if names is None:
        yield
        return
    wanted: list[tuple[Any, str, Any]] = []
    for part in module.modules():
        if isinstance(part, BaseTunerLayer):
            wanted.append((part, "_active_adapter", list(names)))
        elif isinstance(part, ModulesToSaveWrapper):
            wanted.append((part, "_disable_adapters", not set(names) & set(part.modules_to_save)))
    changed = [(p, key, getattr(p, key)) for p, key, value in wanted if getattr(p, key) != value]
    for part, key, value in wanted:
        setattr(part, key, value)
    try:
        yield
    finally:
        for part, key, value in changed:
            setattr(part, key, value)


def now_and_again(
    module: nn.Module,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a part's forward pass and of its recomputation: with the same adapters on."""
    names = {tuple(layer.active_adapters) for layer in tuner_layers(module)}
    return nullcontext(), active(module, names.pop()) if len(names) == 1 else nullcontext()


def tuner_layers(module: nn.Module) -> list[Any]:
    """The layers that have adapters."""
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def head_names(module: PreTrainedModel) -> list[str]:
    """Names of the layers behind the last hidden states: a language model's head, a scorer's."""
    heads = getattr(module, "get_output_embeddings", lambda: None)(), getattr(module, "score", None)
    return [n for n, part in module.named_modules() if any(part is head for head in heads)]


def exclusions(
    module: PreTrainedModel, config: LoraConfig, names: Sequence[str]
) -> list[str] | None:
    """Layers left out by a configuration, or for these names, as PEFT takes it: of those there."""
    layers = [name for name, _ in module.named_modules()]
    own = config.exclude_modules or []
    if isinstance(own, str):  # a regular expression
        own = [name for name in layers if re.fullmatch(own, name)]
    there = [n for n in (*own, *names) if any(_is_end(n, layer) for layer in layers)]
    return there or None


def below_head(module: nn.Module, name: str) -> bool:
    """Whether the adapter of this name changes the last hidden states, and not the head alone."""
    heads = head_names(unwrap(module))
    layers = [
        n
        for n, part in unwrap(module).named_modules()
        if isinstance(part, LoraLayer) and (name in part.lora_A or name in part.lora_embedding_A)
    ]
    return not set(layers) <= set(heads)


def without_head(module: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the names of layers, as --lora-targets has them, that are not a head's alone."""
    heads = head_names(module)
    return tuple(n for n in names if not any(_is_end(n, head) for head in heads))


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
    root_base(path)  # which says where the way to it leads round
    config = PeftConfig.from_pretrained(path)
    start = base_path(path, config)
    base: Any
    if is_adapter_folder(start):
        base, info = load_merged(kind, start, **options)
    else:
        base, info = kind.from_pretrained(start, **options)
    if (Path(path) / "config.json").exists():  # a scorer's: its pad token, its mean score
        own = AutoConfig.from_pretrained(path)
        rows = own.get_text_config().vocab_size
    else:
        own, rows = base.config, embedding_rows(path)
    if rows and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # tokens were added to train it
    take_config(base, own)
    config.task_type = None  # a policy's adapter may become a critic's start
    with quiet():
        merged = PeftModel.from_pretrained(base, path, config=config).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.requires_grad_(True)  # PEFT froze it
    return merged, info


def take_config(module: Any, config: PretrainedConfig) -> None:
    """Gives a model another configuration, and each of its layers that has hold of the present one.

    The form of attention, which layers read there, stays.
    """
    before: PretrainedConfig = module.config
    config._attn_implementation = before._attn_implementation
    new = {id(getattr(before, name)): getattr(config, name) for name in before.sub_configs}
    new[id(before)] = config
    for part in module.modules():
        if (held := id(getattr(part, "config", None))) in new:
            part.config = new[held]


def base_path(path: str, config: PeftConfig) -> str:
    """The base's folder or hub id; a relative one is sought beside the adapter, too."""
    name = config.base_model_name_or_path
    if not name:
        raise UserError(
            f"{path}: adapter_config.json names no base model; give base_model_name_or_path there"
        )
    beside = Path(path) / name
    base = name if Path(name).exists() or not beside.exists() else str(beside)
    require_there(base, f"{path}: its base model ")
    return model_path(base)


def root_base(path: str) -> str:
    """The folder or hub id of whole weights that an adapter, or one on another, stands on."""
    return chain(path)[-1]


def chain(path: str) -> list[str]:
    """The folder, and while it is an adapter's, what that stands on: whole weights at the end."""
    passed = [model_path(path)]
    while is_adapter_folder(path := passed[-1]):
        path = base_path(path, PeftConfig.from_pretrained(path))
        if str(Path(path).resolve()) in [str(Path(each).resolve()) for each in passed]:
            raise UserError(
                f"{path}: adapters name each other as their base; mend base_model_name_or_path in "
                "adapter_config.json"
            )
        passed.append(path)
    return passed


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
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`", UserWarning)
        yield
