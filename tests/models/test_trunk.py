"""Roles on one base: the layers below all adapters are computed once, to the bit."""

import pytest
import torch

from prefloop.data.batches import pack
from prefloop.models import lean, shared
from prefloop.models.heads import answer_log_probs, token_values
from prefloop.models.load import load_policy
from prefloop.models.trunk import trunk_of
from tests.models.plain import random_examples
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
LAYERS = 4


def upper(first):
    """A pattern of the projections of the layers from the `first`."""
    return (rf".*\.layers\.[{first}-9]\..*_proj",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_model("llama", layers=LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def roles(folder, first, **options):
    """Policy, reference and critic on one base, whose adapters add something."""
    torch.manual_seed(1)
    policy = load_policy(
        str(folder), CPU, trained=True, lora_rank=2, lora_targets=upper(first), **options
    )
    policy.adapters = (shared.POLICY,)
    start = shared.as_scorer(policy, policy.tokenizer, 0)
    critic = shared.critic_role(start, "critic", policy.module.peft_config[shared.POLICY])
    with torch.no_grad():
        for parameter in (*policy.trainable(), *critic.trainable()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy, shared.reference_of(policy), critic


def numbers(folder, first, together, **options):
    """Of a rollout's passes and of a step's, with its gradients."""
    policy, reference, critic = roles(folder, first, **options)
    batch = pack(random_examples())
    with torch.no_grad():
        trunk = trunk_of(policy) if together else None
        before = [answer_log_probs(role, batch, 1.0, trunk) for role in (policy, reference)]
    trunk = trunk_of(policy) if together else None
    log_probs = answer_log_probs(policy, batch, 1.0, trunk)
    values = token_values(critic, batch, trunk)
    (log_probs.sum() + values.square().sum()).backward()
    learning = [*policy.trainable(), *critic.trainable()]
    return [*before, log_probs, values, *(p.grad for p in learning)]


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_numbers_and_gradients_are_those_of_each_role_by_itself(
    folder, first, recompute, monkeypatch
):
    computed = []
    call = lean.Layer.__call__

    def counted(self, x, *args):
        computed.append(torch.is_grad_enabled())
        return call(self, x, *args)

    monkeypatch.setattr(lean.Layer, "__call__", counted)
    options = {"gradient_checkpointing": recompute}
    apart = numbers(folder, first, False, **options)
    alone = len(computed)
    computed.clear()
    shared_ = numbers(folder, first, True, **options)
    assert alone - len(computed) >= 2 * first  # the reference's and the critic's
    assert len(apart) == len(shared_) > 10
    assert all(torch.equal(*pair) for pair in zip(apart, shared_, strict=True))


def test_a_trunk_ends_below_what_any_role_may_change(folder):
    policy, _, critic = roles(folder, 2)
    assert trunk_of(policy).layers == trunk_of(critic).layers == 2
    lower = policy.module.peft_config[shared.POLICY]
    lower.target_modules = upper(1)[0]
    shared.add_adapter(policy, "lower", lower)  # of a role that is not asked
    assert trunk_of(critic).layers == 1


@pytest.mark.parametrize(
    "options",
    [
        {},  # trained whole
        {"lora_rank": 2},
        {"lora_rank": 2, "lora_targets": ("embed_tokens", "q_proj")},
        {"lora_rank": 2, "lora_targets": upper(2), "modules_to_save": ("embed_tokens",)},
    ],
    ids=str,
)
def test_there_is_none_where_the_lowest_layer_or_the_embeddings_learn(options, tmp_path):
    tiny_model("llama", layers=LAYERS, tie_word_embeddings=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert trunk_of(load_policy(str(tmp_path), CPU, trained=True, **options)) is None


def test_another_base_takes_nothing_from_it(folder):
    policy, other = roles(folder, 2)[0], roles(folder, 2)[0]
    batch, trunk = pack(random_examples()), trunk_of(policy)
    with torch.no_grad():
        expected = answer_log_probs(other, batch)
        answer_log_probs(policy, batch, 1.0, trunk)
        trunk.states = torch.zeros_like(trunk.states)
        assert torch.equal(answer_log_probs(other, batch, 1.0, trunk), expected)
        assert not torch.equal(answer_log_probs(policy, batch, 1.0, trunk), expected)
