import json
from pathlib import Path

import numpy as np
import pytest

from prefloop.config import WinrateConfig
from prefloop.errors import UserError
from prefloop.evaluation.winrate import prompt_win_rate, run, win_rate
from prefloop.files import write_jsonl
from prefloop.intervals import Interval, bootstrap, mean_score


def length_judge(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_win_rate_of_a_prompt_counts_ties_half() -> None:
    # 3 > 1, 3 > 3 ties, 0 < 1, 0 < 3
    assert prompt_win_rate([3.0, 0.0], [1.0, 3.0]) == (1 + 0.5 + 0 + 0) / 4
    assert prompt_win_rate([1.0], [1.0]) == 0.5


def test_win_rate_weighs_prompts_alike() -> None:
    rate = win_rate([[1.0, 1.0, 1.0], [0.0]], [[0.0], [1.0]])
    assert rate.mean == 0.5
    # p(1 - p)/error^2 = (1/4)/(1/4): worth one answer, read by Student's t = 12.706 of one freedom
    half = 12.7062**2 / 4 + 1 / 4
    assert rate.low == pytest.approx(0.5 - 12.7062 * half**0.5 / (1 + 12.7062**2), abs=1e-4)
    assert rate.high == pytest.approx(1 - rate.low)
    with pytest.raises(ValueError, match="2 prompts against 1"):
        win_rate([[1.0], [1.0]], [[1.0]])


def test_interval_of_the_mean_is_the_normal_one_in_the_limit() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    interval = bootstrap(values.tolist())
    half = 1.9626 * values.std(ddof=1) / 30
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_answers_to_one_prompt_are_no_independent_evidence() -> None:
    """Copies of each answer change nothing; as prompts of their own they would halve the width."""
    scores = [[0.0], [1.0], [5.0], [2.0]]
    once = mean_score(scores)
    assert mean_score([row * 4 for row in scores]) == once
    flat = mean_score(scores * 4)
    assert flat.high - flat.low < 0.5 * (once.high - once.low)


def test_constant_values_have_no_width() -> None:
    assert bootstrap([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_intervals_apart() -> None:
    assert Interval(2, 1.5, 2.5).above(Interval(1, 0.5, 1.4))
    assert not Interval(2, 1.5, 2.5).above(Interval(1, 0.5, 1.5))


def config(tmp_path: Path, **options: object) -> WinrateConfig:
    return WinrateConfig(
        answers=tmp_path / "a.jsonl",
        baseline=tmp_path / "b.jsonl",
        judge="tests.evaluation.test_winrate:length_judge",
        output=tmp_path / "out.json",
        **options,  # type: ignore[arg-type]
    )


def test_run_judges_two_files_by_prompt(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "p", "completion": "long"}, {"prompt": "q", "completions": ["x", "yyy"]}],
    )
    write_jsonl(
        tmp_path / "b.jsonl",
        [{"prompt": "q", "completion": "x"}, {"prompt": "p", "completion": "no"}],
    )
    result = run(config(tmp_path))
    assert result["win_rate"]["mean"] == (1.0 + (0.5 + 1.0) / 2) / 2
    assert result["score"]["mean"] == (4 + 2) / 2
    assert result["baseline_score"]["mean"] == 1.5
    assert json.loads((tmp_path / "out.json").read_text()) == result


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "other", "completion": "x"}], "same prompts"),
        ([{"prompt": "p", "answer": "x"}], r"b.jsonl:1: .*`completion`"),
        ([{"prompt": "p", "completion": 3}], r"b.jsonl:1"),
    ],
)
def test_run_names_what_is_wrong(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "x"}])
    write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=message):
        run(config(tmp_path))
    assert not (tmp_path / "out.json").exists()
