"""A comparison's answers judged anew, against a comparison that had that judge from the first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from prefloop.config import CompareConfig, RejudgeConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.evaluation.compare import compare
from prefloop.evaluation.comparison import Comparison
from prefloop.evaluation.rejudge import rejudge
from prefloop.evaluation.reread import read_comparison
from prefloop.files import read_rows, write_jsonl
from tests.evaluation.llm_server import Reply, section, serving
from tests.evaluation.test_compare import PROMPTS, config  # noqa: F401

BY_LENGTH = "tests.evaluation.test_rejudge:long"


def long(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [
        len(prompt) + 0.5 * len(text) for prompt, text in zip(prompts, completions, strict=True)
    ]


def again(config: CompareConfig, judge: str, **more: object) -> RejudgeConfig:  # noqa: F811
    output = config.output.parent / "again"
    return RejudgeConfig(comparison=config.output, judge=judge, output=output, **more)  # type: ignore[arg-type]


def numbers(found: Comparison) -> str:
    """What does not depend on the machine's load, and where it was written."""
    each = [one for way in found.ways for one in (way, *way.runs)]
    ways = [(w.name, w.vitals, w.win_rate, w.signs, w.kl_is_bound) for w in each]
    return repr([ways, found.verdicts, found.whole_costs, found.calibration, found.unjudged])


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [row for _, row in read_rows(folder / "answers.jsonl")]


@pytest.mark.parametrize("judge", ["tests.evaluation.test_compare:vowels", BY_LENGTH])
def test_it_finds_what_a_comparison_with_that_judge_finds(
    config: CompareConfig,  # noqa: F811
    judge: str,
) -> None:
    compare(config, notes=("A note.",))
    found = rejudge(again(config, judge))
    other = replace(config, judge=judge, output=config.output.parent / "other")
    assert numbers(found) == numbers(compare(other))
    assert found.notes == ("A note.", f"The answers are those of {config.output}, judged anew.")
    assert [way.cpu_seconds_per_answer for way in found.ways] == [
        way.cpu_seconds_per_answer for way in read_comparison(config.output)[0].ways
    ]
    folder = config.output.parent / "again"
    assert rows_of(folder) == rows_of(other.output)
    assert "judged anew" in (folder / "report.html").read_text()
    assert numbers(read_comparison(folder)[0]) == numbers(found)


def test_several_runs_of_a_way_and_a_reward_model_as_judge(
    config: CompareConfig,  # noqa: F811
) -> None:
    first, second = (item.split("=")[1] for item in config.models)
    runs = replace(config, models=(f"both={first}", f"both={second}"))
    judge = str(config.reward_model)
    alone = replace(runs, reward_model=None, best_of=4)
    compare(alone)
    found = rejudge(again(alone, judge))
    fresh = compare(replace(alone, judge=judge, output=config.output.parent / "other"))
    assert numbers(found) == numbers(fresh)
    assert len(found.ways[1].runs) == 2


def test_an_llm_compares_the_answers_with_sfts(
    config: CompareConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    def says(prompt: str, before: int) -> Reply:
        a, b = (len(section(prompt, f"answer_{side}")) for side in "ab")
        return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"

    compare(config)
    with serving(says) as server:
        how = {"judge_mode": "pairwise", "judge_cache": tmp_path / "cache"}
        found = rejudge(again(config, server.judge, **how))
        fresh = replace(config, judge=server.judge, output=tmp_path / "other", **how)  # type: ignore[arg-type]
        assert numbers(found) == numbers(compare(fresh))


def test_answers_that_the_first_judge_did_not_score_are_judged(
    config: CompareConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    with serving(lambda prompt, _: 400 if len(server.asked) % 2 else "[[4]]") as server:
        cache = {"judge_cache": tmp_path / "cache"}
        before = compare(replace(config, judge=server.judge, **cache))  # type: ignore[arg-type]
    assert before.unjudged and len(before.notes) == 1
    found = rejudge(again(config, BY_LENGTH))
    assert found.unjudged == 0
    assert found.notes == (f"The answers are those of {config.output}, judged anew.",)


def test_faults_are_one_line(config: CompareConfig, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"compare\.json or answers\.jsonl cannot be read"):
        rejudge(again(config, BY_LENGTH))
    with pytest.raises(UserError, match="--output is --comparison; give another folder"):
        validate(replace(again(config, BY_LENGTH), output=config.output))
    compare(config)
    write_jsonl(Path(config.data), [{"prompt": prompt} for prompt in reversed(PROMPTS)])
    with pytest.raises(UserError, match=r"not the prompts of .*/answers\.jsonl; give both"):
        rejudge(again(config, BY_LENGTH))
    write_jsonl(Path(config.data), [{"prompt": prompt} for prompt in PROMPTS])
    write_jsonl(config.output / "answers.jsonl", rows_of(config.output)[:-1])
    with pytest.raises(UserError, match=r"not the prompts of .*/answers\.jsonl; give both"):
        rejudge(again(config, BY_LENGTH))
    assert not (tmp_path / "again").exists()
