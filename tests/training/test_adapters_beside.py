"""Adapters of all kinds beside PPO's policy: on its base where they can be, else apart and told."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MambaConfig

from prefloop.data.batches import pack
from prefloop.errors import UserError
from prefloop.models import heads, shared
from prefloop.models.export import export_model
from prefloop.models.load import load_policy, load_reward_model, load_scorer
from tests.models.plain import random_examples
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.one_base import built, copied, stepped
from tests.training.small import CPU, train, write_world

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The world with a policy whose head has weights of its own, and an adapter that scores."""
    folder = tmp_path_factory.mktemp("untied")
    write_world(folder)
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(folder / "model")
    export_model(load_scorer(str(folder / "model"), CPU, seed=1), folder / "rm")
    train("reward", folder, folder / "rm_lora", lora_rank=2)
    return folder


def foreign(world, folder, **options):
    """A reward model's adapter that PEFT wrote, with moved weights."""
    model = load_scorer(str(world / "model"), CPU, seed=1)
    model.hf.name_or_path = str(world / "model")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    torch.manual_seed(3)
    peft = get_peft_model(model.hf, LoraConfig(**lora | {"task_type": "SEQ_CLS"} | options))
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return str(folder)


def scores(model, batch):
    with torch.no_grad():
        return heads.answer_scores(model, batch)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 8},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ".*k_proj"},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_forms_of_plain_lora_stand_on_the_base(options, world, tmp_path):
    """The scores of a model of its own, the policy untouched, and the same in one saved adapter."""
    path = foreign(world, tmp_path / "rm", **options)
    batch = pack(random_examples())
    expected = scores(load_reward_model(path, CPU), batch)
    policy = load_policy(str(world / "model"), CPU, trained=True, lora_rank=2)
    with torch.no_grad():
        before = heads.answer_log_probs(policy, batch)
    assert shared.stands_on_base(str(world / "model"), path)
    role = shared.reward_role(policy, path, "reward_0", policy.tokenizer)
    policy.adapters = (shared.POLICY,)
    torch.testing.assert_close(scores(role, batch), expected, rtol=0, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(heads.answer_log_probs(policy, batch), before)
    export_model(role, tmp_path / "again")
    again = load_reward_model(str(tmp_path / "again"), CPU)
    torch.testing.assert_close(scores(again, batch), expected, rtol=0, atol=2e-5)


APART = {
    "dora": {"use_dora": True},
    "changes its base": {"init_lora_weights": "pissa"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole layers": {"modules_to_save": ["score", "norm"]},
}


def assert_equal(ours, theirs):
    """Losses, metrics and norms of some steps, to rounding."""
    assert len(ours) == len(theirs) > 0
    for mine, separate in zip(ours, theirs, strict=True):
        assert mine.keys() == separate.keys()
        for name, value in mine.items():
            assert value == pytest.approx(separate[name], rel=2e-5, abs=5e-6), name


@pytest.mark.parametrize(
    "kind",
    ["dora", "changes its base"]
    + [pytest.param(k, marks=pytest.mark.slow) for k in ("embeddings", "whole layers")],
)
def test_other_kinds_are_loaded_apart_and_told(kind, world, tmp_path, capsys):
    """With the numbers of a run that shares nothing."""
    path = foreign(world, tmp_path / "rm", **APART[kind])
    steps = []
    for share in ("auto", "never"):
        changes = {"reward_model": path, "share_base": share, "advantage": "rloo"}
        method, config = built(world, tmp_path / share, samples_per_prompt=2, **changes)
        steps.append(stepped(method, config, 2))
        told = f"{path} has a base of its own: its adapter is of a kind that must be merged"
        assert (told in capsys.readouterr().err) == (share == "auto")
    assert_equal(*steps)


def test_layers_trained_whole_and_other_bases_are_told(untied, tmp_path, capsys):
    changes = {"reward_model": str(untied / "rm_lora")}
    built(untied, tmp_path / "a", modules_to_save=("embed_tokens",), **changes)
    told = capsys.readouterr().err
    assert "rm_lora has a base of its own: --modules-to-save trains" in told
    assert "one base of" not in told
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "other")
    built(untied, tmp_path / "b", model=str(tmp_path / "other"), **changes)
    told = capsys.readouterr().err
    assert "rm_lora has a base of its own: its base has other weights than the policy's" in told


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        ({"lora_targets": ("q_proj", "lm_head")}, "rm_lora"),
        ({"lora_targets": (".*(q_proj|lm_head)",)}, "rm"),
        ({"lora_targets": ("q_proj", "embed_tokens")}, "rm_lora"),
        ({"modules_to_save": ("lm_head",)}, "rm_lora"),
    ],
    ids=str,
)
def test_a_critic_has_adapters_but_on_a_head_that_it_lacks(options, reward, untied, tmp_path):
    """Shared or apart, the steps are the same, and it is saved as the scorer that it was."""
    changes = options | {"reward_model": str(untied / reward)}
    one, config = built(untied, tmp_path / "one", **changes)
    apart, other = built(untied, tmp_path / "apart", share_base="never", **changes)
    copied(one, apart)
    assert_equal(stepped(one, config, 3), stepped(apart, other, 3))
    learned = one.critic.named_trainable()
    assert not [name for name in learned if "lm_head" in name]
    assert all(parameter.grad is not None for parameter in learned.values())
    one.export(tmp_path / "out")
    folder = str(tmp_path / "out" / "value_model")
    batch = pack(random_examples())
    with torch.no_grad():
        ours = heads.token_values(one.critic, batch)
        again = heads.token_values(load_scorer(folder, CPU), batch)
    torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_head_alone_leaves_the_critic_none(untied, tmp_path):
    changes = {"lora_targets": ("lm_head",), "reward_model": str(untied / "rm_lora")}
    for share in ("auto", "never"):
        with pytest.raises(UserError, match=r"--lora-targets lm_head: only the head, which the cr"):
            built(untied, tmp_path / share, share_base=share, **changes)
    built(untied, tmp_path / "rloo", advantage="rloo", samples_per_prompt=2, **changes)


@pytest.mark.filterwarnings("ignore")
def test_a_critic_leaves_out_the_layers_that_the_policy_does(world, tmp_path):
    """Mamba's fused kernels read out_proj past its adapters, so that PEFT refuses it."""
    own = {"vocab_size": 268, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(**own | ids, time_step_rank=4))
    model.save_pretrained(tmp_path / "mamba")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "mamba")
    changes = {"model": str(tmp_path / "mamba"), "reward_model": None}
    changes |= {"reward_function": "tests.training.rewards:by_length", "max_new_tokens": 3}
    method, config = built(world, tmp_path / "run", **changes)
    assert stepped(method, config, 2)[1]["grad_norm/value"] > 0
    layers = {name.split(".lora_")[0].split(".")[-1] for name in method.critic.named_trainable()}
    assert layers == {"in_proj", "dt_proj", "x_proj", "weight"}
