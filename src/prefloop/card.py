"""The model card of an exported folder, made of its run's record. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from prefloop import config as c
from prefloop.config.resolve import flag, read_yaml
from prefloop.hub import readme
from prefloop.resume import read_record

CONFIGS = {"sft": c.SFTConfig, "reward": c.RewardConfig, "dpo": c.DPOConfig, "ppo": c.PPOConfig}
UNTOLD = {"output", "resume", "device", "track"}
"""Settings that say nothing of the model."""
NO_RESULT = ("step", "lr", "grad_norm", "tokens_per_second")
CLASSES = {False: "AutoModelForCausalLM", True: "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Contents:
    """What the folder holds that the card is for."""

    name: str  # under which it will be loaded
    adapter: bool  # and not whole weights
    scorer: bool  # and not a language model
    score_position: str = ""  # a scorer's
    gguf: str = ""  # the file's name, where it is one for llama.cpp


def run_of(source: Path) -> Path | None:
    """The run directory that a folder is, or is the model of."""
    for directory in (source, source.parent):
        if (directory / "run.json").exists() and source in (directory, directory / "model"):
            return directory
    return None


def origin(model: str) -> str:
    """What a chain of runs began with: a hub id, or a folder that no run made."""
    passed: set[Path] = set()
    while (run := run_of(Path(model))) is not None and run.resolve() not in passed:
        passed.add(run.resolve())
        model = str(read_yaml(run / "config.yaml")["model"])
    return model


def model_card(run: Path | None, base: str, contents: Contents) -> str:
    """Markdown with the hub's metadata, for the model of `run` that came from `base`.

    Folders are told by their names alone: where they lie is nobody's business.
    """
    record = (read_record(run) if run else None) or {}
    start = origin(base)
    said = _metadata(start)
    about: dict[str, Any] = {"library_name": "peft" if contents.adapter else "transformers"}
    if not contents.scorer:
        about["pipeline_tag"] = "text-generation"
    if not Path(start).exists():
        about["base_model"] = start
    elif said.get("base_model"):
        about["base_model"] = said["base_model"]
    for key in ("license", "license_name", "license_link", "language"):
        if key in said:
            about[key] = said[key]
    about["tags"] = ["prefloop", *([record["command"]] if record else [])]
    if contents.gguf:
        del about["library_name"]
        about["tags"] += ["gguf", "llama.cpp"]
    kind = "reward model" if contents.scorer else "language model"
    what = f"A LoRA adapter of a {kind}" if contents.adapter else f"A {kind}"
    made = f", trained with `prefloop {record['command']}`" if record else ""
    title = contents.name.rpartition("/")[2]
    parts = [
        f"---\n{_yaml(about)}---\n\n# {title}\n\n{what}{made}, from `{_shown(start)}`.",
        _loading(contents),
    ]
    if run is not None:
        parts += _making(run, record)
    return "\n\n".join(parts) + "\n"


def _loading(contents: Contents) -> str:
    """Code that loads the folder, and how a scorer is read."""
    if contents.gguf:
        return f"## Loading\n\n```sh\nllama-server --model {shlex.quote(contents.gguf)}\n```"
    package, name = "transformers", CLASSES[contents.scorer]
    if contents.adapter:
        package, name = "peft", name.replace("AutoModel", "AutoPeftModel")
    labels = ", num_labels=1" if contents.adapter and contents.scorer else ""
    lines = [
        "## Loading\n\n```python",
        *([f"from {package} import {name}"] if contents.adapter else []),
        f"from transformers import {'' if contents.adapter else f'{name}, '}AutoTokenizer\n",
        f'model = {name}.from_pretrained("{contents.name}"{labels})',
        f'tokenizer = AutoTokenizer.from_pretrained("{contents.name}")\n```',
    ]
    if contents.scorer:
        where = "the last token of the whole rendered chat"
        if contents.score_position == "stop":
            where = "the token that ends the answer"
        lines.append(f"\nThe score is the logit at {where}, minus `reward_mean` of config.json.")
    return "\n".join(lines)


def _making(run: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """How the model was made: command, rows, results, versions."""
    settings = read_yaml(run / "config.yaml")
    command = shlex.join(["prefloop", record["command"], *_changed(record["command"], settings)])
    yield f"## Training\n\n```sh\n{command}\n```\n\nAll other settings are the defaults."
    rows = [
        f"| `{name}` | {counts['read']} | {counts['used']} | {_dropped(counts)} | {digest} |"
        for name, counts, digest in _data(settings, record["rows"])
    ]
    if rows:
        head = "| rows | read | used | dropped | sha256 at the export |\n|---|---|---|---|---|"
        yield "\n".join([head, *rows])
    cost = f"{record['steps']} steps, {record['tokens']} tokens"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if k.partition("/")[0] not in NO_RESULT}
    measured = [f"| `{key}` | {value:.4g} |" for key, value in last.items() if value is not None]
    yield "\n".join([f"After {cost}:\n\n| metric | value |\n|---|---|", *measured])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    revision = f" (revision {record['revision']})" if record.get("revision") else ""
    yield f"Versions: {versions}{revision}."


def _changed(command: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are not their defaults, as flags."""
    for field in fields(CONFIGS[command]):
        value = settings.get(field.name)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if field.name in UNTOLD or value == default or (value is None and default is MISSING):
            continue
        if isinstance(value, bool):
            yield flag(field.name if value else f"no_{field.name}")
            continue
        yield flag(field.name)
        yield from map(_shown, value if isinstance(value, list) else [value])


def _data(
    settings: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(source, counts, digest) of each part of the run's rows."""
    for of, counts in rows.items():
        sources = settings.get(of) or settings.get("data") or of
        names = [str(name) for name in (sources if isinstance(sources, list) else [sources])]
        files = [Path(re.sub(r"=[\d.]+$", "", name)) for name in names]  # without its weight
        digest = ", ".join(_sha256(file) for file in files if file.is_file())
        yield " ".join(map(_shown, names)), counts, digest


def _dropped(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} ({why})" for why, n in counts["dropped"].items()) or "0"


def _shown(value: object) -> str:
    """A setting's value; of a path or address that starts at a root, its last name."""
    text = str(value)
    return text.rstrip("/").rpartition("/")[2] if text.startswith("/") or "://" in text else text


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return f"`{hashlib.file_digest(opened, 'sha256').hexdigest()}`"


def _metadata(model: str) -> dict[str, Any]:
    """What the card of a folder or hub id says between its first two rules."""
    import yaml

    file = Path(model) / "README.md"
    text = "" if Path(model).exists() else readme(model)
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
    head = text.removeprefix("\ufeff").split("\n---", 1)[0].removeprefix("---")
    try:
        about = yaml.safe_load(head) if text.lstrip("\ufeff").startswith("---") else None
    except yaml.YAMLError:
        about = None
    return about if isinstance(about, dict) else {}


def _yaml(about: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True)
