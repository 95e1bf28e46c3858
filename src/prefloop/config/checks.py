"""What settings must be: the range of each, and what holds between several. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any, get_type_hints

from prefloop.config.resolve import _convert, flag
from prefloop.errors import UserError

POSITIVE = frozenset(
    "epochs batch_size micro_batch_tokens lr adam_eps max_length log_every keep_checkpoints beta "
    "tie_parameter kl_horizon cliprange cliprange_value ppo_epochs num_minibatches "
    "samples_per_prompt max_new_tokens max_concurrent best_of "
    "port session_hours need overlap_need lease_minutes wait_seconds".split()
)
NOT_NEGATIVE = frozenset(
    "max_steps seed warmup weight_decay max_grad_norm lora_rank lora_alpha eval_every save_every "
    "save_minutes center_coefficient sft_coefficient simpo_gamma orpo_lambda desirable_weight "
    "undesirable_weight kl_coef kl_target vf_coef value_lr reward_clip target_kl ptx_coef "
    "temperature top_k max_prompts".split()
)
INTERVALS = {  # name: (lowest, highest, is the lowest allowed, is the highest allowed)
    "eval_fraction": (0.0, 1.0, True, False),
    "adam_beta1": (0.0, 1.0, True, False),
    "adam_beta2": (0.0, 1.0, True, False),
    "label_smoothing": (0.0, 0.5, True, False),
    "gamma": (0.0, 1.0, True, True),
    "gae_lambda": (0.0, 1.0, True, True),
    "top_p": (0.0, 1.0, False, True),
    "agreement": (0.5, 1.0, True, True),
    "overlap": (0.0, 1.0, True, True),
    "gold_share": (0.0, 0.5, True, True),
    "repeat_share": (0.0, 0.5, True, True),
    "random_share": (0.2, 1.0, True, True),
}
ONLY_WITH = {  # a setting that only some values of another one read: it must not be set in vain
    "label_smoothing": ("loss", ("sigmoid", "robust")),
    "sft_coefficient": ("loss", ("sigmoid", "robust", "ipo", "hinge", "simpo", "plackett-luce")),
    "ipo_average": ("loss", ("ipo",)),
    "simpo_gamma": ("loss", ("simpo",)),
    "orpo_lambda": ("loss", ("orpo",)),
    "desirable_weight": ("loss", ("kto",)),
    "undesirable_weight": ("loss", ("kto",)),
    "tie_parameter": ("loss", ("rao-kupper", "davidson")),
    "value_model": ("advantage", ("gae",)),
    "value_lr": ("advantage", ("gae",)),
    "vf_coef": ("advantage", ("gae",)),
    "cliprange_value": ("advantage", ("gae",)),
    "gae_lambda": ("advantage", ("gae",)),
}
FUNCTION = re.compile(r"[\w.]+:\w+")
DEVICE = re.compile(r"auto|cpu|(cuda|mps|xpu)(:\d+)?")


def validate(config: Any) -> None:
    """Check each setting by itself and against the others; UserError names the first bad one."""
    types = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        _convert(value, types[field.name], type(config).__name__, field.name)
        _check_range(field.name, value)
        reader = ONLY_WITH.get(field.name)
        if reader and value != field.default and hasattr(config, reader[0]):
            other, wanted = reader
            if getattr(config, other) not in wanted:
                raise UserError(
                    f"{flag(field.name)} is read only with {flag(other)} {' or '.join(wanted)}; "
                    f"leave it out"
                )
    _check_together(config)


def _check_range(name: str, value: object) -> None:
    if name == "device" and not DEVICE.fullmatch(str(value)):
        raise UserError(f"--device is {value!r}; give auto, cpu, cuda or cuda:N")
    if name == "reward_function" and value is not None and not FUNCTION.fullmatch(str(value)):
        raise UserError(f"--reward-function is {value!r}; give module:function")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{flag(name)} is empty; give a value or leave it out")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    said = f"{flag(name)} is {value}"
    if not math.isfinite(value):
        raise UserError(f"{said}; give a finite number")
    if name in POSITIVE and value <= 0:
        raise UserError(f"{said}; it must be above 0")
    if name in NOT_NEGATIVE and value < 0:
        raise UserError(f"{said}; it must be 0 or more")
    if name == "seed" and value >= 2**63:
        raise UserError(f"{said}; it must be below 2^63")
    if name in INTERVALS:
        low, high, with_low, with_high = INTERVALS[name]
        inside = (low <= value if with_low else low < value) and (
            value <= high if with_high else value < high
        )
        if not inside:
            left, right = "[" if with_low else "(", "]" if with_high else ")"
            raise UserError(f"{said}; it must be in {left}{low:g}, {high:g}{right}")


def _check_together(config: Any) -> None:
    """Rules over several settings: (what is wrong, message), for the settings a class has."""

    def has(*names: str) -> bool:
        return all(hasattr(config, name) for name in names)

    rules: list[tuple[bool, str]] = []
    if has("eval_data", "eval_fraction"):
        rules += [
            (
                bool(config.eval_data and config.eval_fraction),
                "--eval-data and --eval-fraction both give held-out rows; give one of them",
            ),
            (
                bool(config.lora_alpha and not config.lora_rank),
                "--lora-alpha is read only with --lora-rank; leave it out",
            ),
        ]
    if has("max_new_tokens", "max_length"):
        rules.append(
            (
                config.max_new_tokens >= config.max_length,
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in "
                f"--max-length {config.max_length}; lower it or raise --max-length",
            )
        )
    if has("loss", "ref_model"):
        rules.append(
            (
                bool(config.ref_model and config.loss in ("simpo", "orpo")),
                f"--loss {config.loss} has no reference; leave --ref-model out",
            )
        )
    if has("tie_parameter"):
        rules.append(
            (
                config.loss == "rao-kupper" and config.tie_parameter <= 1,
                f"--tie-parameter is {config.tie_parameter}; rao-kupper needs one above 1",
            )
        )
    if has("advantage"):
        rules += _ppo_rules(config)
    if has("prompt", "data"):
        rules.append((bool(config.prompt) == bool(config.data), "give either --prompt or --data"))
    if has("models", "judge"):
        rules += _compare_rules(config)
    if has("to_labels"):
        rules.append(
            (
                bool(config.to_labels) and not 2 <= config.samples_per_prompt <= 9,
                f"--to-labels: people rank 2 to 9 answers, and --samples-per-prompt is "
                f"{config.samples_per_prompt}; change it",
            )
        )
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def _ppo_rules(config: Any) -> list[tuple[bool, str]]:
    return [
        (
            bool(config.reward_model) == bool(config.reward_function),
            "give either --reward-model or --reward-function",
        ),
        (
            config.advantage != "gae" and config.samples_per_prompt < 2,
            f"--advantage {config.advantage} compares samples of one prompt; "
            "give --samples-per-prompt 2 or more",
        ),
        (config.temperature == 0, "--temperature is 0; PPO must sample, give it above 0"),
        (
            bool(config.ptx_coef) != bool(config.sft_data),
            "--ptx-coef and --sft-data belong together; give both or neither",
        ),
        (
            config.kl_target > 0 and config.kl_coef == 0,
            "--kl-target adapts --kl-coef, which is 0; give a --kl-coef above 0",
        ),
    ]


def _compare_rules(config: Any) -> list[tuple[bool, str]]:
    names = [model.partition("=")[0] for model in config.models]
    bad = next((m for m in config.models if not all(m.partition("="))), None)
    taken = {"sft", "best-of-n"} & set(names)
    return [
        (not config.models, "--models is empty; give name=path of each model to compare"),
        (bad is not None, f"--models holds {bad!r}; give name=path"),
        (len(set(names)) < len(names), "--models uses a name twice; give each its own"),
        (bool(taken), f"--models uses the name {''.join(sorted(taken)[:1])!r}; choose another"),
    ]
