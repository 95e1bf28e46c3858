"""What the docs say is so: names exist, links lead somewhere, commands and examples run."""

import ast
import importlib
import json
import re
import shlex
import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from prefloop.cli import main
from prefloop.commands import COMMANDS
from prefloop.config.checks import validate
from prefloop.config.resolve import flag, resolve
from prefloop.data.formats import load
from prefloop.errors import UserError
from prefloop.intervals import Interval
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store import Store
from prefloop.records import RowCounts
from prefloop.rewards.health import RULES, Vitals
from prefloop.rewards.health import signs as found_signs
from tests.labelling.small import compare_folder
from tests.rollouts.stand_in import serving
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import REWARDS, train, write_rows, write_world

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "prefloop"
DOCS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LANGUAGES = [DOCS[0].with_name(name) for name in ("guide.md", "guide.ko.md")]
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]


def text_of(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands_in(text):
    """The words after `prefloop` of every command in sh blocks."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("prefloop ")]


def split_command(words):
    """The command's name and its flags."""
    name = " ".join(words[:2]) if words[0] in ("evaluate", "label") else words[0]
    return name, words[len(name.split()) :]


def marked(name, start):
    """First cells of the table between `<!-- start -->` and `<!-- /start -->`."""
    part = text_of(name).split(f"<!-- {start} -->")[1].split(f"<!-- /{start} -->")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    return [row.split("`")[1] for row in rows]


# --- names and links -----------------------------------------------------------------------------


@cache
def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_code_and_tests_exist(path):
    """`folder/test_x.py::test_y` of the tests; `file.py` and `module.name` of the package."""
    for name in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
        module, _, member = name.removeprefix("prefloop.").rpartition(".")
        if found := re.fullmatch(r"(?:tests/)?([\w/]+\.py)::(test_\w+)", name):
            assert found[2] in names_in(ROOT / "tests" / found[1]), name
        elif re.fullmatch(r"[\w/]+\.py", name):
            roots = (ROOT, PACKAGE, PACKAGE / "training", ROOT / "tests" / "parity")
            assert any((root / name).exists() for root in roots), name
        elif module in MODULES and member not in ("json", "yaml"):
            assert hasattr(importlib.import_module(f"prefloop.{module}"), member), name


def test_maths_names_functions_of_known_modules_only():
    """Nothing in the maths escapes the check above by a misspelt module."""
    for name in re.findall(r"`([a-z_]+\.[a-z_.]+\.\w+)`", text_of("maths.md")):
        assert name.rpartition(".")[0] in MODULES, name


def test_every_loss_is_in_the_maths():
    losses = importlib.import_module("prefloop.losses")
    for name in losses.__all__:
        function = getattr(losses, name)
        if callable(function) and not isinstance(function, type) and name != "masked_sum":
            module = function.__module__.removeprefix("prefloop.")
            assert f"`{module}.{name}`" in text_of("maths.md") or name == "total", name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        aimed = (path.parent / file).resolve() if file else path
        assert aimed.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", aimed.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target


# --- flags and commands --------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_shown_commands_are_accepted(path):
    for words in commands_in(path.read_text(encoding="utf-8")):
        name, flags = split_command(words)
        command = COMMANDS[name]
        if command.positional and flags and not flags[0].startswith("-"):
            flags = [flag(command.positional), *flags]
        validate(resolve(command.config, None, flags))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_flags_exist(path):
    """A flag in `code`, on the command named with it or on any."""
    known = {
        name: {flag(f.name) for f in fields(command.config)}
        | {flag(f"no_{n}") for n, kind in get_type_hints(command.config).items() if kind is bool}
        | {"--config", "--help", "--help-all"}
        for name, command in COMMANDS.items()
    }
    every = set().union(*known.values())
    for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
        words = code.removeprefix("prefloop ").split()
        if words[:2] == ["python", "-m"] and words[2] != "prefloop":
            continue
        accepted = known.get(words[0], every) if words else every
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert word in accepted, code


# --- data ----------------------------------------------------------------------------------------


def data_rows():
    """(kind, line) of every example in docs/data.md."""
    parts = re.split(r"^### `(\w+)`", text_of("data.md"), flags=re.MULTILINE)[1:]
    found = []
    for kind, part in zip(parts[::2], parts[1::2], strict=True):
        found += [
            (kind, line) for block in blocks(part, "jsonl") for line in block.splitlines() if line
        ]
    return found


def test_every_kind_of_row_has_examples():
    assert {kind for kind, _ in data_rows()} == {
        "demonstration",
        "preference",
        "unpaired",
        "prompt",
    }


@pytest.mark.parametrize(("kind", "line"), data_rows())
def test_example_rows_are_read(kind, line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    counts = RowCounts()
    assert load(str(tmp_path / "rows.jsonl"), kind, counts)
    assert not counts.dropped


def error_rows():
    pattern = r"^\| `(\w+)` \| `(\{.*)` \| (.*) \|$"
    return re.findall(pattern, text_of("data.md"), flags=re.MULTILINE)


@pytest.mark.parametrize(("kind", "line", "told"), error_rows())
def test_faulty_rows_are_told_as_shown(kind, line, told, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*" + re.escape(told)):
        load(str(tmp_path / "rows.jsonl"), kind, RowCounts())


# --- runs ----------------------------------------------------------------------------------------


def logged(output):
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {name.removeprefix("eval/") for line in lines for name in json.loads(line)}


def test_the_glossary_lists_what_is_logged(tmp_path):
    """Every metric of every method, and none besides."""
    write_world(tmp_path)
    labels = [{"prompt": f"the {n}", "completion": " boat", "label": n % 2 == 0} for n in range(4)]
    unpaired = str(write_rows(tmp_path / "unpaired.jsonl", labels))
    demonstrations = str(tmp_path / "sft.jsonl")
    asked = str(tmp_path / "prompts.jsonl")
    monitored = {"monitor": f"{REWARDS}:by_length", "monitor_data": asked}
    runs = [
        ("sft", {}),
        ("reward", {"center_coefficient": 0.01}),
        ("dpo", {"sft_coefficient": 0.1}),
        ("dpo", {"loss": "kto", "data": unpaired}),
        (
            "ppo",
            {"sft_data": demonstrations, "ptx_coef": 0.1, "eval_fraction": 0.2}
            | {"ema_reference": 0.5}
            | monitored,
        ),
    ]
    found = set()
    with serving(tmp_path / "model") as (server,):
        runs[-1][1].update(rollout_engine=server.url, importance_cap=2.0)
        for number, (command, changes) in enumerate(runs):
            output = tmp_path / f"run-{number}"
            train(command, tmp_path, output, max_steps=1, **changes)
            found |= logged(output)
    names = marked("glossary.md", "metrics")
    assert len(names) == len(set(names))
    assert set(names) == found


def test_the_glossary_lists_what_is_compared():
    assert marked("glossary.md", "vitals") == [field.name for field in fields(Vitals)]


def test_every_rule_is_explained():
    """As it stands in the one table, and with the reason of its threshold."""
    text = text_of("health.md")
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.fires} | {rule.why} | {rule.advice} |" in text
        assert len(re.findall(rf"^\| `{rule.name}` \|", text, flags=re.MULTILINE)) == 2


def test_the_guide_names_every_sign():
    numbers = Interval(2.0, 1.0, 3.0)
    sft = Vitals(numbers, Interval(0.0, 0.0, 0.0), numbers, 9.0, 0.0, 0.9, 0.0, 0.0)
    worst = Vitals(
        Interval(0.0, 0.0, 0.0), numbers, Interval(99.0, 99.0, 99.0), 99.0, 1.0, 0.0, 1.0, 1.0
    )
    signs = [sign.name for sign in found_signs(worst, sft)]
    assert len(signs) == 7
    for name in signs:
        for path in LANGUAGES:
            assert f"| `{name}` |" in path.read_text(encoding="utf-8"), (path, name)


def write_guide_world(folder):
    """What the guide takes as given: a model, demonstrations, prompts."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer(chat=False).save_pretrained(folder / "base")
    asked = [{"prompt": f"the boat {n}"} for n in range(12)]
    write_rows(folder / "demonstrations.jsonl", [row | {"completion": " a bath"} for row in asked])
    write_rows(folder / "prompts.jsonl", asked)
    write_rows(folder / "held-out.jsonl", [{"prompt": f"oath {n}"} for n in range(4)])
    ranked = [row | {"chosen": " a bath", "rejected": " the thin ant"} for row in asked]
    write_rows(folder / "held-out-rankings.jsonl", ranked)


@pytest.mark.slow
def test_the_labelling_guide_runs(tmp_path, monkeypatch, capsys):
    """Commands in their order; where the page is served, two labellers do all tasks."""
    write_guide_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guidelines.md").write_text("Be kind.")
    more = [{"prompt": f"oath {n}", "completions": [" a", " b"]} for n in range(3)]
    write_rows(tmp_path / "more-samples.jsonl", more)
    (tmp_path / "runs").mkdir()
    shutil.copytree(tmp_path / "base", tmp_path / "runs" / "sft")
    answers = {"SFT": [["a boat"]] * 8, "DPO": [["an oath"]] * 8}
    compare_folder(tmp_path / "runs" / "compare", answers)
    for words in commands_in(text_of("labelling.md")):
        if words[:2] != ["label", "serve"]:
            assert main(words) == 0, words
            continue
        store = Store(words[words.index("--store") + 1])
        for who in (1, 2):
            while task := next_assignment(store, who):
                tiers = [[place] for place in task.shown]
                submit(store, who, task.id, Judgement(tiers, request_id=str(task.id)))
        store.close()
    told = capsys.readouterr().out
    assert "Krippendorff" in told
    assert "People do not tell DPO from SFT" in told  # by who goes by the place shown
    assert (tmp_path / "runs/compare/people.json").exists()
    assert (tmp_path / "quality.html").exists()
    assert (tmp_path / "runs/dpo/model").is_dir()


@pytest.mark.slow
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    """Commands and Python in their order; as Python's settings are the commands', its trainers find
    their runs finished."""
    write_guide_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = text_of("guide.md")
    for language, block in re.findall(
        r"^```(sh|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    ):
        if language == "sh":
            for words in commands_in(f"```sh\n{block}```\n"):
                assert words[0] == "fetch-model" or main(words) == 0, words
        elif name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
        else:
            exec(compile(block, "guide.md", "exec"), {})
    told = capsys.readouterr().out
    assert told.count("finished already, nothing to do") == 4
    assert (tmp_path / "runs/compare/report.html").exists()
