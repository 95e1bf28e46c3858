"""The help of the command line: what the commands are for, and what each of them takes.

Text comes from where a thing is declared: a command's from its function, a setting's from under its
field. Imports no torch, and nothing that reads flags.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from prefloop.config.kinds import placeholder
from prefloop.config.resolve import automatic, flag
from prefloop.console.groups import OWN, Group, grouped, is_required

KINDS_OF_COMMANDS = (
    ("Train a model", "from demonstrations, rankings or a reward", "sft reward ppo dpo"),
    ("Let it answer", "prompts in files, or you", "sample generate chat"),
    ("Ask people", "who rank answers in a browser", "label"),
    (
        "Judge",
        "which answers and models are better, and how sure that is",
        "rank compare rejudge evaluate",
    ),
    ("Whole runs", "several of these in order", "demo init run overoptimise"),
    (
        "Around a run",
        "before it and after it",
        "check report export fetch-model fetch-data completion",
    ),
)
"""Title, purpose, and the first words of the commands."""
EXAMPLES = {
    "demo": "--quick",
    "sft": "--model HuggingFaceTB/SmolLM2-135M-Instruct --data demonstrations.jsonl "
    "--output runs/sft",
    "sample": "--model runs/sft --data prompts.jsonl --output samples.jsonl --to-labels labels.db",
    "rank": "--data samples.jsonl --judge runs/reward --output rankings.jsonl",
    "reward": "--model runs/sft --data rankings.jsonl --output runs/reward --eval-fraction 0.1",
    "ppo": "--model runs/sft --reward-model runs/reward --data prompts.jsonl --output runs/ppo",
    "dpo": "--model runs/sft --data preferences.jsonl --output runs/dpo --beta 0.1",
    "generate": "--model runs/dpo --prompt 'Why is the sky blue?' --chat",
    "chat": "--model runs/dpo --against runs/sft --to-labels labels.db",
    "compare": "--sft runs/sft --models dpo=runs/dpo --data held-out.jsonl --judge runs/reward "
    "--output runs/compare",
    "rejudge": "--comparison runs/compare --judge openai:my-model@http://127.0.0.1:8000/v1 "
    "--output runs/compare-llm",
    "evaluate winrate": "--answers dpo.jsonl --baseline sft.jsonl --judge my_rewards:score",
    "evaluate judge": "--data judged-by-people.jsonl --judge openai:my-model@http://127.0.0.1:8000/v1",
    "evaluate people": "people.db --data runs/compare",
    "evaluate reward-model": "--reward-model runs/reward --data held-out-rankings.jsonl",
    "label serve": "--store labels.db",
    "label backup": "--store labels.db --output backup.db",
    "label import": "--store labels.db --data samples.jsonl --guidelines guidelines.md",
    "label score": "--store labels.db --reward-model runs/reward-1 runs/reward-2",
    "label export": "--store labels.db --output rankings.jsonl",
    "label report": "--store labels.db --output quality.html",
    "label add-user": "--store labels.db --name Ada",
    "report": "runs/ppo --every 30",
    "export": "runs/dpo --output my-model --merge",
    "run": "pipeline.yaml --dry-run",
    "overoptimise": "--sizes 100 --output runs/overoptimisation",
    "init": "chat --output pipeline.yaml",
    "check": "--model runs/sft --data rankings.jsonl",
    "fetch-model": "smollm2-135m-instruct",
    "fetch-data": "summary --output data/summary",
    "completion": "bash",
}
COLUMN = 28
"""Where the text of a setting begins."""


class Command(Protocol):
    """What is asked of a command."""

    @property
    def config(self) -> type:
        """The class of its settings."""

    @property
    def function(self) -> Callable[[Any], Any]:
        """What carries it out; the first line of its docstring is its purpose."""


def overview(commands: Mapping[str, Command], prefix: str = "") -> str:
    """Every command with a line, under headings; with a prefix, those alone that begin so."""
    parts = []
    left = [name for name in commands if name.startswith(prefix)]
    for title, aim, words in (*KINDS_OF_COMMANDS, ("More", "", " ".join(left))):
        names = [name for name in left if name.split()[0] in words.split()]
        left = [name for name in left if name not in names]
        if names:
            lines = [f"  {name:<23}{purpose(commands[name])}" for name in names]
            parts.append("\n".join([_heading(title, aim), *lines]))
    return "\n\n".join(
        [
            "usage: prefloop COMMAND [--config FILE.yaml] [--flag value ...]",
            "From human preferences to a better language model: SFT, reward model, PPO, DPO.",
            *parts,
            "`prefloop COMMAND --help` says what it takes, with an example; flags override "
            "--config, that the\ndefaults.",
        ]
    )


def page(name: str, command: Command, whole: bool) -> str:
    """The help of one command: purpose, example, and its settings, the common ones or all."""
    config = command.config
    required = [field for field in fields(config) if is_required(field)]
    hints = get_type_hints(config)
    usage = [f"{flag(f.name)} {placeholder(hints[f.name])}" for f in required]
    parts = [" ".join([f"usage: prefloop {name}", *usage, "[--flag value ...]"])]
    parts.append(purpose(command))
    if name in EXAMPLES:
        parts.append(f"example: prefloop {name} {EXAMPLES[name]}")
    listed, texts = grouped(config, whole), texts_of(config)
    for group, found in listed:
        lines = [line for field in found for line in _setting(config, field, hints, texts)]
        parts.append("\n".join([_heading(*_titled(group, name)), *lines]))
    others = len(fields(config)) - sum(len(found) for _, found in listed)
    more = [f"{others} more settings: prefloop {name} --help-all"] if others else []
    if "config" not in hints:
        more.insert(0, "--config FILE reads settings from YAML, by these names with underscores.")
    return "\n\n".join([*parts, *("\n".join(more),)]).rstrip()


def texts_of(config: type) -> dict[str, str]:
    """By setting: what stands under its field, in the class or in the nearest that it is from."""
    found: dict[str, str] = {}
    trees: dict[str, ast.Module] = {}
    for kind in config.__mro__:
        if not hasattr(kind, "__dataclass_fields__"):
            continue
        path = inspect.getfile(kind)
        if path not in trees:
            trees[path] = ast.parse(Path(path).read_text(encoding="utf-8"))
        for node in trees[path].body:
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                for setting, text in _fields_in(node):
                    found.setdefault(setting, text)
    return found


def _fields_in(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for declared, under in zip(node.body, node.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign) and isinstance(under, ast.Expr):
            assert isinstance(declared.target, ast.Name) and isinstance(under.value, ast.Constant)
            yield declared.target.id, " ".join(str(under.value.value).split())


def _setting(
    config: type, field: Field[Any], hints: Mapping[str, Any], texts: Mapping[str, str]
) -> list[str]:
    """A setting's lines: its flag with what it takes, what it is for, its default."""
    wanted, name = hints[field.name], field.name
    can_be_auto = name in automatic(config)
    left = f"  {flag(name)} {placeholder(wanted, can_be_auto)}".rstrip()
    text, default = texts.get(name, ""), field.default
    if default is True:
        left += f", {flag('no_' + name)}"
    elif default is not MISSING and default is not False and default not in (None, (), ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" [{'auto' if can_be_auto and default == 0 else shown}]"
    lines = _wrapped(text, COLUMN).splitlines() or [""]
    if len(left) + 2 > COLUMN:
        return [left, *lines]
    return [left.ljust(COLUMN) + lines[0].lstrip(), *lines[1:]]


def _titled(group: Group, name: str) -> tuple[str, str]:
    """A group's heading and purpose; a command's own settings go by its name."""
    return (f"Of {name} itself", group.purpose) if group.title == OWN else group[:2]


def purpose(command: Command) -> str:
    """The first line of a command's docstring."""
    return (command.function.__doc__ or "").splitlines()[0]


def _heading(title: str, aim: str) -> str:
    """Bold on a terminal."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    return f"{bold}{title}{plain}" + (f": {aim}" if aim else "")


def _wrapped(text: str, indent: int) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return textwrap.fill(
        text,
        max(width, COLUMN + 30),
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
