"""PPO, sample and compare write nothing themselves: they take whatever engine they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from prefloop.config import CompareConfig, SampleConfig
from prefloop.evaluation.compare import compare
from prefloop.files import read_rows
from prefloop.generation.commands import sample
from prefloop.generation.protocol import EngineConfig, Prompts, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel
from prefloop.training import ppo
from tests.training.small import config, lines, write_world

STOP = 2


class Scripted:
    """A RolloutEngine without a model: an answer names prompt and sample, then stops."""

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self.model, self.version = model, 0
        self.calls: list[tuple[int, int, list[int], Sampling]] = []

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """Tokens from 40 on for prompts, from 60 on for samples."""
        numbers = range(len(prompts)) if numbers is None else numbers
        self.calls.append((seed, n, list(numbers), sampling))
        rows = [
            [
                Sample(index, s, (40 + number, 60 + s, STOP), (-0.5,) * 3, "stop", self.version)
                for s in range(n)
            ]
            for index, number in enumerate(numbers)
        ]
        for row in rows:
            for answer in row:
                if on_done is not None:
                    on_done(answer)
        return rows

    def sync(self, model: LoadedModel, version: int) -> None:
        """Nothing to copy."""
        assert model is self.model
        self.version = version


class Made:
    """The engines that a command asked for."""

    def __init__(self) -> None:
        self.engines: list[Scripted] = []

    def __call__(self, config: EngineConfig, model: LoadedModel) -> Scripted:
        self.engines.append(Scripted(config, model))
        return self.engines[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def test_ppo(world: Path, tmp_path: Path) -> None:
    """One engine for the run, told the weights' version before each iteration."""
    made = Made()
    settings = config("ppo", world, tmp_path / "run", batch_size=3, samples_per_prompt=2)
    ppo.run(settings, made)
    (engine,) = made.engines
    assert [(n, numbers) for _, n, numbers, _ in engine.calls] == [(2, [0, 1, 2])] * 3
    assert len({seed for seed, *_ in engine.calls}) == 3
    assert {s.max_new_tokens for *_, s in engine.calls} == {settings.max_new_tokens}
    rows = [row for row in lines(tmp_path / "run") if "length_mean" in row]
    assert [row["length_mean"] for row in rows] == [3.0] * 3
    assert [row["truncated"] for row in rows] == [0.0] * 3
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert {row["weights_version"] for row in samples} == {0, 1, 2}
    assert rows[0]["val/sampler_gap"] > 0.1  # its log-probs are no model's


def test_sample(world: Path, tmp_path: Path) -> None:
    made = Made()
    settings = SampleConfig(
        dtype="float32",
        model=str(world / "model"),
        data=str(world / "prompts.jsonl"),
        output=tmp_path / "out.jsonl",
        samples_per_prompt=2,
        max_new_tokens=6,
        seed=4,
        device="cpu",
    )
    sample(settings, make_engine=made)
    rows = [row for _, row in read_rows(settings.output)]
    expected = [[[40 + p, 60 + s, STOP] for s in range(2)] for p in range(9)]
    assert [row["completion_ids"] for row in rows] == expected
    assert rows[0]["log_probs"] == [-1.5, -1.5]
    (engine,) = made.engines
    assert [call[:3] for call in engine.calls] == [(4, 2, list(range(9)))]


def test_compare(world: Path, tmp_path: Path) -> None:
    """An engine for each model, as each has its own weights."""
    made = Made()
    settings = CompareConfig(
        dtype="float32",
        sft=str(world / "model"),
        models=(f"other={world / 'reference'}",),
        data=str(world / "prompts.jsonl"),
        judge="tests.training.rewards:by_length",
        output=tmp_path / "out",
        max_new_tokens=6,
        device="cpu",
    )
    compare(settings, make_engine=made)
    rows = [row for _, row in read_rows(settings.output / "answers.jsonl")]
    assert {row["way"] for row in rows} == {"SFT", "other"}
    assert {tuple(row["tokens"][0]) for row in rows} == {(40 + p, 60, STOP) for p in range(9)}
    assert [engine.model.source for engine in made.engines] == [
        settings.sft,
        str(world / "reference"),
    ]
