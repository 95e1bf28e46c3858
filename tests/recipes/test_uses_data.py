"""The rows of the five uses, made of small sets in the public sets' form."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from prefloop import sources
from prefloop.commands import COMMANDS
from prefloop.config import FetchDataConfig
from prefloop.files import read_rows
from prefloop.recipes import chat_data, style_data, text_data
from prefloop.recipes.data import USES, fetch_data
from prefloop.records import RowCounts
from tests.recipes.small_sets import write_sets

KINDS = {
    "sft": "demonstration",
    "preference": "prompt",
    "judge-preference": "preference",
    "ppo": "prompt",
    "evaluation": "prompt",
    "benign": "prompt",
    "harmless-held-out": "preference",
    "llmbar": "preference",
    "rankings": "preference",
    "held-out": "preference",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sets(tmp_path / "sets")
    monkeypatch.setenv("PREFLOOP_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    style_data.classifier.cache_clear()
    return tmp_path


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("use", USES)
def test_training_reads_every_file(use: str, small: Path) -> None:
    facts = fetch_data(FetchDataConfig(use=use, output=small / use))  # type: ignore[arg-type]
    assert json.loads((small / use / "data.json").read_text()) == facts
    counts: Any = facts["rows"]
    for name, count in counts.items():
        path = small / use / f"{name}.jsonl"
        assert len(rows(path)) == count > 0, name
        if name != "pandalm-people":
            kind = "preference" if use == "chat" and name == "preference" else KINDS[name]
            read = sources.load(str(path), kind, RowCounts())  # type: ignore[arg-type]
            assert len(read) == count
    assert {"sets", "rows", "human"} <= facts.keys()
    assert ("simulated" in facts) == (use != "mqm")


def test_chat_parts_share_no_question(small: Path) -> None:
    chat_data.write(small / "chat")

    def questions(name: str) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows(small / "chat" / f"{name}.jsonl")}

    policy = questions("preference") | questions("sft") | questions("ppo")
    judge = questions("judge-preference")
    held_out = questions("evaluation") | questions("harmless-held-out") | questions("benign")
    held_out |= questions("pandalm-people") | questions("llmbar")
    assert not policy & judge and not policy & held_out and not judge & held_out
    # the small LLMBar asks what one of PandaLM's prompts asks, in capitals
    asked = {row["prompt"][0]["content"] for row in rows(small / "chat" / "llmbar.jsonl")}
    (shared,) = {text for text in held_out if text.upper() in asked and text not in asked}
    assert shared not in policy | judge


def test_a_harmless_pair_as_messages() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": start + " Because.", "rejected": start + " No."}
    assert chat_data.harmless_row(row) == {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
        ],
        "completions": ["Because.", "No."],
        "tiers": [[0], [1]],
        "kind": "harmless",
    }
    assert chat_data.harmless_row(row | {"rejected": "\n\nHuman: Ho\n\nAssistant: No."}) is None
    assert chat_data.harmless_row(row | {"rejected": start + " " + "x" * 601}) is None


@pytest.mark.parametrize(
    ("votes", "tiers"), [("112", [[0], [1]]), ("122", [[1], [0]]), ("102", [[0, 1]])]
)
def test_three_people_are_one_order(votes: str, tiers: list[list[int]]) -> None:
    orders = {"0": [[0, 1]], "1": [[0], [1]], "2": [[1], [0]]}
    raters = [orders[vote] for vote in votes]
    row = {"prompt": "p", "completions": ["a", "b"], "raters": raters}
    assert chat_data.helpful_row(row)["tiers"] == tiers


def test_a_summarys_text_is_whole_paragraphs() -> None:
    first, second, third = (" ".join([word] * n) for word, n in (("a", 25), ("b", 30), ("c", 30)))
    row = {"short": "one two three", "long": f"{first}\n\n{second}\n\n{third}"}
    few = {"short": "one two three", "long": "too few words"}
    much = {"short": "one two three", "long": "d " * 61}
    (found,) = text_data.summaries([row, few, much, row | {"short": "again described alike"}])
    assert found["prompt"] == f"{first}\n\n{second}\n\nIn one line:"
    assert found["reference"] == "one two three"


def test_the_classifiers_and_the_models_share_no_headline(small: Path) -> None:
    parts = style_data.parts()
    texts = [{row["text"] for row in part} for part in parts.values()]
    assert len(set.union(*texts)) == sum(map(len, texts)) and all(texts)
    for name in style_data.ASKED:
        assert not any(row["sarcastic"] for row in parts[name])
    for use in ("reward", "judge"):
        fitted = style_data.classifier(use)
        assert fitted.accuracy > 0.9  # the small set's words tell
        low, high = fitted.probabilities(
            ["the mayor opened a bridge", "local man shocked area man"]
        )
        assert low < 0.5 < high


def test_classifiers_score_as_the_fitted_regression() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    draw = random.Random(0)
    words = "area man mayor bridge local shocked opens budget".split()
    train = [
        {"text": " ".join(draw.choices(words, k=6)), "sarcastic": draw.random() < 0.5}
        for _ in range(200)
    ]
    fitted = style_data.fit(train, train[:20])
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    model = LogisticRegression(C=4.0, max_iter=1000)
    labels = [row["sarcastic"] for row in train]
    model.fit(vectorizer.fit_transform([row["text"] for row in train]), labels)
    texts = ["area man opens bridge", "unknown words", "mayor"]
    expected = model.predict_proba(vectorizer.transform(texts))[:, 1]
    assert fitted.probabilities(texts) == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_command_shows_what_it_wrote(small: Path) -> None:
    command = COMMANDS["fetch-data"]
    facts = command.function(FetchDataConfig(use="summary", output=small / "out"))
    assert facts["rows"]["sft"] == len(rows(small / "out" / "sft.jsonl"))
