"""What the benchmark of critics makes of a run, and that it can run what it names."""

import json

import pytest
from benchmarks import critic
from benchmarks.critic_tasks import Task

from prefloop.config.checks import problems
from prefloop.recipes.sentiment import FULL, KL_COEF, Plan


@pytest.mark.parametrize("setting", critic.GRID)
@pytest.mark.parametrize("name", ["sentiment", "small-headlines"])
def test_each_setting_is_one_that_ppo_takes(setting, name, tmp_path):
    """Of as many answers an iteration as it says, in the demo's 24 iterations or the small 32."""
    chosen = critic.ppo(Task(name, tmp_path), setting, 3, tmp_path / "run")
    assert list(problems(chosen)) == []
    wanted = 64 if "64" in setting or setting == "chosen" else 32
    assert chosen.batch_size * chosen.num_minibatches * chosen.samples_per_prompt == wanted
    iterations = 32 if name == "small-headlines" else 24
    assert chosen.max_steps == iterations * chosen.ppo_epochs * chosen.num_minibatches
    assert chosen.lora_rank == (0 if name == "small-headlines" else 16)
    assert chosen.seed == 3


def test_the_last_third_of_a_run_by_hand(tmp_path):
    """Two iterations of six; steps within an iteration say nothing of it."""
    rows = []
    for number, explained in enumerate((-1.0, 0.0, 0.1, 0.2, 0.3, 0.5)):
        told = {"objective/scores": float(number), "objective/kl": 2.0, "length_mean": 9.0}
        rows += [{"step": 2 * number + 1, "val/explained_variance": explained} | told]
        rows += [{"step": 2 * number + 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = critic.numbers(tmp_path)
    assert found["curves"]["explained_variance"] == [-1.0, 0.0, 0.1, 0.2, 0.3, 0.5]
    last = {"explained_variance": 0.4, "score": 4.5, "kl": 2.0, "length": 9.0}
    assert found["last_third"] == pytest.approx(last)


@pytest.mark.parametrize(
    ("low", "gain", "word"), [(0.3, 0.5, "apart"), (0.1, 0.5, "above"), (-0.9, -0.5, "BELOW")]
)
def test_a_line_says_where_the_run_stands(low, gain, word):
    """SFT's interval ends at 0.2."""
    result = {
        "task": "sentiment",
        "setting": "base",
        "seed": 0,
        "last_third": {"explained_variance": None, "score": 1.0, "kl": 2.0, "length": 9.0},
        "sft": {"mean": 0.0, "low": -0.2, "high": 0.2},
        "judge": {"mean": 0.5, "low": low, "high": 0.9},
        "gain": {"mean": gain, "low": gain - 0.1, "high": gain + 0.1},
        "cpu_seconds": 20,
    }
    assert f" | {word} | 20 |" in critic.line(result)
    assert "| – |" in critic.line(result)


def test_what_was_chosen_is_what_the_demo_has(tmp_path):
    """PPO's defaults and the demo's lambda, on SmolLM2 at the demo's rate and size."""
    chosen = vars(critic.ppo(Task("sentiment", tmp_path), "chosen", 0, tmp_path / "run"))
    demo = vars(Plan(tmp_path, 0, FULL).ppo("ppo", KL_COEF))
    differ = {name for name in demo if chosen[name] != demo[name]}
    assert differ <= {"model", "data", "output", "reward_model", "value_lr", "save_minutes"}
    assert chosen["value_lr"] == demo["lr"]  # which 0 means
