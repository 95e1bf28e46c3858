"""The study of overoptimisation: its annotators, its small model, and all of it in a quick form."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefloop.commands import COMMANDS
from prefloop.config import OveroptimiseConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.evaluation.frontier import best_of_n_kl
from prefloop.files import read_rows, write_jsonl
from prefloop.recipes.annotators import (
    Annotator,
    common_words,
    draw_annotators,
    gold_judge,
    rank_by_turns,
)
from prefloop.recipes.overoptimisation import WAYS, overoptimise, study_of
from prefloop.recipes.overoptimisation_report import BEST_OF_N, grouped, table
from prefloop.recipes.sentiment_data import gold_reward
from prefloop.recipes.small_model import Shape, write_small_model
from tests.tiny import tiny_model, tiny_tokenizer


def test_words_count_for_a_taste_when_they_are_common():
    assert common_words(["a Film", "film war"] * 15 + ["plot plot"]) == ["film", "war"]


def test_annotators_differ_by_the_deviation_that_is_asked_for():
    words = [f"w{i}" for i in range(2000)]
    people = draw_annotators(2, words, 0.5, np.random.default_rng(0))
    first, second = (np.array([one.taste[word] for word in words]) for one in people)
    assert first.std() == pytest.approx(0.5, rel=0.05)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.fixture
def sampled(tmp_path):
    """Answers to three prompts."""
    rows = [
        {"prompt": "It is", "completions": [" bad", " good", " a plot", " bad"]},
        {"prompt": "One", "completions": [" good", " good"]},
        {"prompt": "So", "completions": [" good", " a plot"]},
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    return tmp_path / "samples.jsonl"


def judge(prompts, completions):
    """Good is worth 2, bad -2, all else nothing."""
    return [2.0 * ("good" in text) - 2.0 * ("bad" in text) for text in completions]


def test_what_goes_in_circles_is_the_worst():
    """Two of the four pairs of words stood before: half of the way from the regression to -4."""
    said = ["film is film is film", "a film"]
    plain = gold_reward(["So", "So"], said)
    assert gold_judge(["So", "So"], said) == pytest.approx([(plain[0] - 4) / 2, plain[1]])


def ranked(sampled, people, flips, prompts=(0, 1, 2)):
    output = sampled.with_name("rankings.jsonl")
    rank_by_turns(sampled, output, people, flips, prompts, judge, np.random.default_rng(0))
    return [
        (row["prompt"], [row["completions"][tier[0]] for tier in row["tiers"]])
        for _, row in read_rows(output)
    ]


def test_annotators_rank_in_turns_by_gold_and_their_taste(sampled):
    """The first ranks prompts 0 and 2; equal answers stand once, one answer alone is no ranking."""
    people = [Annotator({}), Annotator({"plot": 9.0})]
    assert ranked(sampled, people, 0.0) == [
        ("It is", [" good", " a plot", " bad"]),
        ("So", [" good", " a plot"]),
    ]
    assert ranked(sampled, people[::-1], 0.0, (2, 0)) == [
        ("So", [" a plot", " good"]),
        ("It is", [" good", " a plot", " bad"]),
    ]


def test_a_flipped_ranking_is_upside_down(sampled):
    assert ranked(sampled, [Annotator({})], 1.0, (0,)) == [("It is", [" bad", " a plot", " good"])]


def test_a_small_model_is_the_seeds(tmp_path):
    """A byte-level tokenizer of the texts, and weights that the seed alone decides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_small_model(
            ["the boat took the ant"] * 9, tmp_path / name, Shape(270, 16, 1, 2), seed
        )
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight.detach().numpy()
        for name in "abc"
    ]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("the boat é")["input_ids"]
    assert tokenizer.decode(ids) == "the boat é"
    assert len(tokenizer("the boat")["input_ids"]) < len("the boat")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("model", [None, "a/model"])
def test_every_stage_has_valid_settings(tmp_path, quick, model):
    study = study_of(OveroptimiseConfig(output=tmp_path, quick=quick, model=model))
    folder = study.folder(50, 0)
    runs = [study.ppo(folder, way, 3) for way in WAYS]
    stages = (
        study.sft("base", str(tmp_path / "random"), "all", 1.0, 1e-3),
        study.sampling("ppo", study.many, 4, 0),
        study.scoring("module:function", folder / "scores.jsonl"),
        study.reward(folder, 3),
        *runs,
    )
    for config in stages:
        validate(config)
    first, *others = map(vars, runs)
    for other in others:
        changed = {key for key in first if first[key] != other[key]}
        assert other["lora_rank"] == (16 if model else 0)
        assert changed <= {"output", "kl_coef", "kl_target", "kl_horizon"}


def test_the_table_says_what_the_points_say():
    """Gold 0, 1, 2, ... 11 and down by 6 at once: the fall is from the ninth window of twelve."""
    golds = [float(i // 2) for i in range(18)] + [2.0] * 6
    rows = [
        {"labels": 50, "way": "no penalty", "repeat": 0, "kl": i + 1.0, "proxy": 1.0 * i}
        | {"gold": gold, "error": 0.3}
        for i, gold in enumerate(golds)
    ]
    [group] = grouped(rows)
    from prefloop.recipes.overoptimisation_report import summed_up

    one = summed_up(*group)
    assert (one["start"], one["end"][0]["gold"], one["falls"][0]["peak"]) == ([0.0], 2.0, 8.0)
    error = (0.3**2 + 0.3**2 / 2) ** 0.5
    assert one["falls"][0]["standard_errors"] == pytest.approx(6 / error)
    cells = table([one]).splitlines()[2].split(" | ")
    assert cells[:6] == ["| 50", "no penalty", "23.5", "22.50", "0.00, 8.00, 2.00", "16.3"]


def test_another_study_in_the_same_place_is_refused(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="another --output"):
        overoptimise(OveroptimiseConfig(output=tmp_path, quick=True))


@pytest.mark.slow
def test_the_study_begins_from_a_model(tmp_path):
    """Its policies and reward model are adapters; KL is told without a penalty, too."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    config = OveroptimiseConfig(
        output=tmp_path / "out", model=str(tmp_path / "model"), sizes=(8,), repeats=1, quick=True
    )
    overoptimise(config)
    assert not (config.output / "random").exists()
    adapters = {"reward", *(way.replace(" ", "-") for way in WAYS)}
    found = {path.parts[-3] for path in config.output.rglob("adapter_config.json")}
    assert found == adapters
    points = [row for _, row in read_rows(config.output / "points.jsonl")]
    assert max(row["kl"] for row in points if row["way"] == "no penalty") > 1e-4
    with pytest.raises(UserError, match="another --output"):
        overoptimise(replace(config, model=None))


@pytest.mark.slow
def test_the_whole_study_in_its_quick_form(tmp_path, capsys):
    """Every stage runs; given again nothing is done anew."""
    config = OveroptimiseConfig(output=tmp_path / "out", sizes=(8,), repeats=1, quick=True)
    command = COMMANDS["overoptimise"]
    command.show(command.function(config))
    assert capsys.readouterr().out.count("\n") == 2 + 1 + len(WAYS)
    points = [row for _, row in read_rows(config.output / "points.jsonl")]
    many = {row["n"]: row for row in points if row["way"] == BEST_OF_N}
    assert list(many) == [1, 2, 4, 8]
    assert many[8]["kl"] == best_of_n_kl(8)
    assert many[1]["proxy"] == pytest.approx(0.0, abs=1e-9)  # in deviations from SFT's mean
    gold = np.array([row["scores"] for _, row in read_rows(config.output / "many-gold.jsonl")])
    assert many[1]["gold"] == pytest.approx(gold.mean())
    for way in WAYS:
        rows = [row for row in points if row["way"] == way]
        assert [row["step"] for row in rows] == [1, 3, 5]
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    before = _times(config.output)
    again = command.function(config)
    assert _times(config.output) == before
    assert json.loads((config.output / "summary.json").read_text()) == again


def _times(folder: Path):
    """When each stage's files were written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.jsonl")
        if path.name != "points.jsonl"
    }
