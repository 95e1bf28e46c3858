"""Answers sampled while the iteration before trains: by weights one iteration old, never others."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.overlap import measured

from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.generation.ahead import Ahead
from prefloop.generation.protocol import Prompts, Sample
from prefloop.generation.sampler import Sampling
from prefloop.training import ppo
from tests.rollouts.copies import Copied
from tests.rollouts.stand_in import serving
from tests.training.small import REWARDS, config, lines, policy, write_world

AHEAD: dict[str, Any] = {
    "rollout_engine": "http://127.0.0.1:1",
    "rollout_ahead": True,
    "importance_cap": 2.0,
    "ppo_epochs": 2,
    "max_steps": 6,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.mark.slow
def test_the_next_answers_are_sampled_while_this_iteration_trains(
    world: Path, tmp_path: Path
) -> None:
    """The second iteration's are not given before a step of the first has been logged."""
    log = tmp_path / "run" / "metrics.jsonl"

    class Waits(Copied):
        calls = 0

        def generate(
            self,
            prompts: Prompts,
            n: int,
            sampling: Sampling,
            seed: int,
            numbers: Sequence[int] | None = None,
            on_done: Callable[[Sample], None] | None = None,
        ) -> list[list[Sample]]:
            self.calls += 1
            if self.calls == 2:
                logged = (log.exists() or threading.Event().wait(0.05) for _ in range(2400))
                assert any(logged)
            return super().generate(prompts, n, sampling, seed, numbers, on_done)

    ppo.run(config("ppo", world, tmp_path / "run", **AHEAD), Waits)
    samples = lines(tmp_path / "run", "samples.jsonl")
    versions = {row["step"]: row["weights_version"] for row in samples}
    assert list(versions.values()) == [0, 0, 1]
    first, second, third = (row for row in lines(tmp_path / "run") if "val/importance" in row)
    assert first["val/sampler_gap"] < 1e-5
    assert first["val/importance"] == pytest.approx(1.0, abs=1e-5)
    assert min(second["val/sampler_gap"], third["val/sampler_gap"]) > 1e-4  # of older weights


@pytest.mark.slow
def test_a_monitor_waits_for_what_is_being_sampled(world: Path, tmp_path: Path) -> None:
    """It samples by the newest weights, and the next iteration's answers stay what they were."""
    more = {"monitor": f"{REWARDS}:by_length", "monitor_data": str(world / "prompts.jsonl")}
    more |= {"eval_data": str(world / "prompts.jsonl"), "eval_every": 1}
    for name, extra in (("plain", {}), ("watched", more | {"monitor_steps": 1})):
        ppo.run(config("ppo", world, tmp_path / name, **AHEAD | extra), Copied)
    plain, watched = (lines(tmp_path / name, "samples.jsonl") for name in ("plain", "watched"))
    assert plain == watched


@pytest.mark.slow
def test_the_benchmark_measures_both(world: Path, tmp_path: Path) -> None:
    with serving(world / "model") as (server,):
        sizes = {"iterations": 3, "prompts": 2, "tokens": 3, "repeats": 1}
        asked = Namespace(model=str(world / "model"), rollout_engine=server.url, **sizes)
        told = measured(asked, tmp_path)
        # 8 answers an iteration, and one to see what log-probs the server gives, in each run
        assert len(server.asked) == 2 * (1 + 3 * 2 * 4)
    seconds = told["seconds an iteration"]
    (sampling,), (waits,), (ahead,) = (seconds[n] for n in ("sampling", "waits", "ahead"))
    assert 0 < sampling < waits  # an iteration's sampling lies between two scorings
    assert told["gain"] == pytest.approx(waits / ahead)
    assert told["gain at most"] == pytest.approx(waits / max(sampling, waits - sampling))


def test_what_was_begun_is_given_once_and_for_its_turn(world: Path) -> None:
    engine = Ahead(Copied(config("ppo", world, world / "unused"), model := policy(world)))
    sampling = Sampling(max_new_tokens=3)
    engine.sync(model, 4)
    engine.start(5, lambda other: other.generate([[5, 6]], 2, sampling, 1))
    engine.sync(model, 6)  # waits
    assert engine.take(6) is None
    begun = engine.take(5)
    assert begun is not None
    assert {s.weights_version for s in begun[0]} == {4}
    assert engine.take(5) is None
    again = engine.generate([[5, 6]], 2, sampling, 1)
    assert [s.tokens for s in again[0]] == [s.tokens for s in begun[0]]
    engine.start(7, lambda other: other.generate([[]], 1, sampling, 1))
    with pytest.raises(UserError, match="has no tokens"):
        engine.take(7)


def test_old_answers_must_be_corrected(world: Path) -> None:
    settings = config("ppo", world, world / "unused", **AHEAD | {"importance_cap": 0.0})
    with pytest.raises(UserError, match="--rollout-ahead is read only with --importance-cap"):
        validate(settings)
