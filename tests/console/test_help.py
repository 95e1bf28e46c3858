"""What the help says, in words, and what it leaves for --help-all."""

import shlex
from dataclasses import MISSING, fields

import pytest

from prefloop.cli import main
from prefloop.commands import COMMANDS
from prefloop.config import DPOConfig, PPOConfig, SFTConfig
from prefloop.config.checks import validate
from prefloop.config.resolve import flag, resolve
from prefloop.console.groups import COMMON, GROUPS
from prefloop.console.help import EXAMPLES, KINDS_OF_COMMANDS, texts_of


def said(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


def flags_in(text):
    return {line.split()[0] for line in text.splitlines() if line.startswith("  --")}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_names_every_setting_once_and_in_words(name, capsys):
    text = said(capsys, *name.split(), "--help-all")
    found = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    assert sorted(found) == sorted(flag(field.name) for field in fields(COMMANDS[name].config))
    for word in ("{None}", "STR", "{[", "FLOAT", "MISSING"):
        assert word not in text
    assert "more settings" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example_that_is_accepted(name, capsys):
    words = shlex.split(EXAMPLES[name])
    assert f"\n\nexample: prefloop {name} {EXAMPLES[name]}\n\n" in said(
        capsys, *name.split(), "--help"
    )
    if words and not words[0].startswith("-"):
        words.insert(0, flag(COMMANDS[name].positional))
    validate(resolve(COMMANDS[name].config, None, words))


def test_common_settings_come_first_and_the_rest_is_counted(capsys):
    short, whole = said(capsys, "ppo", "--help"), said(capsys, "ppo", "--help-all")
    assert flags_in(short) < flags_in(whole)
    left = len(fields(PPOConfig)) - len(flags_in(short))
    assert left > 20
    assert f"\n{left} more settings: prefloop ppo --help-all\n" in short
    for field in fields(PPOConfig):  # what must be given is never left out
        assert field.default is not MISSING or flag(field.name) in flags_in(short)
    assert short.index("--model") < short.index("--lr")


def test_a_command_of_few_settings_shows_them_all(capsys):
    short = said(capsys, "label", "add-user", "--help")
    assert short == said(capsys, "label", "add-user", "--help-all")
    assert "  --role labeller|admin     Admins also see" in short
    assert "usage: prefloop label add-user --store TEXT --name TEXT [--flag value ...]" in short


def test_a_setting_says_what_it_takes_and_its_default(capsys):
    text = " ".join(said(capsys, "dpo", "--help-all").split())
    assert "--lr NUMBER Peak learning rate (1e-5 is usual with LoRA). [1e-06]" in text
    assert "--eval-data TEXT ... Held-out rows" in text
    assert "--micro-batch-tokens INTEGER|auto Most tokens" in text
    assert "--optimizer adamw|adamw8bit adamw8bit keeps" in text
    assert "--epochs NUMBER Passes over the rows. [1.0]" in text
    assert "--max-steps INTEGER Stop after" in text and "`epochs` decides. [0]" in text
    assert "--chat Take string rows" in text
    assert "--ipo-average, --no-ipo-average IPO:" in text


def test_the_text_is_that_of_the_nearest_class():
    """DPO says more of --lr than training at large."""
    assert texts_of(SFTConfig)["lr"] == "Peak learning rate."
    assert texts_of(DPOConfig)["lr"] == "Peak learning rate (1e-5 is usual with LoRA)."


def test_the_groups_name_settings_that_exist_once():
    every = {field.name for command in COMMANDS.values() for field in fields(command.config)}
    listed = [name for group in GROUPS for name in group.names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= every
    assert every >= COMMON


def test_every_command_stands_under_a_heading(capsys):
    first = {name.split()[0] for name in COMMANDS}
    assert first <= {word for _, _, words in KINDS_OF_COMMANDS for word in words.split()}
    text = said(capsys, "--help")
    assert "\nTrain a model: from demonstrations, rankings or a reward\n  sft  " in text
    assert "\nMore" not in text
    assert said(capsys, "label", "--help").count("\n  label ") == text.count("\n  label ")
