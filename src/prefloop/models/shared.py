"""One frozen base for several roles: policy, critic and reward models are adapters on it.

policy = base + A_policy, reward model = base + A_reward + head, critic = base + A_reward + A_critic
+ head, reference = base (MATHS.md, One base, several adapters). The forward passes differ by which
adapters add to it; the numbers are those of separate models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.config import PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from prefloop.models import adapters
from prefloop.models.model import SCORE_POSITION, LoadedModel
from prefloop.provenance import files_digest
from prefloop.runs import model_path

POLICY = "default"  # what PEFT calls the first
BEGUN_FROM = "begun_from"  # the adapter that a model began from, frozen
SCORE = "base_model.model.score.weight"


def stackable(path: str) -> LoraConfig | None:
    """The configuration of an adapter folder that only adds to linear layers; None for others."""
    if not adapters.is_adapter_folder(path):
        return None
    config = PeftConfig.from_pretrained(path)
    plain = (
        isinstance(config, LoraConfig)
        and not config.use_dora
        and config.init_lora_weights in (True, False, "gaussian")  # others change the base
        and config.bias == "none"
        and not config.lora_bias
        and set(config.modules_to_save or ()) <= {"score", "classifier"}  # PEFT adds the second
        and not config.trainable_token_indices
        and not config.layer_replication
        and not config.target_parameters
        and adapters.embedding_rows(path) is None
        and not adapters.is_adapter_folder(adapters.base_path(path, config))
    )
    return config if plain else None


def stands_on_base(policy: str, path: str) -> bool:
    """Whether a folder is an adapter that can be put on the base of a policy with fresh adapters:
    one of equal weights. Neither needs to be loaded.
    """
    if not stackable(model_path(path)):
        return False
    policy = model_path(policy)
    if adapters.is_adapter_folder(policy) and not stackable(policy):
        return False  # what it adds is merged into the base
    pair = adapters.root_base(policy), adapters.root_base(path)
    if pair[0] == pair[1]:
        return True
    digests = [files_digest(base) for base in pair if Path(base).is_dir()]
    return len(digests) == 2 and digests[0] == digests[1] != ""


def add_frozen(model: LoadedModel, path: str, name: str) -> dict[str, Tensor]:
    """Puts a folder's adapter beside the model's others, not to be trained; returns what else the
    folder holds.
    """
    config = stackable(path)
    assert config is not None, path
    weights = load_peft_weights(path, device=str(model.device))
    own = {key: tensor for key, tensor in weights.items() if "lora_" in key}
    add_adapter(model, name, config)
    fresh = adapter_weights(model, name)
    placed = {key.removesuffix(".weight"): tensor for key, tensor in own.items()}
    assert fresh.keys() == placed.keys(), path
    for key, parameter in fresh.items():
        parameter.data.copy_(placed[key])
        parameter.requires_grad_(False)
    return {key: tensor for key, tensor in weights.items() if key not in own}


def add_adapter(
    model: LoadedModel, name: str, config: LoraConfig, left_out: Sequence[str] = ()
) -> None:
    """A fresh adapter on its targets but for `left_out`; which ones are on, and which learn, stays
    as it was.
    """
    config.task_type = config.modules_to_save = None  # the head is the role's own
    config.exclude_modules = adapters.exclusions(model.hf, config, left_out)
    config.lora_dropout = 0.0
    config.base_model_name_or_path = None  # PEFT fills in what it is added to
    learning = [p for p in model.module.parameters() if p.requires_grad]
    with adapters.quiet():
        if isinstance(model.module, PeftModel):
            model.module.add_adapter(name, config)
        else:
            model.module = get_peft_model(model.hf, config, adapter_name=name)
    base = adapters.root_base(model.source)
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    model.module.peft_config[name].base_model_name_or_path = base
    for parameter in learning:
        parameter.requires_grad_(True)
    for parameter in adapter_weights(model, name).values():
        parameter.data = parameter.data.float()


def adapter_weights(model: LoadedModel, name: str) -> dict[str, nn.Parameter]:
    """An adapter's weights by the names that they have in a file, but for `.weight` behind."""
    named = model.module.named_parameters()
    part = f".{name}"
    return {k.partition(part)[0]: p for k, p in named if "lora_" in k and f"{part}." in f"{k}."}


def take_head(module: Any, path: str) -> None:
    """Gives a scorer, on the base of an adapter folder, that folder's head and configuration."""
    module.score.weight.data = load_peft_weights(path, device="cpu")[SCORE].float()
    own = AutoConfig.from_pretrained(path)
    adapters.take_config(module, own)


def begin_from(model: LoadedModel, path: str) -> LoadedModel:
    """The model, fresh adapters in place or none, on top of the adapter that it begins from."""
    fresh = (POLICY,) if isinstance(model.module, PeftModel) else ()
    add_frozen(model, path, BEGUN_FROM)
    return replace(model, adapters=(BEGUN_FROM, *fresh))


def reference_of(policy: LoadedModel) -> LoadedModel:
    """The policy as it was before its fresh adapters were added."""
    before = tuple(name for name in policy.adapters or () if name != POLICY)
    return replace(policy, adapters=before)


def reward_role(
    policy: LoadedModel, path: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> LoadedModel:
    """A reward model's adapter folder as another role on the policy's base, not to be trained."""
    path = model_path(path)
    weight = add_frozen(policy, path, name)[SCORE]
    return replace(
        policy,
        tokenizer=tokenizer,
        source=path,
        template_args=None,
        adapters=(name,),
        own_head=_head(weight).requires_grad_(False),
        own_config=AutoConfig.from_pretrained(path),
    )


def critic_role(start: LoadedModel, name: str, lora: LoraConfig) -> LoadedModel:
    """A critic that begins as a scorer, through fresh adapters on its base and a head of its own.

    `lora` says which adapters; a head that the critic does not read gets none.
    """
    score: Any = start.score_head
    before = start.adapters or ()
    add_adapter(start, name, copy.copy(lora), adapters.head_names(start.hf))
    for parameter in adapter_weights(start, name).values():
        parameter.requires_grad_(True)
    head, own = _head(score.weight.detach()), copy.deepcopy(start.config)
    return replace(start, adapters=(*before, name), own_head=head, own_config=own)


def draw_head(weight: Tensor, seed: int) -> None:
    """A new scorer's, [1, D]: normal, of deviation 1/sqrt(D + 1) (lm-human-preferences)."""
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(weight, std=(weight.shape[1] + 1) ** -0.5, generator=generator)


def as_scorer(policy: LoadedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> LoadedModel:
    """The policy as it was before its fresh adapters, with a new head drawn as load_scorer does."""
    start, config = reference_of(policy), copy.deepcopy(policy.config)
    width = config.get_text_config().hidden_size
    weight = torch.empty(1, width)
    draw_head(weight, seed)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    setattr(config, SCORE_POSITION, "rendered")
    head = _head(weight.to(policy.device))
    return replace(start, tokenizer=tokenizer, own_head=head, own_config=config)


def _head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    head.weight = nn.Parameter(weight.float().clone())
    return head


def base_bytes(model: LoadedModel) -> int:
    """Of the weights that the roles of the model's module share."""
    parts = ((name, p) for name, p in model.module.named_parameters() if "lora_" not in name)
    return sum(p.nbytes for _, p in parts)


def save_adapters(model: LoadedModel, folder: Path) -> None:
    """Writes all of a role's adapters as one, of the sum of their ranks, and a scorer's head.

    B_1 A_1 s_1 + B_2 A_2 s_2 = [B_1 s_1, B_2 s_2] [A_1; A_2].
    """
    module, names = model.module, model.adapters or ()
    assert isinstance(module, PeftModel)
    configs: list[Any] = [module.peft_config[name] for name in names]
    halves: dict[str, tuple[Tensor, int]] = {}  # each with the side of its ranks
    targets = set()
    for key, layer in module.named_modules():
        one: Any = layer
        kind = "lora_embedding_" if getattr(one, "lora_embedding_A", ()) else "lora_"
        downs, ups = getattr(one, f"{kind}A", {}), getattr(one, f"{kind}B", {})
        if not (present := [name for name in names if name in downs]):
            continue
        targets.add(key.removeprefix("base_model.model."))
        down = [getattr(downs[name], "weight", downs[name]) for name in present]
        up = [getattr(ups[name], "weight", ups[name]) * one.scaling[name] for name in present]
        end = "" if kind == "lora_embedding_" else ".weight"
        halves[f"{key}.{kind}A{end}"] = torch.cat(down), 0
        halves[f"{key}.{kind}B{end}"] = torch.cat(up, 1), 1
    rank = max(half.shape[dim] for half, dim in halves.values())
    weights = {key: _to_rank(half, rank, dim) for key, (half, dim) in halves.items()}
    if model.is_scorer:
        head: Any = model.score_head
        trained = getattr(head, "modules_to_save", {POLICY: head})  # PEFT's copy of it
        weights[SCORE] = trained[POLICY].weight.detach().contiguous()
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=_short_names(targets, module),
        fan_in_fan_out=configs[0].fan_in_fan_out,
        task_type=TaskType.SEQ_CLS if model.is_scorer else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if model.is_scorer else None,
        base_model_name_or_path=configs[-1].base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: w.detach().cpu() for k, w in weights.items()}, folder / "adapter_model.safetensors"
    )
    lora.save_pretrained(str(folder))


def _to_rank(weight: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros behind, where a layer has fewer adapters than the model."""
    missing = list(weight.shape)
    missing[dim] = rank - missing[dim]
    return torch.cat([weight, weight.new_zeros(missing)], dim).contiguous()


def _short_names(targets: Iterable[str], module: nn.Module) -> list[str]:
    """The layers by the ends of their names, where those name no other; else whole."""
    ends = {name.rpartition(".")[2] for name in targets}
    linear = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for name, part in module.named_modules()
        if isinstance(part, adapters.ADAPTABLE) and "lora_" not in name
    }
    others = {name for name in linear - set(targets) if name.rpartition(".")[2] in ends}
    return sorted(targets if others else ends)
