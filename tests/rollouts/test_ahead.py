"""Answers sampled while the iteration before trains: by weights one iteration old, never others."""

from __future__ import annotations

import json
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.overlap import measured

from prefloop.cli import main
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.generation.ahead import Ahead, Begun
from prefloop.generation.protocol import EngineConfig, Prompts, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel
from prefloop.runs import newest_checkpoint
from prefloop.training import ppo
from tests.ranks import on_ranks
from tests.rollouts.copies import Copied
from tests.rollouts.stand_in import serving
from tests.training.small import (
    REWARDS,
    assert_close_runs,
    assert_same_run,
    config,
    flags,
    lines,
    only_checkpoint,
    policy,
    settings,
    write_world,
)

AHEAD: dict[str, Any] = {
    "rollout_engine": "http://127.0.0.1:1",
    "rollout_ahead": True,
    "importance_cap": 2.0,
    "ppo_epochs": 2,
    "max_steps": 6,
}
SAVING = {"save_every": 1, "keep_checkpoints": 99}


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


MORE = {  # all that moves from iteration to iteration
    "kl_target": 0.01,
    "normalize_scores": True,
    "reward_function": f"{REWARDS}:random",
    "max_steps": 8,
    "eval_fraction": 0.3,
    "eval_every": 3,
}


def test_every_checkpoint_leads_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    """In the middle of an iteration, at its end, and in the last, which samples for none."""
    whole = tmp_path / "whole"
    ppo.run(config("ppo", world, whole, **AHEAD | MORE | SAVING), Copied)
    for step in (2, 5, 7):
        again = tmp_path / f"from-{step}"
        only_checkpoint(whole, again, step)
        ppo.run(config("ppo", world, again, **AHEAD | MORE), Copied)
        assert_same_run(whole, again)


@pytest.mark.slow
def test_sigterm_waits_for_what_is_being_sampled(world: Path, tmp_path: Path) -> None:
    """It comes while servers sample for the third iteration."""

    def ends(path: str, body: dict[str, Any], before: int) -> None:
        if path == "/v1/completions" and before == 1 + 2 * 9 + 3:  # one is a look at log-probs
            os.kill(os.getpid(), signal.SIGTERM)

    def run(output: Path, url: str) -> int:
        return main(
            ["ppo", *flags(settings("ppo", world, output, **AHEAD | {"rollout_engine": url}))]
        )

    with serving(world / "model") as (server,):
        assert run(tmp_path / "whole", server.url) == 0
    with serving(world / "model", fault=ends) as (server,):
        assert run(tmp_path / "run", server.url) == 143
    kept = newest_checkpoint(tmp_path / "run")
    assert kept is not None
    assert 2 <= int(kept.name.removeprefix("step-")) < 6
    with serving(world / "model") as (server,):
        assert run(tmp_path / "run", server.url) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class Fails(Copied):
    """Its third answers do not come."""

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        super().__init__(config, model)
        self.calls = 0

    def generate(self, prompts: Prompts, *others: Any, **more: Any) -> list[list[Sample]]:
        self.calls += 1
        if self.calls == 3:
            raise UserError("no server is there")
        return super().generate(prompts, *others, **more)


@pytest.mark.slow
def test_no_checkpoint_lacks_what_was_being_sampled(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it does not come the run goes on from before it was begun."""
    ppo.run(config("ppo", world, tmp_path / "whole", **AHEAD), Copied)
    capsys.readouterr()
    for name, saving in (("saved", {"save_every": 2}), ("never", {})):
        with pytest.raises(UserError, match="no server is there"):
            ppo.run(config("ppo", world, tmp_path / name, **AHEAD | saving), Fails)
        kept = newest_checkpoint(tmp_path / name)
        assert (kept and kept.name) == ("step-2" if saving else None)
        ppo.run(config("ppo", world, tmp_path / name, **AHEAD), Copied)
        assert_same_run(tmp_path / "whole", tmp_path / name)
    told = capsys.readouterr().err
    assert "saved: no server is there; it goes on from step 2" in told
    assert "never: no server is there; it goes on from step 0" in told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_checkpoints_of_two_ranks_lead_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    """And on one rank to the same but for rounding."""
    with serving(world / "model") as (server,):
        asked = AHEAD | {"rollout_engine": server.url, "kl_target": 0.01}
        jobs: list[dict[str, Any]] = [{"command": "ppo", "to": "whole"} | asked | SAVING]
        for step in (2, 3):
            jobs.append({"copy": ["whole", f"from-{step}", step]})
            jobs.append({"command": "ppo", "to": f"from-{step}"} | asked)
        words = ["-m", "tests.training.on_rank", str(world), str(tmp_path)]
        outcomes = on_ranks(2, *words, *map(json.dumps, jobs))
        assert [code for _, code in outcomes] == [0, 0], outcomes
        only_checkpoint(tmp_path / "whole", tmp_path / "alone", 3)
        ppo.run(config("ppo", world, tmp_path / "alone", **asked))
    for step in (2, 3):
        assert_same_run(tmp_path / "whole", tmp_path / f"from-{step}")
    assert_close_runs(tmp_path / "whole", tmp_path / "alone")


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
    there = threading.Event()
    engine.start(7, lambda other: begun if there.wait() else [])
    assert engine.begun is not None
    with pytest.raises(UserError, match="still being sampled"):
        engine.begun.kept(wait=False)
    there.set()
    kept = engine.begun.kept(wait=True)
    assert Begun.again(kept).groups.result() == begun == engine.take(7)
    engine.start(7, lambda other: other.generate([[]], 1, sampling, 1))
    with pytest.raises(UserError, match="has no tokens"):
        engine.take(7)


def test_old_answers_must_be_corrected(world: Path) -> None:
    settings = config("ppo", world, world / "unused", **AHEAD | {"importance_cap": 0.0})
    with pytest.raises(UserError, match="--rollout-ahead is read only with --importance-cap"):
        validate(settings)
