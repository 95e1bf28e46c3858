"""PPO and the commands that answer prompts, by a stand-in for vLLM and in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefloop.config import CompareConfig, GenerateConfig, PPOConfig, SampleConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.evaluation.compare import compare
from prefloop.files import read_rows
from prefloop.generation.commands import generate, sample
from prefloop.generation.engine import Engine
from prefloop.generation.protocol import EngineConfig, Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel
from prefloop.training import ppo
from tests.rollouts.stand_in import serving
from tests.training.small import config, lines, train, weights, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


class Told:
    """The engine of this process, whose log-probs are told `shift` nats too high."""

    def __init__(self, model: LoadedModel, shift: float) -> None:
        self.engine, self.shift = Engine(model), shift

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        rows = self.engine.generate(prompts, n, sampling, seed, numbers, on_done)
        return [
            [replace(s, log_probs=tuple(p + self.shift for p in s.log_probs)) for s in row]
            for row in rows
        ]

    def sync(self, model: LoadedModel, version: int) -> None:
        self.engine.sync(model, version)


@pytest.mark.slow
def test_importance_weights_scale_the_gradient(world: Path, tmp_path: Path) -> None:
    """A sampler log 4 nats off below gives weights of 4, capped at 2; one log 2 above gives 1/2.
    Without clipping the norm of the first step's gradient is as many times that of the plain one.
    """
    shifts, seen = (0.0, -1.3862944, 0.6931472), {}
    for shift in shifts:
        settings = config(
            "ppo",
            world,
            tmp_path / str(shift),
            max_steps=1,
            advantage="rloo",
            samples_per_prompt=2,
            max_grad_norm=0.0,
            rollout_engine="http://127.0.0.1:1",
            importance_cap=2.0 if shift else 0.0,
        )

        def told(_: EngineConfig, model: LoadedModel, shift: float = shift) -> RolloutEngine:
            return Told(model, shift)

        ppo.run(settings, told)
        seen[shift] = lines(tmp_path / str(shift))[0]
    plain, doubled, halved = (seen[shift]["grad_norm"] for shift in shifts)
    assert doubled == pytest.approx(2 * plain, rel=1e-4)
    assert halved == pytest.approx(plain / 2, rel=1e-4)
    below, above = seen[-1.3862944], seen[0.6931472]
    assert (below["val/importance"], below["val/importance_capped"]) == pytest.approx((2.0, 1.0))
    assert (above["val/importance"], above["val/importance_capped"]) == pytest.approx((0.5, 0.0))
    assert below["val/sampler_gap"] == pytest.approx(1.3862944, abs=1e-4)
    assert "val/importance" not in seen[0.0]


def test_what_cannot_be_meant_is_told(world: Path, tmp_path: Path) -> None:
    def problem(**changes: Any) -> str:
        settings: PPOConfig = config("ppo", world, tmp_path, **changes)
        with pytest.raises(UserError) as caught:
            validate(settings)
        return str(caught.value)

    assert "--rollout-engine localhost:8000: give http://" in problem(
        rollout_engine="localhost:8000"
    )
    twice = "http://a:1,http://a:1/v1"
    assert "--rollout-engine names http://a:1 twice" in problem(rollout_engine=twice)
    assert "--importance-cap is read only with --rollout-engine" in problem(importance_cap=2.0)
    good = config("ppo", world, tmp_path, rollout_engine="http://a:1/, https://b:2/v1")
    validate(good)
    assert good.rollout_servers == ("http://a:1", "https://b:2")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
def test_ppo_learns_from_servers(lora: dict[str, Any], world: Path, tmp_path: Path) -> None:
    """Every iteration's answers are the present weights', which have been through the folder."""
    settings = {"batch_size": 3, "samples_per_prompt": 2, "ppo_epochs": 2, "max_steps": 4} | lora
    place = tmp_path / "weights"
    with serving(world / "model", world / "model") as servers:
        urls = ",".join(server.url for server in servers)
        settings |= {"rollout_engine": urls, "rollout_folder": place}
        train("ppo", world, tmp_path / "run", **settings)
        for server in servers:
            assert len(server.read) == 2
            assert {path.parent for path in server.read} == {place}
    gc.collect()
    assert list(place.iterdir()) == []
    rows = [line for line in lines(tmp_path / "run") if "val/sampler_gap" in line]
    assert len(rows) == 2
    assert max(row["val/sampler_gap"] for row in rows) < 1e-5
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert {row["weights_version"] for row in samples} == {0, 1}
    assert weights(tmp_path / "run")


def commands(world: Path, output: Path, url: str | None) -> list[Any]:
    """What sample, generate and compare write, without what names their settings."""
    shared: dict[str, Any] = {
        "data": str(world / "prompts.jsonl"),
        "max_new_tokens": 6,
        "dtype": "float32",
        "device": "cpu",
        "temperature": 0.0,
        "rollout_engine": url,
    }
    output.mkdir()
    model = {"model": str(world / "reference")} | shared
    sample(SampleConfig(output=output / "s.jsonl", samples_per_prompt=2, **model))
    generate(GenerateConfig(output=output / "g.jsonl", **model))
    compare(
        CompareConfig(
            sft=str(world / "model"),
            models=(f"other={world / 'reference'}",),
            judge="tests.training.rewards:by_length",
            output=output / "c",
            **shared,
        )
    )
    names = ("completion_ids", "finish_reasons", "completion_finish_reason", "tokens", "way", "kl")
    files = [output / "s.jsonl", output / "g.jsonl", output / "c" / "answers.jsonl"]
    rows = [row for file in files for _, row in read_rows(file)]
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.mark.slow
def test_greedy_answers_are_those_of_this_process(world: Path, tmp_path: Path) -> None:
    """By one server, which is given each model's weights in turn."""
    with serving(world / "model") as (server,):
        theirs = commands(world, tmp_path / "there", server.url)
        assert server.asked
    ours = commands(world, tmp_path / "here", None)
    for one, other in zip(theirs, ours, strict=True):
        assert one.pop("kl", []) == pytest.approx(other.pop("kl", []), abs=1e-4)
        assert one == other
    assert len({str(row) for row in ours}) > 9
