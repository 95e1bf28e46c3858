"""The trainers against the exact optimum: what they reach of J*, at which KL, with which reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prefloop.config import DPOConfig, PPOConfig
from prefloop.data.tokenize import Example
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import MakeEngine
from prefloop.models.load import load_policy
from prefloop.runs import Run
from prefloop.training import loop, ppo
from prefloop.training.preference import Preference
from prefloop.training.start import start
from tests.oracle import world as w
from tests.oracle.world import World, kl, world
from tests.rollouts.copies import Copied

pytestmark = pytest.mark.timeout(900)
SLOW = {"marks": pytest.mark.slow}
RANKED = 8  # answers in a ranking
LEARNING: dict[str, Any] = {"lr_schedule": "cosine", "warmup": 0.02, "keep_checkpoints": 9}


class Reached(NamedTuple):
    """A trained policy against the optimum."""

    share: float  # J / J*
    kl_share: float  # KL / KL*
    correlation: float  # of beta log(pi / pi_ref) with r, under pi_ref, both centred per prompt
    slope: float  # of the first on the second


def reached(here: World, run: Run, beta: float, every: int) -> Reached:
    """What the run's policy reached; no policy on its way may have passed the optimum."""
    best, distance = here.optimum(beta)
    for step in range(every, run.record["steps"], every):
        assert here.objective(here.log_probs(w.at_step(run, step)), beta) <= best + 1e-4
    log_pi = here.log_probs(w.load(run.model))
    gained = here.objective(log_pi, beta)
    assert gained <= best + 1e-4
    implicit, probs = beta * (log_pi - here.log_ref), here.log_ref.exp()
    implicit = implicit - (probs * implicit).sum(1, keepdim=True)

    def covariance(a: Tensor, b: Tensor) -> float:
        return float((probs * a * b).sum())

    variances = covariance(implicit, implicit), covariance(here.reward, here.reward)
    both = covariance(implicit, here.reward)
    result = Reached(
        gained / best,
        float(kl(log_pi, here.log_ref)) / distance,
        both / (variances[0] * variances[1]) ** 0.5,
        both / variances[1],
    )
    print(run.record["command"], beta, result)  # shown by pytest -rP
    return result


def learn_ppo(
    folder: Path,
    beta: float,
    stopping: bool = False,
    make_engine: MakeEngine = in_process,
    **settings: Any,
) -> Reached:
    every = settings["max_steps"] // 4
    config = PPOConfig(
        **w.ppo_settings(w.save_reference(folder / "ref", stopping), folder, stopping, beta, 32),
        save_every=every,
        batch_size=8,
        samples_per_prompt=32,
        num_minibatches=4,
        ppo_epochs=2,
        lr=1e-3,
        **LEARNING,
        **settings,
    )
    return reached(world(stopping), ppo.run(config, make_engine), beta, every)


def rankings(here: World, count: int) -> list[Example]:
    """`count` rankings a prompt of answers drawn from pi_ref, by annotators who err.

    Sorting by r plus Gumbel noise is Plackett-Luce, each pair of which is Bradley-Terry:
    P(a above b) = sigmoid(r_a - r_b).
    """
    drawn = here.draw(count * RANKED, seed=2)
    uniform = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(3))
    seen = here.reward.gather(1, drawn) - (-uniform.log()).log()
    groups, order = drawn.view(4, count, RANKED), seen.view(4, count, RANKED).argsort(2).flip(2)
    ranked = groups.gather(2, order).unbind(1)
    return [example for numbers in ranked for example in w.examples(here, numbers, tiers=True)]


def learn_dpo(folder: Path, beta: float, **settings: Any) -> Reached:
    here, every = world(), settings["max_steps"] // 4
    config = DPOConfig(
        model=w.save_reference(folder / "ref"),
        data="made in memory",
        output=folder / "run",
        device="cpu",
        beta=beta,
        batch_size=256,
        save_every=every,
        lr=2e-3,
        **LEARNING,
        **settings,
    )
    examples = rankings(here, count=config.max_steps * 256 // 4)  # each is seen once
    run, device = start(config, "dpo")
    with run:
        policy = load_policy(config.model, device)
        method = Preference(config, policy, examples, [], run.directory / "reference.safetensors")
        loop.train(method, config, run)
    return reached(here, run, beta, every)


@pytest.mark.parametrize("beta", [1.0, pytest.param(0.5, **SLOW), pytest.param(0.25, **SLOW)])
def test_ppo(beta: float, tmp_path: Path) -> None:
    result = learn_ppo(tmp_path, beta, max_steps=800)
    assert result.share >= 0.95, result
    assert 0.75 <= result.kl_share <= 1.25, result


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "steps"), [(1.0, 400), (0.5, 400), (0.25, 800)])
def test_dpo(beta: float, steps: int, tmp_path: Path) -> None:
    """The smaller beta is, the further the optimum lies from the answers that were ranked."""
    result = learn_dpo(tmp_path, beta, max_steps=steps)
    assert result.share >= 0.88, result
    assert 0.75 <= result.kl_share <= 1.25, result
    assert result.correlation >= 0.95, result
    assert 0.9 <= result.slope <= 1.1, result


@pytest.mark.slow
def test_ppo_where_answers_may_stop(tmp_path: Path) -> None:
    result = learn_ppo(tmp_path, 0.5, stopping=True, max_steps=800)
    assert result.share >= 0.95, result
    assert 0.75 <= result.kl_share <= 1.25, result


@pytest.mark.slow
def test_answers_one_iteration_old(tmp_path: Path) -> None:
    """Sampled while the iteration before trains, and corrected by importance weights."""
    more = {"rollout_engine": "http://127.0.0.1:1", "rollout_ahead": True, "importance_cap": 2.0}
    result = learn_ppo(tmp_path, 0.5, make_engine=Copied, max_steps=800, **more)
    assert result.share >= 0.95, result
    assert 0.75 <= result.kl_share <= 1.25, result


@pytest.mark.slow
def test_rloo(tmp_path: Path) -> None:
    result = learn_ppo(tmp_path, 0.5, advantage="rloo", max_steps=800)
    assert result.share >= 0.95, result
    assert 0.75 <= result.kl_share <= 1.25, result


@pytest.mark.slow
def test_plackett_luce_dpo(tmp_path: Path) -> None:
    result = learn_dpo(tmp_path, 0.5, loss="plackett-luce", max_steps=400)
    assert result.share >= 0.88, result
    assert result.correlation >= 0.95, result
    assert 0.9 <= result.slope <= 1.1, result
