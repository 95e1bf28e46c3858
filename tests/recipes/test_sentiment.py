import json
import logging
from pathlib import Path
from typing import Any

import pytest

from prefloop.config import DemoConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.progress import in_words
from prefloop.recipes import fetch
from prefloop.recipes.sentiment import FULL, MODEL, QUICK, SECONDS, Plan, demo


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_every_stage_has_valid_settings(tmp_path: Path, scale: object) -> None:
    plan = Plan(tmp_path, 0, scale)  # type: ignore[arg-type]
    for config in (
        plan.sft("model"),
        plan.sampling(),
        plan.reward(),
        plan.ppo("ppo", 0.05),
        plan.ppo("ppo-no-kl", 0.0),
        plan.dpo(),
        plan.comparison(),
    ):
        validate(config)


def test_the_two_ppo_runs_differ_in_the_penalty_only(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 0, FULL)
    a, b = vars(plan.ppo("a", 0.05)), vars(plan.ppo("b", 0.0))
    assert {key for key in a if a[key] != b[key]} == {"output", "kl_coef"}


def test_a_directory_of_another_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 7}))
    with pytest.raises(UserError, match="another --output"):
        demo(DemoConfig(output=tmp_path, quick=True))


class Stages:
    """Carries out no command, but notes it; supervised fine-tuning leaves its record."""

    def __init__(self, stop_at: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self.stop_at = stop_at

    def __call__(self, command: str, config: Any, settings: Path) -> None:
        self.calls.append((command, settings.name))
        if command == self.stop_at:
            raise KeyboardInterrupt
        if command == "sft":
            seconds = 2 * SECONDS["supervised fine-tuning"]
            record = {"command": "sft", "status": "finished", "wall_seconds": seconds}
            config.output.mkdir()
            (config.output / "run.json").write_text(json.dumps(record))


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo's output whose model, rows and rankings are there, without any network."""
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    fetch.model_folder(MODEL).mkdir(parents=True)
    output = tmp_path / "demo"
    (output / "data").mkdir(parents=True)
    for name in ("data/evaluation.jsonl", "rankings.jsonl"):
        (output / name).touch()
    return output


def test_stages_run_in_order_and_an_interrupt_goes_through(prepared: Path) -> None:
    stages = Stages(stop_at="dpo")
    with pytest.raises(KeyboardInterrupt):
        demo(DemoConfig(output=prepared), stages)
    assert stages.calls == [
        ("sft", "sft.yaml"),
        ("sample", "sample.yaml"),
        ("reward", "reward.yaml"),
        ("ppo", "ppo.yaml"),
        ("ppo", "ppo-no-kl.yaml"),
        ("dpo", "dpo.yaml"),
    ]


def test_a_model_that_is_not_there_is_fetched_first(prepared: Path) -> None:
    fetch.model_folder(MODEL).rmdir()
    stages = Stages(stop_at="fetch-model")
    with pytest.raises(KeyboardInterrupt):
        demo(DemoConfig(output=prepared), stages)
    assert stages.calls == [("fetch-model", "model.yaml")]


def test_what_comes_is_told_with_the_time_it_takes_here(
    prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Supervised fine-tuning took twice as long as where it was measured: so will the others."""
    caplog.set_level(logging.INFO, "prefloop")
    with pytest.raises(KeyboardInterrupt):
        demo(DemoConfig(output=prepared), Stages(stop_at="reward"))
    whole, *stages = caplog.messages
    assert whole.startswith(f"the demo takes about {in_words(sum(SECONDS.values()))} on ")
    tuning = in_words(SECONDS["supervised fine-tuning"])
    assert stages[1].startswith(f"2/9 supervised fine-tuning: about {tuning} there")
    assert stages[2] == f"3/9 answers to rank: about {in_words(2 * SECONDS['answers to rank'])}"
    assert [line.split(":")[0] for line in stages] == [
        f"{number}/9 {name}" for number, name in enumerate(list(SECONDS)[:5], 1)
    ]
