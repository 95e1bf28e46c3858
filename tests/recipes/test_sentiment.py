import json
from pathlib import Path

import pytest

from prefloop.config import DemoConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.recipes.sentiment import FULL, QUICK, Plan, demo


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
