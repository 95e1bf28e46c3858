"""The reference that moves: what it is after some iterations, and what is measured from it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.config.checks import problems
from prefloop.errors import UserError
from prefloop.training.ppo import build
from prefloop.training.reference import MovingReference
from prefloop.training.start import start
from tests.parity.plain import token_log_probs
from tests.training.small import checkpoint, config, lines, perturbed, policy, train

RATE = 0.25


def test_an_average_by_hand(world):
    """0 then 1 then 5, at a quarter: 0.25, and 0.25 + 0.25 x 4.75 = 1.4375."""
    model = policy(world)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.fill_(0.0)
    moving = MovingReference(model, RATE)
    handed_out = dict(moving.average)
    for value, average in ((1.0, 0.25), (5.0, 1.4375)):
        with torch.no_grad():
            for parameter in model.trainable():
                parameter.fill_(value)
        moving.follow()
        assert all(t.eq(average).all() for t in moving.average.values())
    assert all(t.eq(0).all() for t in handed_out.values())
    places = [p.data_ptr() for p in model.trainable()]
    with moving.in_place():
        assert all(p.eq(1.4375).all() for p in model.trainable())
    with pytest.raises(UserError), moving.in_place():
        raise UserError("whatever goes wrong within")
    assert [p.data_ptr() for p in model.trainable()] == places
    assert all(p.eq(5).all() for p in model.trainable())


def test_small_moves_of_weights_in_bfloat16_add_up(world):
    """1000 moves of 0.001 towards 1 come to 1 - 0.999^1000 = 0.632; bfloat16 would stop at 0.25."""
    model = policy(world)
    for parameter in model.trainable():
        parameter.data = torch.zeros(2, dtype=torch.bfloat16)
    moving = MovingReference(model, 0.001)
    for parameter in model.trainable():
        parameter.data = torch.ones(2, dtype=torch.bfloat16)
    for _ in range(1000):
        moving.follow()
    for average in moving.average.values():
        assert average.tolist() == pytest.approx([1 - 0.999**1000] * 2, rel=1e-4)
    with moving.in_place():
        assert {p.dtype for p in model.trainable()} == {torch.bfloat16}


def test_the_penalty_is_measured_from_the_average_and_kl_from_the_start(world, tmp_path):
    """A policy moved by hand, against plain Transformers with the average of its two weights."""
    changes = {"batch_size": 3, "kl_coef": 0.3, "temperature": 0.8, "samples_per_prompt": 2}
    settings = config("ppo", world, tmp_path / "run", ema_reference=RATE, **changes)
    run, device = start(settings, "ppo")
    ppo = build(settings, device, run)
    plain = {
        name: AutoModelForCausalLM.from_pretrained(world / "model") for name in "start mean".split()
    }
    first = {name: tensor.clone() for name, tensor in ppo.policy.module.state_dict().items()}
    perturbed(ppo.policy, 0.3)
    ppo.sampler.moving.follow()
    now = ppo.policy.module.state_dict()
    mean = {name: first[name] + RATE * (now[name] - first[name]) for name in first}
    plain["mean"].load_state_dict(mean)
    step = next(iter(ppo.steps(0)))
    rollouts = ppo.rollouts
    answers = [(e.prompt, answer) for e in rollouts.examples for answer in e.answers]
    with torch.no_grad():
        found = {
            name: [token_log_probs(model, *answer, 0.8) for answer in answers]
            for name, model in plain.items()
        }
    for row, expected in enumerate(found["mean"]):
        mine = rollouts.ref_log_probs[row, : len(expected)]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    sums = (rollouts.log_probs * rollouts.mask).sum(1).mean().item()
    kl = {name: sums - sum(float(x.sum()) for x in of) / 6 for name, of in found.items()}
    assert kl["start"] - 0.1 > kl["mean"] > 0.1
    assert step.metrics["objective/kl"] == pytest.approx(kl["start"], rel=1e-3)
    assert step.metrics["objective/kl_moving"] == pytest.approx(kl["mean"], rel=1e-3)
    assert step.metrics["objective/non_score_reward"] == pytest.approx(-0.3 * kl["mean"], rel=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_follows_after_each_iteration(lora_rank, world, tmp_path):
    """At rate 1 it is the policy that samples: no KL is paid, while the one to the start grows."""
    changes = {
        "batch_size": 3,
        "ppo_epochs": 2,
        "lr": 1e-2,
        "lora_rank": lora_rank,
        "save_every": 1,
    }
    train("ppo", world, tmp_path / "run", ema_reference=1.0, keep_checkpoints=9, **changes)
    begins = [row for row in lines(tmp_path / "run") if "objective/kl" in row]
    assert len(begins) == 3
    assert all(abs(row["objective/kl_moving"]) < 1e-5 for row in begins)
    assert abs(begins[-1]["objective/kl"]) > 1e-3
    first, second, third = (checkpoint(tmp_path / "run", step) for step in (1, 2, 3))
    for name, tensor in second["method"]["reference"].items():
        assert torch.equal(tensor, second["models"]["policy"][name])
        assert torch.equal(tensor, third["method"]["reference"][name])
    moved = second["method"]["reference"].items()
    assert any(not torch.equal(t, first["method"]["reference"][n]) for n, t in moved)


@pytest.mark.parametrize(
    "changes", [{"ref_model": "reference"}, {"kl_target": 6.0}, {"kl_coef": 0.0}], ids=str
)
def test_what_would_hide_what_it_does_is_refused(changes, world, tmp_path):
    settings = config("ppo", world, tmp_path / "run", ema_reference=RATE, **changes)
    assert any("--ema-reference moves what a penalty" in problem for problem in problems(settings))
