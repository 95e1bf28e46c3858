import json
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch

from prefloop.commands import reward_quality
from prefloop.config import RewardQualityConfig
from prefloop.errors import UserError
from prefloop.evaluation.calibration import beside_judge, calibrate
from prefloop.labelling.agreement import ceiling
from prefloop.models.export import export_model
from prefloop.models.load import load_scorer
from prefloop.rewards.judges import load_judge
from tests.tiny import tiny_model, tiny_tokenizer


def test_by_hand() -> None:
    result = calibrate([2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 2.0, -4.0], [5, 5, 9, 1], [3, 3, 4, 4], 2)
    deltas = [2.0, 0.0, -1.0, 3.0]
    assert result.pairs == 4
    assert result.accuracy == (1 + 0.5 + 0 + 1) / 4
    assert result.log_loss == pytest.approx(sum(log(1 + exp(-d)) for d in deltas) / 4)
    low, high = result.bins  # |delta| 0, 1 | 2, 3
    assert (low.low, low.high, low.pairs, low.accuracy) == (0.0, 1.0, 2, 0.25)
    assert (high.low, high.high, high.accuracy) == (2.0, 3.0, 1.0)
    assert low.expected == pytest.approx((0.5 + 1 / (1 + exp(-1))) / 2)
    shorter, longer = result.length_bins  # lengths -3, 2 | 2, 5
    assert (shorter.low, shorter.accuracy, longer.accuracy) == (-3.0, 1.0, 0.25)
    assert result.always_longer_accuracy == 0.75


def test_beside_the_judge_by_hand() -> None:
    """Prompt 1, answers judged 3, 1, 1 and scored 0.5, 0.2, 0.9: right, wrong; the tie is no pair.

    Prompt 2, judged 1, 2 and scored alike: half. Prompt 3 has one answer.
    """
    found = beside_judge(
        [[3.0, 1.0, 1.0], [1.0, 2.0], [5.0]],
        [[0.5, 0.2, 0.9], [0.4, 0.4], [0.0]],
        [[7, 5, 9], [3, 8], [1]],
        held_out_accuracy=0.7,
        agreement=0.82,
    )
    assert found is not None
    assert (found.pairs.pairs, found.accuracy.mean, found.pairs.accuracy) == (3, 0.5, 0.5)
    assert found.pairs.log_loss == pytest.approx(
        (log(1 + exp(-0.3)) + log(1 + exp(0.4)) + log(2)) / 3
    )
    assert found.pairs.always_longer_accuracy == pytest.approx(2 / 3)
    assert found.held_out_accuracy == 0.7
    assert found.ceiling == pytest.approx((0.82, 0.9), abs=1e-9)
    assert beside_judge([[1.0, 1.0]], [[0.0, 1.0]], [[1, 1]]) is None


def test_a_calibrated_model_is_found_calibrated() -> None:
    rng = np.random.default_rng(0)
    delta = np.abs(rng.normal(0, 2, 40_000))
    sign = np.where(rng.random(40_000) < 1 / (1 + np.exp(-delta)), 1.0, -1.0)
    lengths = [1] * 40_000
    result = calibrate((sign * delta).tolist(), [0.0] * 40_000, lengths, lengths)
    assert all(abs(part.accuracy - part.expected) < 0.015 for part in result.bins)
    assert result.always_longer_accuracy == 0.5


def test_huge_differences_do_not_overflow() -> None:
    assert calibrate([-1e4], [1e4], [1], [1]).log_loss == pytest.approx(2e4)


@pytest.mark.parametrize("kinds", [[0.9], [1.0, 0.5], [0.99, 0.8, 0.6]])
def test_ceiling_holds_the_truth(kinds: list[float]) -> None:
    """Labels right with probability p, by kind of pair: a perfect model is right with mean p."""
    agreement = float(np.mean([p * p + (1 - p) * (1 - p) for p in kinds]))
    low, high = ceiling(agreement)
    assert low - 1e-12 <= float(np.mean(kinds)) <= high + 1e-12
    if len(kinds) == 1:
        assert high == pytest.approx(kinds[0])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"agreement 0\.4"):
        ceiling(0.4)
    with pytest.raises(ValueError, match="no pairs"):
        calibrate([], [], [], [])


def reward_model(folder: Path) -> str:
    tiny_model().save_pretrained(folder / "policy")
    tiny_tokenizer(chat=False).save_pretrained(folder / "policy")
    export_model(load_scorer(str(folder / "policy"), torch.device("cpu")), folder / "rm")
    return str(folder / "rm")


def test_a_reward_model_on_rankings(tmp_path: Path) -> None:
    """Against the pairs counted by hand from scores of the answers one by one."""
    model = reward_model(tmp_path)
    rows = [
        {"prompt": "a", "completions": [" boat", " at", " thin ant"], "tiers": [[2], [0, 1]]},
        {"prompt": "the", "chosen": " oath", "rejected": " in the bath"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardQualityConfig(
        dtype="float32",
        reward_model=model,
        data=str(data),
        agreement=0.82,
        output=tmp_path / "quality.json",
        device="cpu",
    )
    found = reward_quality(config)
    judge = load_judge(model, device="cpu")
    ant, boat, at, oath, bath = judge(
        ["a", "a", "a", "the", "the"], [" thin ant", " boat", " at", " oath", " in the bath"]
    )
    deltas = [ant - boat, ant - at, oath - bath]
    assert (found["pairs"], found["tied_pairs"], found["rankings"]) == (3, 1, 2)
    assert found["accuracy"] == pytest.approx(sum(delta > 0 for delta in deltas) / 3)
    assert found["log_loss"] == pytest.approx(sum(log(1 + exp(-d)) for d in deltas) / 3, abs=1e-5)
    assert found["always_longer_accuracy"] == pytest.approx(2 / 3)
    assert found["ceiling"] == pytest.approx((0.82, 0.9))
    assert json.loads((tmp_path / "quality.json").read_text())["accuracy"] == found["accuracy"]


def test_rankings_without_an_order_are_an_error(tmp_path: Path) -> None:
    model = reward_model(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completions": [" b", " c"], "tiers": [[0, 1]]}\n')
    config = RewardQualityConfig(dtype="float32", reward_model=model, data=str(data), device="cpu")
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        reward_quality(config)
