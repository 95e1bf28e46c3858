"""Each example runs, on tiny models, and does what it says."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefloop.recipes.fetch import RatedSentence
from tests.training.small import lines, write_rows, write_world

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MQM = ROOT.parent / "shared" / "data" / "mqm-ted-ende-rankings.jsonl.gz"
FAST = {"lr": 1e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(names) == 3
    assert [name for name in names if f'example("{name}")' not in text] == []


def test_dpo_by_hand_learns_in_under_60_lines(world, tmp_path):
    assert len((EXAMPLES / "dpo_by_hand.py").read_text().splitlines()) < 60
    run = example("dpo_by_hand").main
    data = str(world / "pairs.jsonl")
    losses = run(str(world / "model"), data, str(tmp_path / "out"), steps=16, lr=1e-3)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are one
    assert losses[-1] < 0.9 * losses[0]
    before = AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_ppo_python_reward_runs(world, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python examples/...` has it
    module = example("ppo_python_reward")
    ten = " ".join("abcdefghij")
    assert module.score(["", "", ""], [ten, " a a", ""]) == pytest.approx([1.0, 0.5 - 0.8, -1.0])
    out = tmp_path / "run"
    few = {"batch_size": 4, "max_new_tokens": 6, "max_steps": 2, "max_length": 64}
    run = module.main(str(world / "model"), str(world / "prompts.jsonl"), str(out), **few, **FAST)
    assert run.directory == out
    assert (out / "model" / "config.json").exists()
    assert lines(out)


def check_scorer(out):
    AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert lines(out)


def test_reward_kwise_groups_people_s_ratings():
    rated = [RatedSentence(f"s{n}", (n % 3, n % 3)) for n in range(9)]
    rows = example("reward_kwise").film_rankings(rated, size=4)
    assert len(rows) == 2  # the ninth makes no group
    for row in rows:
        means = [int(text.removeprefix(" s")) % 3 for text in row["completions"]]
        levels = [{means[i] for i in tier} for tier in row["tiers"]]
        assert all(len(level) == 1 for level in levels)
        assert [max(level) for level in levels] == sorted(set(means), reverse=True)
        assert sorted(i for tier in row["tiers"] for i in tier) == [0, 1, 2, 3]


def test_reward_kwise_runs(world, tmp_path):
    run = example("reward_kwise").main
    few = {"batch_size": 4, "max_steps": 2, "max_length": 128}
    run(str(world / "model"), str(world / "rank.jsonl"), str(tmp_path / "run"), **few, **FAST)
    check_scorer(tmp_path / "run")


@pytest.mark.skipif(not MQM.exists(), reason="the human rankings of translations are not here")
def test_reward_kwise_runs_on_human_rankings(world, tmp_path):
    import gzip

    with gzip.open(MQM, "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(24)]
    assert max(len(row["completions"]) for row in rows) > 4
    data = write_rows(tmp_path / "mqm.jsonl", rows)
    few = {"batch_size": 4, "max_steps": 2, "max_length": 512}
    out = tmp_path / "run"
    example("reward_kwise").main(str(world / "model"), str(data), str(out), **few, **FAST)
    check_scorer(out)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
