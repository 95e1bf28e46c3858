"""What prefloop does, one function a command. The heavy imports are inside: this file is light.

Each takes its settings, checks them and hands them to the part of the package that does the work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop import config as c
from prefloop.config import labelling as l
from prefloop.config.checks import validate
from prefloop.terminal import as_is, shown

if TYPE_CHECKING:
    from rich.console import Console

    from prefloop.evaluation.comparison import Comparison
    from prefloop.evaluation.people import PeopleVerdict
    from prefloop.labelling.quality import Quality
    from prefloop.runs import Run


def sft(config: c.SFTConfig) -> Run:
    """Fine-tune a model on demonstrations."""
    validate(config)
    from prefloop.training.sft import run

    return run(config)


def rank(config: c.RankConfig) -> dict[str, Any]:
    """Rank sampled answers by a reward model, a function or an LLM."""
    validate(config)
    from prefloop.evaluation.rank import run

    return run(config)


def reward(config: c.RewardConfig) -> Run:
    """Train a reward model on rankings or pairs."""
    validate(config)
    from prefloop.training.reward import run

    return run(config)


def dpo(config: c.DPOConfig) -> Run:
    """Train a policy directly on preferences (DPO, IPO, KTO, SimPO, ORPO ...)."""
    validate(config)
    from prefloop.training.preference import run

    return run(config)


def ppo(config: c.PPOConfig) -> Run:
    """Train a policy against a reward model, a function or an LLM judge."""
    validate(config)
    from prefloop.training.ppo import run

    return run(config)


def sample(config: c.SampleConfig) -> Path:
    """Sample several answers to each prompt, ready to be ranked."""
    validate(config)
    from prefloop.generation.commands import sample as run
    from prefloop.labelling.imports import add_samples, check_store

    if config.to_labels is not None:
        check_store(config.to_labels)
    path = run(config)
    if config.to_labels is not None:
        show(add_samples(config.to_labels, path))
    return path


def generate(config: c.GenerateConfig) -> Path | None:
    """Answer prompts."""
    validate(config)
    from prefloop.generation.commands import generate as run

    return run(config)


def chat(config: c.ChatConfig) -> None:
    """Talk with a model on the terminal."""
    validate(config)
    from prefloop.console.chat import chat as run

    run(config)


def compare(config: c.CompareConfig) -> Comparison:
    """Compare models with the SFT model: one HTML page and a table."""
    validate(config)
    from prefloop.evaluation.compare import compare as run

    return run(config)


def rejudge(config: c.RejudgeConfig) -> Comparison:
    """Judge the answers of a comparison by another judge."""
    validate(config)
    from prefloop.evaluation.rejudge import rejudge as run

    return run(config)


def report(config: c.ReportConfig) -> Path:
    """Write one HTML page of runs, also while they go, or a comparison's anew."""
    validate(config)
    from prefloop.evaluation.run_report import run

    return run(config)


def winrate(config: c.WinrateConfig) -> dict[str, Any]:
    """Win rate of one file of answers against another."""
    validate(config)
    from prefloop.evaluation.winrate import run

    return run(config)


def judge_quality(config: c.JudgeQualityConfig) -> dict[str, Any]:
    """How far a judge agrees with people, beside how far people agree with each other."""
    validate(config)
    from prefloop.evaluation.judge_quality import run

    return run(config)


def people(config: c.PeopleConfig) -> PeopleVerdict:
    """Did people prefer it? What they said of a comparison's answers, beside its judge."""
    validate(config)
    from prefloop.evaluation.labelled import run

    return run(config)


def reward_quality(config: c.RewardQualityConfig) -> dict[str, Any]:
    """How far a reward model can be trusted: accuracy, calibration, length bias, ceiling."""
    validate(config)
    from prefloop.evaluation.calibration import run

    return run(config)


def label_serve(config: l.LabelServeConfig) -> None:
    """Serve the page on which people rank answers."""
    validate(config)
    from prefloop.labelling.web.server import run

    run(config)


def label_import(config: l.LabelImportConfig) -> dict[str, Any]:
    """Put prompts with answers into a project, to be ranked or already ranked."""
    validate(config)
    from prefloop.labelling.imports import run

    return run(config)


def label_score(config: l.LabelScoreConfig) -> dict[str, Any]:
    """Score a project's answers with reward models, and hand its tasks out by their scores."""
    validate(config)
    from prefloop.evaluation.label_scores import run

    return run(config)


def label_export(config: l.LabelExportConfig) -> dict[str, Any]:
    """Write what labellers decided as training rows."""
    validate(config)
    from prefloop.labelling.export import run

    return run(config)


def label_report(config: l.LabelReportConfig) -> Quality:
    """How good the labels are: agreement, and each labeller's record."""
    validate(config)
    from prefloop.labelling.report import run

    return run(config)


def label_add_user(config: l.LabelAddUserConfig) -> str:
    """Add a labeller and print the personal link."""
    validate(config)
    from prefloop.labelling.users import run

    return run(config)


def label_backup(config: l.LabelBackupConfig) -> dict[str, Any]:
    """Copy a labelling store as it stands at one moment, while it is served."""
    validate(config)
    from prefloop.labelling.backup import run

    return run(config)


def demo(config: c.DemoConfig) -> Comparison:
    """The whole loop on a real model, with a report at the end."""
    validate(config)
    from prefloop.recipes.sentiment import demo as run

    return run(config)


def overoptimise(config: c.OveroptimiseConfig) -> dict[str, Any]:
    """Optimise a reward model too far, and see what a judge says of it: a study in an hour."""
    validate(config)
    from prefloop.recipes.overoptimisation import overoptimise as run

    return run(config)


def run(config: c.RunConfig) -> None:
    """Run a pipeline of commands; skip what has not changed."""
    validate(config)
    from prefloop.recipes.pipeline import run as run_pipeline

    run_pipeline(config, COMMANDS)


def init(config: c.InitConfig) -> Path:
    """Write a commented pipeline for a use, with paths to fill in."""
    validate(config)
    from prefloop.recipes.init import init as run

    return run(config)


def check(config: c.CheckConfig) -> None:
    """Audit rows and a chat template without training."""
    validate(config)
    if config.config is not None:
        from prefloop.recipes.plan_table import check_plan

        check_plan(config, COMMANDS)
        return
    from prefloop.training.check import check as run

    run(config)


def export(config: c.ExportConfig) -> Path | str:
    """Write a run's model as a plain folder with a card: merged, cast, or pushed to the hub."""
    validate(config)
    from prefloop.models.publish import export as run

    return run(config)


def fetch_model(config: c.FetchModelConfig) -> Path:
    """Fetch a small model and unpack it as a Hugging Face folder."""
    validate(config)
    from prefloop.recipes.fetch import fetch_model as fetch

    return fetch(config.name, config.output)


def fetch_data(config: c.FetchDataConfig) -> dict[str, Any]:
    """Fetch public data of a use, and write it as the rows that its recipe trains on."""
    validate(config)
    from prefloop.recipes.data import fetch_data as fetch

    return fetch(config)


def completion(config: c.CompletionConfig) -> str:
    """Print what makes bash, zsh or fish complete commands and flags."""
    validate(config)
    from prefloop.console.completion import SCRIPTS

    return SCRIPTS[config.shell]


def show(result: Any) -> None:
    """Print what a command gave back: its run's directory, a path, or numbers."""
    if isinstance(result, dict):
        print(shown(json.dumps(result, indent=2)))
    elif result is not None:
        print(shown(str(getattr(result, "directory", result))))


def show_run(result: Any) -> None:
    """Sum a run up on standard error; its directory is what is printed."""
    from prefloop.console.summary import lines_of
    from prefloop.distributed import rank

    if rank() == 0:
        print("\n".join(lines_of(result)), file=sys.stderr)
        show(result)


def _console() -> Console:
    """For tables: a file has room for every column."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200
    return console


def show_comparison(result: Any) -> None:
    """Print what a comparison says, and its table."""
    from prefloop.evaluation.table import terminal_table

    console = _console()
    for sentence in result.sentences:
        console.print(as_is(sentence))
    console.print(terminal_table(result))
    print(shown(str(Path(result.settings["output"]) / "report.html")))


def show_people(result: Any) -> None:
    """Print what people preferred: the verdict first."""
    from prefloop.evaluation.people_table import terminal

    _console().print(terminal(result))


def show_study(result: Any) -> None:
    """Print the table of a study of overoptimisation."""
    from prefloop.recipes.overoptimisation_report import table

    print(table(result["groups"]), end="")


def show_quality(result: Any) -> None:
    """Print how good labels are."""
    from prefloop.labelling.report import terminal

    console = _console()
    console.print(terminal(result))


@dataclass(frozen=True)
class Command:
    """A command: its settings, the function that carries it out (its docstring is the command's
    help), what prints the result, and the setting that may be given without its flag.
    """

    config: type
    function: Callable[[Any], Any]
    show: Callable[[Any], None] = show
    positional: str = ""


COMMANDS = {
    "demo": Command(c.DemoConfig, demo, show_comparison),
    "sft": Command(c.SFTConfig, sft, show_run),
    "sample": Command(c.SampleConfig, sample),
    "rank": Command(c.RankConfig, rank),
    "reward": Command(c.RewardConfig, reward, show_run),
    "ppo": Command(c.PPOConfig, ppo, show_run),
    "dpo": Command(c.DPOConfig, dpo, show_run),
    "generate": Command(c.GenerateConfig, generate),
    "chat": Command(c.ChatConfig, chat),
    "compare": Command(c.CompareConfig, compare, show_comparison),
    "rejudge": Command(c.RejudgeConfig, rejudge, show_comparison),
    "evaluate winrate": Command(c.WinrateConfig, winrate),
    "evaluate judge": Command(c.JudgeQualityConfig, judge_quality),
    "evaluate people": Command(c.PeopleConfig, people, show_people, positional="labels"),
    "evaluate reward-model": Command(c.RewardQualityConfig, reward_quality),
    "label serve": Command(l.LabelServeConfig, label_serve),
    "label import": Command(l.LabelImportConfig, label_import),
    "label score": Command(l.LabelScoreConfig, label_score),
    "label export": Command(l.LabelExportConfig, label_export),
    "label report": Command(l.LabelReportConfig, label_report, show_quality),
    "label add-user": Command(l.LabelAddUserConfig, label_add_user),
    "label backup": Command(l.LabelBackupConfig, label_backup),
    "report": Command(c.ReportConfig, report, positional="runs"),
    "export": Command(c.ExportConfig, export, positional="run"),
    "overoptimise": Command(c.OveroptimiseConfig, overoptimise, show_study),
    "run": Command(c.RunConfig, run, positional="pipeline"),
    "init": Command(c.InitConfig, init, positional="use"),
    "check": Command(c.CheckConfig, check),
    "fetch-model": Command(c.FetchModelConfig, fetch_model, positional="name"),
    "fetch-data": Command(c.FetchDataConfig, fetch_data, positional="use"),
    "completion": Command(c.CompletionConfig, completion, print, positional="shell"),
}
