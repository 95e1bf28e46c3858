"""What can be checked against the enumeration without learning anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefloop.config import PPOConfig
from prefloop.data.batches import to_batches
from prefloop.evaluation.frontier import best_of_n, best_of_n_kl
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.losses.masked import segment_sum
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.training import ppo
from tests.oracle import world as w
from tests.oracle.world import World, kl, world

CPU = torch.device("cpu")
WORLDS = pytest.mark.parametrize("stopping", [False, True], ids=["fixed", "stopping"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    at = tmp_path_factory.mktemp("worlds")
    return {stopping: w.save_reference(at / str(stopping), stopping) for stopping in (False, True)}


@WORLDS
def test_everything_is_listed(stopping: bool) -> None:
    here = world(stopping)
    probs = here.log_ref.exp()
    assert len(set(here.texts)) == len(here.texts) == (8**5 if not stopping else 7**4 * 8 + 400)
    torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64))
    entropy = -(probs * here.log_ref).sum(1)
    assert bool((entropy < 0.75 * 5 * math.log(8)).all())  # pi_ref has preferences of its own
    assert here.objective(here.log_ref, beta=1.0) == pytest.approx(0, abs=1e-9)


@WORLDS
def test_the_optimum_is_the_best_policy(stopping: bool) -> None:
    here = world(stopping)
    best, distance = here.optimum(0.5)
    tilted = (here.log_ref + here.reward / 0.5).log_softmax(1)
    assert here.objective(tilted, 0.5) == pytest.approx(best, abs=1e-9)
    assert float(kl(tilted, here.log_ref)) == pytest.approx(distance)
    for scale in (0.3, 0.45, 0.55, 1.0):
        other = (here.log_ref + here.reward / scale).log_softmax(1)
        assert here.objective(other, 0.5) < best


@WORLDS
def test_answers_that_share_a_prompt_have_the_enumerated_log_probs(
    stopping: bool, folders: dict[bool, str]
) -> None:
    here, policy = world(stopping), load_policy(folders[stopping], CPU)
    drawn = here.draw(16, seed=1)
    (batch,) = to_batches(w.examples(here, drawn), 8192, CPU)
    with torch.no_grad():
        tokens = answer_log_probs(policy, batch)
    ours = segment_sum(tokens, batch.target_answer, batch.answers).view(4, 16)
    expected = here.log_ref.gather(1, drawn).float()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@WORLDS
def test_the_engine_draws_from_the_enumerated_policy(
    stopping: bool, folders: dict[bool, str]
) -> None:
    here, count = world(stopping), 2000
    numbers, log_probs = sampled(here, load_policy(folders[stopping], CPU), count)
    expected = here.log_ref.gather(1, numbers).float()
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-4)
    # Of 4 x 2000 draws, means of what is known exactly: within 4 standard errors.
    probs = here.log_ref.exp()
    for known in (here.reward, here.log_ref, here.lengths.expand(4, -1).double()):
        mean = (probs * known).sum(1, keepdim=True)
        error = ((probs * (known - mean).square()).sum(1) / count).sqrt()
        found = known.gather(1, numbers).mean(1)
        assert bool(((found - mean.squeeze(1)).abs() <= 4 * error + 1e-9).all())


def sampled(here: World, policy: LoadedModel, count: int) -> tuple[Tensor, Tensor]:
    """Numbers and log-probs [P, count] of the engine's answers."""
    stops = frozenset({w.STOP} if here.stopping else ())
    sampling = Sampling(max_new_tokens=w.LENGTH, stop_token_ids=stops)
    prompts = [example.prompt for example in w.examples(here, torch.zeros(4, 0, dtype=torch.long))]
    groups = Engine(policy, max_concurrent=512).generate(prompts, count, sampling, seed=3)
    number = {answer: i for i, answer in enumerate(here.tokens)}
    numbers = [[number[sample.tokens] for sample in group] for group in groups]
    log_probs = [[sum(sample.log_probs) for sample in group] for group in groups]
    return torch.tensor(numbers), torch.tensor(log_probs)


def best_of(here: World, n: int) -> Tensor:
    """log P_n(y) [P, L] of the best by r of n draws of pi_ref: F(r)^n - F(below r)^n, F of pi_ref.

    No two answers to a prompt have equal rewards.
    """
    rows = []
    for log_ref, reward in zip(here.log_ref, here.reward, strict=True):
        order = reward.argsort()
        assert bool((reward[order].diff() > 0).all())
        below = torch.cat([torch.zeros(1), log_ref[order].exp().cumsum(0)]).clamp(max=1)
        rows.append(below.pow(n).diff().clamp(min=1e-300).log()[order.argsort()])
    return torch.stack(rows)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_stays_within_its_bound(n: int) -> None:
    here = world()
    distance = float(kl(best_of(here, n), here.log_ref))
    assert distance <= math.log(n) - (n - 1) / n == best_of_n_kl(n)
    assert distance >= 0.95 * best_of_n_kl(n)  # which is reached as answers grow many


def test_best_of_n_earns_what_the_enumeration_says(folders: dict[bool, str]) -> None:
    here = world()
    numbers, _ = sampled(here, load_policy(folders[False], CPU), 1000)
    scores = here.reward.gather(1, numbers).tolist()
    expected = (best_of(here, 4).exp() * here.reward).sum(1)
    for row, exact in zip(scores, expected.tolist(), strict=True):
        assert best_of_n([row], [row], 4).mean == pytest.approx(exact, abs=0.1)


@WORLDS
def test_ppo_reports_the_enumerated_kl_and_objective(
    stopping: bool, folders: dict[bool, str], tmp_path: Path
) -> None:
    """The second iteration's samples come from the weights of the checkpoint just before it.

    A reference that moved along with the policy would report a KL of 0.
    """
    here, beta, count = world(stopping), 0.5, 512
    config = PPOConfig(
        **w.ppo_settings(folders[stopping], tmp_path, stopping, beta, prompts=4),
        batch_size=4,
        samples_per_prompt=count,
        ppo_epochs=4,
        max_steps=5,
        warmup=0.0,
        lr=5e-3,
        save_every=4,
    )
    log_pi = here.log_probs(w.at_step(ppo.run(config), 4))
    line: dict[str, Any] = json.loads((config.output / "metrics.jsonl").read_text().split("\n")[4])
    ratio = log_pi - here.log_ref
    assert float(kl(log_pi, here.log_ref)) > 0.05
    for name, known in {
        "objective/kl": ratio,
        "objective/scores": here.reward,
        "objective/rlhf_reward": here.reward - beta * ratio,
        "objective/entropy": -log_pi,
        "length_mean": here.lengths.double(),
    }.items():
        mean = (log_pi.exp() * known).sum(1, keepdim=True)
        spread = (log_pi.exp() * (known - mean).square()).sum(1)
        error = float((spread / count).sum().sqrt()) / 4
        assert abs(line[name] - float(mean.mean())) <= 4 * error + 1e-6, name
