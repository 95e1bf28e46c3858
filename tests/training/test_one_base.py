"""PPO with policy, critic and reward models on one base: the numbers of separate models."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.models import adapters, heads, selftest, shared
from prefloop.models.load import load_policy, load_reward_model
from prefloop.models.trunk import trunk_of
from prefloop.rewards.scorers import Scored, together
from prefloop.training import planned_roles, planning, ppo
from prefloop.training.tracing import WEIGHTS, Part
from tests.models.plain import random_examples
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.one_base import LORA, built, copied, placed, stepped
from tests.training.small import CPU, assert_same_run, only_checkpoint, train


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    """The world with reward models that are adapters on its policy, one on its upper layer."""
    train("reward", world, world / "rm_upper", **LORA, **UPPER)
    for seed, name in enumerate(("rm_lora", "rm_lora2", "rm_lora3")):
        train("reward", world, world / name, seed=seed, **LORA)
    return world


UPPER = {"lora_targets": (r".*\.layers\.1\..*_proj",)}
CASES = {
    "critic": {},
    "upper layers": {"reward_model": "rm_upper", **UPPER},
    "upper layers, recomputed": {
        "reward_model": "rm_upper", "gradient_checkpointing": True, **UPPER,
    },
    "recomputed": {"gradient_checkpointing": True},
    "padded": {},
    "padded, recomputed": {"gradient_checkpointing": True},
    "leave-one-out": {"advantage": "rloo", "samples_per_prompt": 2},
    "several": {"reward_model": ("rm_lora", "rm_lora2", "rm_lora3")},
    "lower bound": {
        "reward_model": ("rm_lora", "rm_lora2", "rm_lora3"), "reward_ensemble": "lower-bound",
    },
    "whole reward model": {"reward_model": "rm"},
    "function": {"reward_model": None, "reward_function": "tests.training.rewards:by_length"},
    "from an adapter": {"model": "sft_lora"},
    "value model": {"value_model": "rm_lora2"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_separate_models(case, judged, tmp_path, monkeypatch):
    """Three steps in two iterations: every loss, metric and norm to 1e-6 of its size."""
    if "padded" in case:
        monkeypatch.setattr(selftest, "_is_packable", lambda *_: False)
    if case == "from an adapter" and not (judged / "sft_lora").exists():
        train("sft", judged, judged / "sft_lora", **LORA)
    changes = placed(judged, CASES[case])
    one, config = built(judged, tmp_path / "one", **changes)
    apart, other = built(judged, tmp_path / "apart", share_base="never", **changes)
    models = [m for m in (one.policy, one.critic) if m]
    assert all(model.packed == ("padded" not in case) for model in models)
    owners = {id(model.hf) for model in models}
    assert len(owners) == (2 if case == "whole reward model" else 1)
    assert (trunk_of(one.policy) is not None) == ("upper" in case)
    copied(one, apart)
    ours, theirs = stepped(one, config, 3), stepped(apart, other, 3)
    assert len(ours) == 3
    for mine, separate in zip(ours, theirs, strict=True):
        assert mine.keys() == separate.keys()
        for name, value in mine.items():
            few = 5e-6 if name.startswith("objective/") else 1e-6  # sums over an answer's tokens
            assert value == pytest.approx(separate[name], rel=2e-5, abs=few), name
    if case in ("several", "lower bound"):
        assert ours[0]["objective/scores/spread"] > 0


def test_scores_and_values_and_gradients(judged):
    """Each role's numbers on one batch, beside its own model's."""
    torch.manual_seed(0)
    policy = load_policy(str(judged / "model"), CPU, trained=True, lora_rank=2)
    path = str(judged / "rm_lora")
    assert shared.stands_on_base(str(judged / "model"), path)
    reward = shared.reward_role(policy, path, "reward", policy.tokenizer)
    policy.adapters = (shared.POLICY,)
    alone = load_reward_model(path, CPU)
    batch = pack(random_examples())
    with torch.no_grad():
        ours, theirs = (heads.answer_scores(model, batch) for model in (reward, alone))
        before = heads.answer_log_probs(policy, batch)
        base = heads.answer_log_probs(load_policy(str(judged / "model"), CPU), batch)
        reference = heads.answer_log_probs(shared.reference_of(policy), batch)
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(reference, base)
    assert (before - base).abs().max() < 1e-6  # fresh adapters add nothing
    lora = policy.module.peft_config[shared.POLICY]
    critic = shared.critic_role(reward, "critic", lora)
    heads.token_values(critic, batch).sum().backward()
    learning = critic.named_trainable()
    assert {name.split(".")[-2] for name in learning} == {"critic", "score"}
    assert all(p.grad is not None for p in learning.values())
    assert all(p.grad is None for p in policy.trainable())


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ("lm_head", "embed_tokens")}, {"lora_targets": ("q_proj", "lm_head")}],
    ids=str,
)
def test_the_reference_is_the_base_whatever_is_trained(options, tmp_path):
    """Heads and embeddings that are trained whole, or have adapters, are off with the rest."""
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU, trained=True, lora_rank=2, **options)
    batch = pack(random_examples())
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.1)
        base = heads.answer_log_probs(load_policy(str(tmp_path), CPU), batch)
        moved = heads.answer_log_probs(policy, batch)
        reference = heads.answer_log_probs(shared.reference_of(policy), batch)
        assert torch.equal(heads.answer_log_probs(policy, batch), moved)  # as it was before
    assert (moved - base).abs().max() > 1e-2
    assert torch.equal(reference, base)


def test_the_saved_critic_is_one_adapter(judged, tmp_path):
    """It loads in plain PEFT, and gives the values of the role."""
    method, config = built(judged, tmp_path / "run")
    stepped(method, config, 2)
    method.export(tmp_path / "out")
    folder = tmp_path / "out" / "value_model"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    base = AutoModelForSequenceClassification.from_pretrained(judged / "model", num_labels=1)
    with adapters.quiet():
        plain = PeftModel.from_pretrained(base, folder).eval()
    ids = [5, 6, 7, 8, 9]
    with torch.no_grad():
        states = plain.get_base_model().model(torch.tensor([ids])).last_hidden_state[0]
        expected = plain.get_base_model().score(states).squeeze(-1)
        batch = pack([Example(tuple(ids[:2]), (tuple(ids[2:]),), ((True,) * 3,))])
        ours = heads.token_values(method.critic, batch) + heads.score_mean(method.critic)
    torch.testing.assert_close(ours, expected[1:4], rtol=1e-5, atol=1e-5)
    policy = load_policy(str(tmp_path / "out" / "model"), CPU)
    with torch.no_grad():
        ours, again = (heads.answer_log_probs(m, batch) for m in (method.policy, policy))
    torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-5)


def test_the_shared_run_is_planned(judged):
    """The base once, in float32; the reward model and the critic are an adapter and a head each."""
    _, config = built(judged, judged / "planned")
    roles = planned_roles.roles_of(config, CPU)
    assert [role.on for role in roles] == [None, "policy", "policy"]
    parts = planning.full_plan(ppo.WORK, config, roles, CPU).parts
    sizes = {name: parts[Part(name, WEIGHTS)] for name in ("policy", "reward model", "critic")}
    method = load_policy(str(judged / "model"), CPU, trained=True, lora_rank=2)
    adapter = sum(p.nbytes for p in method.trainable())
    width = method.hf.config.hidden_size
    assert sizes["reward model"] == sizes["critic"] == adapter + 4 * width
    assert sizes["policy"] >= shared.base_bytes(method) + adapter


def test_one_line_says_what_is_shared(judged, tmp_path, capsys):
    built(judged, tmp_path / "one")
    told = capsys.readouterr().err
    assert "carries policy, reward model" in told
    assert "and critic: saves" in told
    built(judged, tmp_path / "apart", share_base="never")
    assert "carries" not in capsys.readouterr().err


def test_a_run_goes_on_in_mid_iteration(judged, tmp_path):
    """Bit for bit, policy and critic, though they share the module."""
    changes = LORA | {"save_every": 1, "keep_checkpoints": 9, "batch_size": 3, "ppo_epochs": 2}
    changes |= {"reward_model": str(judged / "rm_lora"), "model": str(judged / "model")}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train("ppo", judged, whole, **changes)
    only_checkpoint(whole, again, 3)
    train("ppo", judged, again, **changes)
    assert_same_run(whole, again)


@pytest.mark.parametrize(("how", "right"), [("mean", [2.0, 3.0]), ("lower-bound", [1.0, 3.0])])
def test_several_scores_are_one(how, right):
    """By hand: 1 and 3 deviate by 1 from their mean, 3 and 3 not at all."""
    scorers = [lambda *_, s=s: Scored(s, {}) for s in ([1.0, 3.0], [3.0, 3.0])]
    found = together(("a", "b"), scorers, how)([], [], [])
    assert found.scores == right
    assert found.parts == {"a": [1.0, 3.0], "b": [3.0, 3.0], "spread": [1.0, 0.0]}
