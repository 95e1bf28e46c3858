"""From YAML and flags to a checked configuration: defaults < YAML < flags. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prefloop.config import UserError

C = TypeVar("C")

POSITIVE = frozenset(
    "epochs batch_size micro_batch_tokens lr adam_eps max_length log_every keep_checkpoints beta "
    "tie_parameter kl_horizon cliprange cliprange_value ppo_epochs num_minibatches "
    "samples_per_prompt max_new_tokens max_concurrent best_of "
    "port session_hours need overlap_need lease_minutes wait_seconds".split()
)
NOT_NEGATIVE = frozenset(
    "max_steps seed warmup weight_decay max_grad_norm lora_rank lora_alpha eval_every save_every "
    "center_coefficient sft_coefficient simpo_gamma orpo_lambda desirable_weight "
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


def flag(name: str) -> str:
    """The flag of a field: `max_steps` is `--max-steps`."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to `word`, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve(
    config_class: type[C], yaml_path: Path | None, argv: Sequence[str], prog: str = "prefloop"
) -> C:
    """The configuration of one run, from a YAML file (if any) and flags; UserError if faulty."""
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values = coerce(config_class, read_yaml(yaml_path), str(yaml_path))
    return _parse_flags(config_class, values, argv, yaml_path, prog)


def build(config_class: type[C], settings: Mapping[str, object], where: str) -> C:
    """The configuration that a mapping describes; `where` names its place in messages."""
    values = coerce(config_class, settings, where)
    if missing := [name for name in _required(config_class) if name not in values]:
        raise UserError(f"{where}: `{missing[0]}` is missing")
    return config_class(**values)


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _unique_keys_loader())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{path}{line}: {problem}; mend the YAML") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; write `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _unique_keys_loader() -> type:
    """YAML's safe loader, to which a key that stands twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    place = node.value[number][0].start_mark
                    raise yaml.MarkedYAMLError(problem=f"`{key}` stands twice", problem_mark=place)
            return super().construct_mapping(node, deep)

    return Loader


def coerce(config_class: type, settings: Mapping[str, object], where: str) -> dict[str, Any]:
    """`settings` as the field types of `config_class`; unknown keys and wrong types are errors."""
    types = get_type_hints(config_class)
    for key in settings:
        if key not in types:
            raise UserError(
                f"{where}: unknown key `{key}`"
                + (nearest(key, types) or "; its keys are the flags of `--help`, with underscores")
            )
    return {key: _convert(value, types[key], where, key) for key, value in settings.items()}


def _convert(value: object, wanted: Any, where: str, key: str) -> Any:
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        if value is None and NoneType in choices:
            return None
        return _convert(value, next(t for t in choices if t is not NoneType), where, key)
    if origin is Literal:
        if value in choices:
            return value
        raise UserError(f"{where}: `{key}` is {value!r}; choose from {', '.join(choices)}")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, choices[0], where, key) for item in items)
    if wanted is Path and isinstance(value, str | Path):
        return Path(value)
    if wanted is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # YAML reads 1e-5 as text
            return float(value)  # type: ignore[arg-type]
    if type(value) is wanted:
        return value
    kind = {"str": "text", "int": "a whole number", "float": "a number", "Path": "a path"}
    name = kind.get(wanted.__name__, "true or false")
    raise UserError(f"{where}: `{key}` is {value!r}; give {name}")


def _required(config_class: type) -> list[str]:
    return [
        f.name
        for f in fields(config_class)
        if f.default is MISSING and f.default_factory is MISSING
    ]


def _parse_flags(
    config_class: type[C],
    values: dict[str, Any],
    argv: Sequence[str],
    yaml_path: Path | None,
    prog: str,
) -> C:
    """Flags over `values`, through tyro, whose boxed errors become one line."""
    import tyro

    types = get_type_hints(config_class)
    known = {flag(n) for n in types} | {flag("no-" + n) for n, t in types.items() if t is bool}
    given = {flag(a[2:].partition("=")[0]) for a in argv if a.startswith("--") and a != "--"}
    help_wanted = not {"-h", "--help"}.isdisjoint(argv)
    if not help_wanted:
        for unknown in sorted(given - known):
            raise UserError(f"unknown flag {unknown}" + (nearest(unknown, known) or "; see --help"))
        for name in _required(config_class):
            if name not in values and flag(name) not in given:
                in_file = f", or `{name}` in {yaml_path}" if yaml_path else ""
                raise UserError(f"{flag(name)} is missing; give it{in_file}")
    start = dict.fromkeys(_required(config_class), tyro.MISSING) | values
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config_class,
                args=list(argv),
                prog=prog,
                description=f"{config_class.__doc__}\n\n--config FILE reads settings from YAML.",
                default=config_class(**start),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_one_line(errors.getvalue()))


def _one_line(box: str) -> str:
    """The message inside one of tyro's error boxes: the lines between its first two rules."""
    parts = re.split(r"(?m)^.*[-─]{8,}.*$", box)
    text = parts[1] if len(parts) > 1 else box
    return " ".join(text.replace("│", " ").split()).rstrip(".") + "; see --help"


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


def as_dict(config: Any) -> dict[str, object]:
    """Every setting as plain values, for config.yaml."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for name, v in plain.items()
    }
