"""Which models a command holds, from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PretrainedConfig

from prefloop.config import DPOConfig, PPOConfig, RewardConfig, TrainingConfig
from prefloop.config.monitoring import SPREAD, MonitorConfig
from prefloop.config.ranges import is_endpoint, is_function
from prefloop.models.shared import stackable
from prefloop.runs import model_path
from prefloop.training.bare_models import Role, make_role, read_config
from prefloop.training.rehearsal import MONITOR, MONITOR_START
from prefloop.training.roles import CRITIC, FIRST, POLICY, critic_host, shares_base


def roles_of(
    config: TrainingConfig,
    device: torch.device,
    read: Callable[[str], PretrainedConfig] = read_config,
) -> list[Role]:
    """The models of a command, from their configurations, which `read` finds by path."""

    def role(name: str, path: str, **more: bool) -> Role:
        return make_role(name, path, read(path), config, device, **more)

    if isinstance(config, RewardConfig):
        return [role("reward model", config.model, scorer=True, trained=True)]
    roles = [role("policy", config.model, trained=True)]
    if isinstance(config, DPOConfig) and config.ref_model:
        roles.append(role("reference", config.ref_model))
    if isinstance(config, PPOConfig):
        if config.ref_model:
            roles.append(role("reference", config.ref_model))
        elif config.kl_coef and not config.lora_rank:  # a copy of what is trained
            roles.append(role("reference", config.model)._replace(stored=torch.float32))
        roles += _beside(config, role)
    return roles + list(_monitoring(config, roles, role))


def _monitoring(
    config: TrainingConfig, roles: Sequence[Role], role: Callable[..., Role]
) -> Iterator[Role]:
    """A monitor that is a model, and what KL is measured from where PPO has no reference."""
    if not isinstance(config, MonitorConfig) or config.monitor is None:
        return
    if config.monitor != SPREAD and not (
        is_function(config.monitor) or is_endpoint(config.monitor)
    ):
        yield role(MONITOR, config.monitor, scorer=True)
    referred = isinstance(config, PPOConfig) and any(each.name == "reference" for each in roles)
    if not (referred or config.lora_rank):
        yield role(MONITOR_START, config.model)._replace(stored=torch.float32)


def _beside(config: PPOConfig, role: Callable[..., Role]) -> Iterator[Role]:
    """Reward models and critic, as training/roles.py loads them where their tokens are alike."""
    hosts = []
    for number, path in enumerate(config.reward_models):
        made = role(f"{FIRST} {number + 1}" if number else FIRST, path, scorer=True)
        if shares_base(config, path):
            made = made._replace(on=POLICY, adapter=stackable(model_path(path)))
        hosts.append(made.on or made.name)
        yield made
    if config.advantage == "gae":
        start = config.value_model or next(iter(config.reward_models), config.model)
        host = critic_host(config, next(iter(hosts), None))
        yield role(CRITIC, start, scorer=True, trained=True)._replace(on=host)
