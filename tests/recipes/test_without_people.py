"""The recipes without people: as they are shipped they load, and in a quick form they run."""

import json
from pathlib import Path

import pytest
import yaml

from prefloop import recipes
from prefloop.commands import COMMANDS
from prefloop.config import RunConfig
from prefloop.config.resolve import read_yaml
from prefloop.recipes.pipeline import read_stages, run
from tests.evaluation.test_compare import vowels
from tests.training.small import write_rows, write_world

FOLDER = Path(recipes.__file__).parent
SHIPPED = sorted(FOLDER.glob("*.yaml"))
ON_CPU = {"device": "cpu", "dtype": "float32"}
QUICK = {
    "sample": ON_CPU | {"max_new_tokens": 12, "samples_per_prompt": 4},
    "rank": {"judge": "tests.evaluation.test_compare:vowels"},
    "dpo": ON_CPU | {"lr": 1e-2, "batch_size": 4, "epochs": 12.0, "beta": 0.02},
    "sft": ON_CPU | {"lr": 1e-2, "batch_size": 4, "epochs": 20.0},
}
"""Beside a tiny model and few prompts; enough steps to see the score rise."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    asked = ["the boat", "a thin ant", "in", "an oath", "the bath", "that", "it took", "ant"]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert read_stages(path, Path("runs"), COMMANDS)


def quick(name, world, folder):
    """The shipped recipe with the world's model, prompts and judge, and few steps."""
    content = read_yaml(FOLDER / f"{name}.yaml")
    items = content["stages"]
    for item in items:
        if "rounds" in item:
            item["start"] = str(world / "model")
    for stage in [stage for item in items for stage in item.get("stages", [item])]:
        settings = stage["settings"]
        for key, value in settings.items():
            known = {"runs/sft": world / "model", "prompts.jsonl": world / "prompts.jsonl"}
            settings[key] = str(known.get(value, value)) if isinstance(value, str) else value
        settings |= QUICK[stage["command"]]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return RunConfig(pipeline=path, output=folder / "out")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(samples):
    """The judge's mean score."""
    texts = [text for row in samples for text in row["completions"]]
    return sum(vowels([], texts)) / len(texts)


def test_iterative_dpo(world, tmp_path, capsys):
    """Each round samples from the policy of the round before, which writes more vowels."""
    config = quick("iterative-dpo", world, tmp_path)
    run(config, COMMANDS)
    out = config.output
    first, second = (rows(out / f"sample-{n}.jsonl") for n in (1, 2))
    assert {row["model"] for row in first} == {str(world / "model")}
    assert {row["model"] for row in second} == {str(out / "dpo-1")}
    assert score(second) > score(first) + 0.3
    for samples, n in ((first, 1), (second, 2)):
        for sampled, ranked in zip(samples, rows(out / f"rank-{n}.jsonl"), strict=True):
            scores = vowels([], sampled["completions"])
            assert ranked["scores"] == scores
            assert [scores[tier[0]] for tier in ranked["tiers"]] == sorted(set(scores))[::-1]
    settings = read_yaml(out / "dpo-2" / "config.yaml")
    assert (settings["model"], settings["data"]) == (str(out / "dpo-1"), str(out / "rank-2.jsonl"))
    capsys.readouterr()
    run(config, COMMANDS)
    assert capsys.readouterr().out.count("nothing changed, skipped") == 6


def test_rejection_sampling(world, tmp_path):
    """SFT on the answer with most vowels to each prompt."""
    config = quick("rejection-sampling", world, tmp_path)
    run(config, COMMANDS)
    out = config.output
    for sampled, best in zip(rows(out / "sample.jsonl"), rows(out / "best.jsonl"), strict=True):
        place = sampled["completions"].index(best["completion"])
        assert best["score"] == max(vowels([], sampled["completions"]))
        assert best["completion_ids"] == sampled["completion_ids"][place]
    sample = COMMANDS["sample"]
    sample.function(
        sample.config(
            model=str(out / "sft"),
            data=str(world / "prompts.jsonl"),
            output=tmp_path / "after.jsonl",
            **QUICK["sample"],
        )
    )
    assert score(rows(tmp_path / "after.jsonl")) > score(rows(out / "sample.jsonl")) + 0.3
