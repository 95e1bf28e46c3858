import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefloop.config import JudgeQualityConfig
from prefloop.config.labelling import LabelImportConfig
from prefloop.errors import UserError
from prefloop.evaluation.judge_quality import measure, run
from prefloop.files import write_jsonl
from tests.evaluation.llm_server import Reply, section, serving

HERE = "tests.evaluation.test_judge_quality"
WIN, LOSS, TIE = [[0], [1]], [[1], [0]], [[0, 1]]


def lengths(prompts: list[Any], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


ROWS = [
    {"prompt": "p", "completions": ["long", "a"], "raters": [WIN, WIN, TIE]},
    {"prompt": "q", "completions": ["long", "a"], "raters": [LOSS, WIN, LOSS]},
    {"prompt": "r", "completions": ["ab", "cd"], "raters": [TIE, WIN, LOSS]},
]


def config(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> JudgeQualityConfig:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"data": str(tmp_path / "rows.jsonl"), "judge": f"{HERE}:lengths"} | options
    return JudgeQualityConfig(**given)


def test_bad_rows_are_left_out_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"prompt": "s", "completions": ["only one"], "raters": [[[0]], [[0]]]},
        {"prompt": "t", "completions": ["a", "b"]},
        {"prompt": "u", "completions": ["a", "b"], "raters": [WIN, [[0], [7]]]},
    ]
    rows = [*bad, *ROWS]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: "):
        run(config(tmp_path, rows))
    result = run(config(tmp_path, rows, bad_rows="drop"))
    assert sum(result["left_out"].values()) == 3
    told = capsys.readouterr().err
    for line in (1, 2, 3):
        assert f"rows.jsonl:{line}: " in told
    without = run(config(tmp_path))
    assert {k: v for k, v in result.items() if k != "left_out"} == {
        k: v for k, v in without.items() if k != "left_out"
    }


def test_agreement_by_hand(tmp_path: Path) -> None:
    """The judge says win, win, tie.

    With one person: (1 + 1 + 1/2)/3, 1/3, (1 + 1/2 + 1/2)/3; people among each other:
    (1 + 1/2 + 1/2)/3, 1/3, (1/2 + 1/2 + 0)/3. Majorities of the other two: of p win, win, win; of q
    none (win and loss), loss, none, so the second person alone has one; of r loss... (win + loss is
    none, tie + loss is loss, tie + win is win).
    """
    result = run(config(tmp_path, output=tmp_path / "out.json"))
    judge = (2.5 / 3 + 1 / 3 + 2 / 3) / 3
    people = (2 / 3 + 1 / 3 + 1 / 3) / 3
    assert result["agreement"]["judge"]["mean"] == pytest.approx(judge)
    assert result["agreement"]["people"]["mean"] == pytest.approx(people)
    assert result["agreement"]["difference"]["mean"] == pytest.approx(judge - people)
    # p: judge 1, people (1 + 1 + 1/2)/3; q: judge 0, people 0; r: judge 1/2, people (0 + 0)/2.
    assert result["majority"]["judge"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert result["majority"]["people"]["mean"] == pytest.approx((2.5 / 3 + 0 + 0) / 3)
    assert result["ties"] == {
        "judge": pytest.approx(1 / 3),
        "people": pytest.approx((1 / 3 + 0 + 1 / 3) / 3),
    }
    assert (result["pairs"], result["prompts"], result["pairs_with_majority"]) == (3, 3, 3)
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_a_person_as_the_judge_agrees_as_people_do() -> None:
    """Over each of 5 people, held out and taken for the judge, the two majority means are one."""
    rng = np.random.default_rng(0)
    signs = rng.integers(-1, 2, size=(5, 40)).astype(float)
    for pair in signs.T:
        whole = measure(0.0, pair)
        each = [measure(float(own), np.delete(pair, i)).judge for i, own in enumerate(pair)]
        assert np.mean(each) == pytest.approx(whole.people)


def test_intervals_resample_prompts(tmp_path: Path) -> None:
    """Ten pairs of each prompt are no more evidence than one: the width is that of the prompts."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{n}", "completions": ["x" * (k + 2), "a"], "raters": [(WIN, LOSS)[n % 2]] * 2}
        for n in range(20)
        for k in range(10)
    ]
    many = run(config(tmp_path, rows))["agreement"]["judge"]
    once = run(config(tmp_path, rows[::10]))["agreement"]["judge"]
    assert many["mean"] == once["mean"] == 0.5
    assert many["high"] - many["low"] == pytest.approx(once["high"] - once["low"], rel=1e-6)


FORMS: list[list[dict[str, Any]]] = [
    [{"prompt": "p", "completions": ["long", "a"], "raters": [WIN, LOSS]}],
    [
        {
            "prompt": "p",
            "completions": ["long", "a"],
            "judged": [{"labeller": "x", "tiers": WIN}, {"labeller": "y", "tiers": LOSS}],
        }
    ],
    [
        {"prompt": "p", "completions": ["long", "a"], "tiers": tiers, "labeller": name}
        for name, tiers in (("x", WIN), ("y", LOSS))
    ],
]


@pytest.mark.parametrize("rows", FORMS, ids=["raters", "judged", "a row a person"])
def test_three_forms_say_the_same(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    single = {"prompt": "s", "completions": ["b", "c"], "tiers": WIN, "labeller": "x"}
    result = run(config(tmp_path, [*rows, single]))
    assert result["agreement"]["judge"]["mean"] == 0.5
    assert result["agreement"]["people"]["mean"] == 0.0
    assert result["left_out"] == {"ranked by one person alone": 1}


def test_a_labelling_store(tmp_path: Path) -> None:
    from prefloop import commands

    settings = config(tmp_path, FORMS[2])
    store = f"{tmp_path}/labels.db"
    commands.label_import(LabelImportConfig(store=store, data=settings.data))
    result = run(JudgeQualityConfig(data=store, judge=settings.judge))
    assert result["agreement"]["judge"]["mean"] == 0.5


@pytest.mark.parametrize("mode", ["pairwise", "rubric"])
def test_an_llm(mode: str, tmp_path: Path) -> None:
    """What it gives no verdict on is left out for people as well."""

    def says(prompt: str, before: int) -> Reply:
        if section(prompt, "prompt") == "q":
            return 400
        if mode == "rubric":
            return f"[[{len(section(prompt, 'answer'))}]]"
        return "[[A]]"  # whatever stands first

    with serving(says) as server:
        options = {"judge": server.judge, "judge_mode": mode, "judge_cache": tmp_path / "cache"}
        result = run(config(tmp_path, **options))
    assert result["pairs"] == 2
    assert result["pairs_without_verdict"] == 1
    assert result["agreement"]["people"]["mean"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    if mode == "pairwise":
        assert result["order_agreement"] == 0.0
        assert result["ties"]["judge"] == 1.0
    else:
        assert result["agreement"]["judge"]["mean"] == pytest.approx((2.5 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "p", "completions": ["a", "b"]}], "rows.jsonl:1: says of nobody"),
        ([{"prompt": "p", "completions": ["a", "b"], "raters": [[[0]]]}], "rows.jsonl:1: `tiers`"),
        (
            [{"prompt": "p", "completions": ["a", "b"], "judged": ["x"]}],
            "rows.jsonl:1: `tiers` must",
        ),
        ([ROWS[0] | {"raters": [WIN]}], "nothing that two people have ranked"),
    ],
)
def test_rows_that_say_nothing(rows: list[dict[str, Any]], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        run(config(tmp_path, rows))


def test_only_the_first_rows(tmp_path: Path) -> None:
    assert run(config(tmp_path, max_rows=2))["pairs"] == 2
