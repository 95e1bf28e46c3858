"""One frozen base for several roles: policy, critic and reward models are adapters on it.

policy = base + A_policy, reward model = base + A_reward + head, critic = base + A_reward + A_critic
+ head, reference = base (MATHS.md, One base, several adapters). The forward passes differ by which
adapters add to it; the numbers are those of separate models.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.config import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import AutoConfig

from prefloop.models import adapters
from prefloop.models.model import LoadedModel
from prefloop.runs import model_path

SCORE = "base_model.model.score.weight"
POLICY = "default"  # what PEFT calls the first
BEGUN_FROM = "begun_from"  # the adapter that a model began from, frozen


def stackable(path: str) -> LoraConfig | None:
    """The configuration of an adapter folder that only adds to linear layers; None for others."""
    if not adapters.is_adapter_folder(path):
        return None
    config = PeftConfig.from_pretrained(path)
    plain = (
        isinstance(config, LoraConfig)
        and not config.use_dora
        and config.bias == "none"
        and set(config.modules_to_save or ()) <= {"score"}
        and not config.trainable_token_indices
        and not config.layer_replication
        and not config.target_parameters
        and adapters.embedding_rows(path) is None
    )
    return config if plain else None


def root_of(path: str) -> str:
    """The folder or hub id of the whole weights that a model stands on."""
    while adapters.is_adapter_folder(path := model_path(path)):
        path = adapters.base_path(path, PeftConfig.from_pretrained(path))
    return path


def add_frozen(module: nn.Module, path: str, name: str, config: LoraConfig) -> dict[str, Tensor]:
    """Puts a folder's adapter beside the others, not to be trained; returns its other weights."""
    config = copy.copy(config)
    config.task_type = config.modules_to_save = None  # the head is the role's own
    config.inference_mode, config.lora_dropout = True, 0.0
    assert isinstance(module, PeftModel)
    with adapters.quiet():
        module.add_adapter(name, config)
        found = load_peft_weights(path, device=str(next(module.parameters()).device))
        ours = {key: tensor for key, tensor in found.items() if "lora_" in key}
        result = set_peft_model_state_dict(module, ours, adapter_name=name)
    assert not result.unexpected_keys  # type: ignore[attr-defined]
    for key, parameter in module.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
    return {key: tensor for key, tensor in found.items() if key not in ours}


def reward_role(policy: LoadedModel, path: str, name: str) -> LoadedModel:
    """A reward model's adapter folder as another role on the policy's base, not to be trained."""
    from prefloop.models.load import load_tokenizer

    config = stackable(path := model_path(path))
    assert config is not None
    others = add_frozen(policy.module, path, name, config)
    head = nn.Linear(others[SCORE].shape[1], 1, bias=False, device=policy.device)
    head.weight.data = others[SCORE].float().to(policy.device)
    own = AutoConfig.from_pretrained(path)
    return replace(
        policy,
        tokenizer=load_tokenizer(path),
        source=path,
        template_args=None,
        adapters=(name,),
        own_head=head.requires_grad_(False),
        own_config=own,
    )
