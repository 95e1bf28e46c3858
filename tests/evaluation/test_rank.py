import json
from pathlib import Path
from typing import Any

import pytest

from prefloop import commands, sources
from prefloop.config import RankConfig
from prefloop.config.labelling import LabelImportConfig
from prefloop.errors import UserError
from prefloop.evaluation.rank import run, tiers_of
from prefloop.files import write_jsonl
from prefloop.records import RowCounts
from tests.evaluation.test_judges import policy_folder

HERE = "tests.evaluation.test_rank"
CHAT = [{"role": "user", "content": "Hi"}]
FINGERPRINT = "0123456789abcdef"

asked: list[str] = []
budget = [10**9]


def vowels(prompts: list[Any], completions: list[str]) -> list[float]:
    """Runs out of paper, where a test says so."""
    budget[0] -= len(completions)
    if budget[0] < 0:
        raise RuntimeError("out of paper")
    asked.extend(completions)
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def by_column(prompts: list[Any], completions: list[str], wanted: list[str]) -> list[float]:
    return [float(text == want) for text, want in zip(completions, wanted, strict=True)]


def config(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> RankConfig:
    write_jsonl(tmp_path / "samples.jsonl", rows)
    defaults = {"judge": f"{HERE}:vowels", "output": tmp_path / "rankings.jsonl"}
    return RankConfig(data=str(tmp_path / "samples.jsonl"), **defaults | options)  # type: ignore[arg-type]


def written(config: RankConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in config.output.read_text().splitlines()]


ROW = {
    "prompt": "p",
    "completions": ["a", "aeo", "", "e", "a"],
    "completion_ids": [[5, 2], [6, 7], [2], [8, 2], [5, 2]],
    "finish_reasons": ["stop", "length", "stop", "stop", "stop"],
    "tokenizer": FINGERPRINT,
    "model": "m",
    "seed": 3,
}


def test_equal_scores_tie_and_what_was_sampled_stays(tmp_path: Path) -> None:
    asked.clear()
    settings = config(tmp_path, [ROW])
    result = run(settings)
    (row,) = written(settings)
    assert row["tiers"] == [[1], [0, 3, 4], [2]]
    assert row["scores"] == [1.0, 3.0, 0.0, 1.0, 1.0]
    assert row["labeller"] == f"{HERE}:vowels"
    for name in ("completions", "completion_ids", "finish_reasons", "tokenizer"):
        assert row[name] == ROW[name]
    assert asked == ["a", "aeo", "", "e"]  # the two equal answers are scored once
    assert result["pairs"] == 7
    assert result["tied_pairs"] == 3
    (record,) = sources.load(str(settings.output), "preference", RowCounts())
    assert record.tiers == ((1,), (0, 3, 4), (2,))
    assert [one.ended for one in record.sampled] == [True, False, True, True, True]


def test_the_best_alone_is_a_demonstration(tmp_path: Path) -> None:
    poor = {"prompt": CHAT, "completions": ["x", "y"]}
    settings = config(tmp_path, [ROW, poor], form="best", min_score=0.5)
    result = run(settings)
    assert result["left_out"] == {"best answer below --min-score 0.5": 1}
    (row,) = written(settings)
    assert (row["prompt"], row["completion"], row["score"]) == ("p", "aeo", 3.0)
    (record,) = sources.load(str(settings.output), "demonstration", RowCounts())
    assert record.sampled[0].ended is False
    assert record.sampled[0].ids == (6, 7)
    settings = config(tmp_path, [ROW, poor], form="best")
    run(settings)
    assert [row["completion"] for row in written(settings)] == [
        "aeo",
        [{"role": "assistant", "content": "x"}],
    ]
    with pytest.raises(UserError, match=r"nothing to write: .* 2 \(best answer below"):
        run(config(tmp_path, [ROW, poor], form="best", min_score=9.0))


def test_functions_are_given_the_rows_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"], "wanted": w} for w in "ba"]
    settings = config(tmp_path, rows, judge=f"{HERE}:by_column")
    run(settings)
    assert [row["tiers"] for row in written(settings)] == [[[1], [0]], [[0], [1]]]
    with pytest.raises(UserError, match=r"samples\.jsonl:1: no column `wanted`"):
        run(config(tmp_path, [ROW], judge=f"{HERE}:by_column"))


def test_a_reward_model_ranks_as_transformers_scores(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from prefloop.models.export import export_model
    from prefloop.models.load import load_scorer
    from tests.tiny import tiny_tokenizer

    scorer = load_scorer(policy_folder(tmp_path / "policy"), torch.device("cpu"))
    export_model(scorer, tmp_path / "rm")
    answers = ["the boat", "an oath", "in", "a thin ant"]
    options = {"judge": str(tmp_path / "rm"), "device": "cpu", "dtype": "float32"}
    settings = config(tmp_path, [{"prompt": "that", "completions": answers}], **options)
    run(settings)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = tiny_tokenizer(chat=False)

    def score(answer: str) -> float:
        ids = tokenizer("that")["input_ids"] + tokenizer(answer)["input_ids"]
        with torch.no_grad():
            return float(plain(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits)

    expected = sorted(range(4), key=lambda i: -score(answers[i]))
    assert written(settings)[0]["tiers"] == [[i] for i in expected]


def test_an_ended_try_is_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third chunk of 32 rows fails; what was judged before is not judged again."""
    rows = [{"prompt": f"p{n}", "completions": [f"{n}", f"a{n}"]} for n in range(80)]
    settings = config(tmp_path, rows)
    budget[0] = 128
    with pytest.raises(UserError, match="out of paper"):
        run(settings)
    assert not settings.output.exists()
    partial = settings.output.with_name("rankings.jsonl.partial")
    with partial.open("a") as file:
        file.write("[1.0, 0")  # a line that was not written whole
    budget[0] = 10**9
    asked.clear()
    run(settings)
    assert "goes on after 64 rows" in capsys.readouterr().err
    assert asked == [text for row in rows[64:] for text in row["completions"]]
    assert [row["tiers"] for row in written(settings)] == [[[1], [0]]] * 80
    assert not partial.exists()


def test_other_rows_or_another_judge_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{n}", "completions": [f"{n}", f"a{n}"]} for n in range(40)]
    budget[0] = 64
    with pytest.raises(UserError, match="out of paper"):
        run(config(tmp_path, rows))
    budget[0] = 10**9
    asked.clear()
    run(config(tmp_path, [*rows[:-1], ROW]))
    assert "of other rows or another judge; begun anew" in capsys.readouterr().err
    assert len(asked) == 39 * 2 + 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "completions": ["only"]}, "two answers or more"),
        ({"prompt": "p", "completion": "x"}, "two answers or more"),
        ({"prompt": "p", "completions": ["a", 3]}, r"completions\[1\]"),
        ({"prompt": "p", "completions": ["a", "b"], "finish_reasons": ["stop"]}, "one entry"),
        ({"prompt": CHAT, "completions": ["a", [*CHAT, *CHAT]]}, "several turns|assistant"),
    ],
)
def test_rows_that_cannot_be_ranked(
    row: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: .*({problem})"):
        run(config(tmp_path, [ROW, row]))
    settings = config(tmp_path, [ROW, row], bad_rows="drop")
    assert len(run(settings)["left_out"]) == 1
    assert "left out: " in capsys.readouterr().err
    assert len(written(settings)) == 1


def test_rankings_go_into_a_labelling_store(tmp_path: Path) -> None:
    """As a labeller of the judge's name."""
    settings = config(tmp_path, [{k: v for k, v in ROW.items() if k not in ("model", "seed")}])
    run(settings)
    store = f"{tmp_path}/labels.db"
    commands.label_import(LabelImportConfig(store=store, data=str(settings.output)))
    (record,) = sources.load(store, "preference", RowCounts())
    assert record.tiers == ((1,), (0, 3, 4), (2,))


def test_tiers_of_scores() -> None:
    assert tiers_of([1.0, 1.0]) == ((0, 1),)
    assert tiers_of([-1.0, 0.0, 7.0]) == ((2,), (1,), (0,))
