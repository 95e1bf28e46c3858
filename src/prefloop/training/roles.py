"""The models beside PPO's policy: reward models and critic, on its base where it is theirs."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.config.ranges import template_arguments
from prefloop.data.tokenize import same_ids
from prefloop.errors import UserError
from prefloop.models import adapters, shared
from prefloop.models.load import (
    load_reward_model,
    load_scorer,
    load_tokenizer,
    recompute_activations,
    require_same_ids,
)
from prefloop.models.model import LoadedModel
from prefloop.models.pads import distinct_pad
from prefloop.models.weights import storage_of
from prefloop.rewards.scorers import with_template_args
from prefloop.runs import model_path
from prefloop.training.start import is_divided, model_options

POLICY, FIRST, CRITIC = "policy", "reward model", "critic"


class Beside(NamedTuple):
    """What is loaded beside a policy."""

    rewards: tuple[LoadedModel, ...]
    critic: LoadedModel | None


def shares_base(config: PPOConfig, path: str) -> bool:
    """Whether a scorer's folder is loaded as an adapter on the policy's base."""
    return _may_share(config) and shared.stands_on_base(config.model, path)


def critic_host(config: PPOConfig, first: str | None) -> str | None:
    """The role on whose base the critic is an adapter; None where it has a base of its own.

    `first`: the role whose base the first reward model stands on, where the critic can begin as it.
    """
    if not _may_share(config):
        return None
    if config.value_model:
        return POLICY if shares_base(config, config.value_model) else None
    return first or POLICY


def _may_share(config: PPOConfig) -> bool:
    """Modules that are trained whole could not be shared."""
    return config.lora_rank > 0 and config.share_base == "auto" and not config.modules_to_save


def load_beside(config: PPOConfig, policy: LoadedModel) -> Beside:
    """Reward models and critic as the settings name them.

    With LoRA they are further adapters on the policy's base where they stand on the same weights,
    and a critic that begins as a reward model with a base of its own shares that one.
    """
    if _may_share(config):
        policy.adapters = policy.adapters or (shared.POLICY,)
    rewards = []
    for number, path in enumerate(config.reward_models):
        if shares_base(config, path):
            model = shared.reward_role(policy, path, f"reward_{number}", load_tokenizer(path))
        else:
            model = load_reward_model(
                path, policy.device, storage_of(config), divided=is_divided(config)
            )
            model.module.requires_grad_(False)
        rewards.append(with_template_args(model, template_arguments(config.template_args)))
    critic = None
    if config.advantage == "gae":
        critic = _critic(config, policy, rewards)
        require_same_ids("--value-model", critic, policy)
    _tell(policy, rewards, critic)
    if config.lora_rank and config.share_base == "auto":
        _tell_apart(config, policy)
    return Beside(tuple(rewards), critic)


def _critic(config: PPOConfig, policy: LoadedModel, rewards: list[LoadedModel]) -> LoadedModel:
    """It reads tokens alone, so it needs no chat template, and has no head of a language model."""
    if config.lora_rank and not adapters.below_head(policy.module, shared.POLICY):
        raise UserError(
            f"--lora-targets {' '.join(config.lora_targets)}: only the head, which the critic has "
            "not; name other layers, too, or give --advantage rloo or grpo, which need no critic"
        )
    first, named = rewards[0] if rewards else None, config.value_model
    if first is not None and not same_ids(policy.tokenizer, first.tokenizer):
        first = None
    start: LoadedModel | None = None
    if critic_host(config, FIRST if first else None) is None:
        pass
    elif named:
        start = shared.reward_role(policy, named, "value_start", load_tokenizer(named))
    elif first is not None:
        start = first
        start.adapters = start.adapters or ()
    else:
        tokenizer = copy.deepcopy(policy.tokenizer)
        if distinct_pad(tokenizer, policy.hf):
            start = shared.as_scorer(policy, tokenizer, config.seed)
    if start is not None:
        lora: Any = policy.module.peft_config
        critic = shared.critic_role(start, CRITIC, lora[shared.POLICY])
        if config.gradient_checkpointing:
            recompute_activations(critic)
        return critic
    path = named or (config.reward_models[0] if first is not None else config.model)
    options = model_options(config) | {"template_args": {}}
    options["lora_targets"] = adapters.without_head(policy.hf, config.lora_targets)
    options["modules_to_save"] = adapters.without_head(policy.hf, config.modules_to_save)
    return load_scorer(path, policy.device, seed=config.seed, **options)


def _tell(policy: LoadedModel, rewards: list[LoadedModel], critic: LoadedModel | None) -> None:
    """One line on what shares a base, and what that saves."""
    named = [("policy", policy), *((f"reward model {m.source}", m) for m in rewards)]
    named += [("critic", critic)] if critic else []
    groups: dict[int, list[tuple[str, LoadedModel]]] = {}
    for name, model in named:
        groups.setdefault(id(model.hf), []).append((name, model))
    for group in groups.values():
        if len(group) < 2 or distributed.rank():
            continue
        size = shared.base_bytes(group[0][1]) / 2**30
        roles = ", ".join(name for name, _ in group[:-1]) + f" and {group[-1][0]}"
        saved = f"saves {size * (len(group) - 1):.2f} GiB"
        print(f"one base of {size:.2f} GiB carries {roles}: {saved}", file=sys.stderr)


def _tell_apart(config: PPOConfig, policy: LoadedModel) -> None:
    """A line for each adapter folder that could have stood on the policy's base and does not."""
    named = (*config.reward_models, *([config.value_model] if config.value_model else ()))
    for path in named:
        if distributed.rank() or not adapters.is_adapter_folder(model_path(path)):
            continue
        if config.modules_to_save:
            reason = "--modules-to-save trains layers of the policy's whole"
        elif not shared.stackable(model_path(path)):
            reason = "its adapter is of a kind that must be merged, not plain LoRA on linear layers"
        elif not shared.stands_on_base(config.model, path):
            reason = "its base has other weights than the policy's"
        else:
            continue
        print(f"{path} has a base of its own: {reason}", file=sys.stderr)
