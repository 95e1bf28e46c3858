"""Trackers get the metrics that metrics.jsonl gets."""

from importlib.util import find_spec

import pytest

from prefloop.config import SFTConfig
from prefloop.errors import UserError
from prefloop.runs import Run


def test_tensorboard_reads_the_metrics_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = SFTConfig(model="m", data="d", output=tmp_path / "run", track="tensorboard")
    with Run.open(config, "sft") as run:
        run.log_metrics(1, {"loss": 0.5, "objective/kl": 0.25})
        run.log_metrics(2, {"loss": 0.125, "objective/kl": float("nan")})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(1, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed(tmp_path, name):
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    config = SFTConfig(model="m", data="d", output=tmp_path / "run", track=name)
    with pytest.raises(UserError, match=f"pip install {name}"):
        Run.open(config, "sft")
    assert not (tmp_path / "run").exists()
