"""One base in bfloat16 under float32 adapters: the numbers of separate models kept the same way."""

import pytest
import torch

from prefloop.data.batches import pack
from prefloop.models import heads, shared
from prefloop.models.load import load_policy, load_reward_model, load_scorer
from prefloop.models.weights import Storage
from tests.models.plain import random_examples
from tests.tiny import tiny_model
from tests.training.one_base import built, copied, stepped
from tests.training.small import CPU, perturbed, write_world

HALF = Storage("bfloat16")
OPTIONS = {"trained": True, "lora_rank": 2, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The world with a policy that is stored in bfloat16, and scorers' adapters on it."""
    folder = tmp_path_factory.mktemp("half")
    write_world(folder)
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder / "model")
    return folder


@torch.no_grad()
def numbers(compute, *models):
    return [compute(model, pack(random_examples())) for model in models]


@torch.no_grad()
def given(source, target):
    """Gives a role the trained weights of another."""
    ours, theirs = source.named_trainable(), target.named_trainable()
    for mine, other in zip(sorted(ours), sorted(theirs), strict=True):
        theirs[other].copy_(ours[mine])
    return target


def test_each_role_has_the_bits_of_its_own_model(half):
    path, scorer = str(half / "model"), str(half / "rm_one")
    policy = load_policy(path, CPU, HALF, **OPTIONS)
    reward = shared.reward_role(policy, scorer, "reward_0", policy.tokenizer)
    critic = shared.critic_role(reward, "critic", policy.module.peft_config[shared.POLICY])
    policy.adapters = (shared.POLICY,)
    policy, critic = perturbed(policy), perturbed(critic)
    types = {p.dtype for n, p in policy.module.named_parameters() if "lora_" in n}
    assert types == {torch.float32}
    linear = [m.base_layer.weight.dtype for m in policy.hf.modules() if hasattr(m, "base_layer")]
    assert set(linear) == {torch.bfloat16}
    # policy and reference
    alone = given(policy, load_policy(path, CPU, HALF, **OPTIONS))
    base = load_policy(path, CPU, HALF)
    reference = shared.reference_of(policy)
    ours, own, before, frozen = numbers(heads.answer_log_probs, policy, alone, reference, base)
    assert torch.equal(ours, own)
    assert torch.equal(before, frozen)
    assert (ours - before).abs().max() > 0.1
    # reward model and critic: a scorer that goes on from the same adapter, which stays apart there
    apart = load_scorer(scorer, CPU, HALF, **OPTIONS)
    ours, own = numbers(heads.answer_scores, reward, apart)
    assert torch.equal(ours, own)  # fresh adapters add nothing
    merged = load_reward_model(scorer, CPU, HALF)
    assert (numbers(heads.answer_scores, merged)[0] - ours).abs().max() < 0.1  # rounded weights
    ours, own = numbers(heads.token_values, critic, given(critic, apart))
    assert torch.equal(ours, own)
    assert (ours - numbers(heads.token_values, reward)[0]).abs().max() > 0.1


def test_steps_have_the_bits_of_separate_models(half, tmp_path):
    """Three of policy and critic, gradients' norms too, with products in bfloat16."""
    changes = {"dtype": "bfloat16", "reward_model": None}
    changes |= {"reward_function": "tests.training.rewards:by_length"}
    one, config = built(half, tmp_path / "one", **changes)
    apart, other = built(half, tmp_path / "apart", share_base="never", **changes)
    copied(one, apart)
    assert stepped(one, config, 3) == stepped(apart, other, 3)


def test_steps_with_a_reward_model(half, tmp_path):
    """Alone its adapter is merged into weights that are then rounded: scores differ by that."""
    changes = {"dtype": "bfloat16", "reward_model": str(half / "rm_one"), "advantage": "rloo"}
    changes |= {"samples_per_prompt": 2}
    one, config = built(half, tmp_path / "one", **changes)
    apart, other = built(half, tmp_path / "apart", share_base="never", **changes)
    copied(one, apart)
    ours, theirs = stepped(one, config, 1)[0], stepped(apart, other, 1)[0]
    assert ours["objective/kl"] == theirs["objective/kl"]
    assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=0.05)
