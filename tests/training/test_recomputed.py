"""Adapters under recomputation: architectures that pad, mixtures of experts, heads, dropout."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from prefloop.data.batches import pack
from prefloop.models import heads, pieces, shared
from prefloop.models.adapters import adapter_dropout
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs, answer_scores
from prefloop.models.load import load_policy, load_scorer
from tests.models.plain import random_examples
from tests.models.test_selftest import HEAD_SCALES, PACKED, PADDED
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.one_base import built, copied, stepped
from tests.training.small import CPU, perturbed

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS = {
    "gemma2": PADDED["gemma2"],
    "falcon_h1": HEAD_SCALES["falcon_h1"],  # attention and Mamba; has no classifier
    "mixtral": PACKED["mixtral"],
}
NO_SCORER = {"falcon_h1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy of each kind, and an adapter of a scorer on it where there is one."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name / "model")
        tiny_tokenizer(chat=False).save_pretrained(folder / name / "model")
        if name not in NO_SCORER:
            scorer = load_scorer(str(folder / name / "model"), CPU, seed=1, lora_rank=2)
            export_model(perturbed(scorer), folder / name / "rm_lora")
    return folder


def gradients(model, compute, batch):
    """The numbers of a batch, and what a function of them gives the adapters."""
    values = compute(model, batch)
    model.module.zero_grad()
    (values.sin() * torch.arange(1.0, len(values) + 1)).sum().backward()
    return values.detach(), {n: p.grad.clone() for n, p in model.named_trainable().items()}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        most = 2e-5 * max(float(grad.abs().max()), 1e-3)
        torch.testing.assert_close(grad, theirs[1][name], rtol=0, atol=most, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_policies_and_scorers_have_the_same_gradients(name, folders):
    """What SFT, DPO and reward models take of them."""
    path, batch = str(folders / name / "model"), pack(random_examples())
    kinds = [(load_policy, answer_log_probs)]
    if name not in NO_SCORER:
        kinds.append((load_scorer, answer_scores))
    for load, compute in kinds:
        found = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = load(path, CPU, trained=True, gradient_checkpointing=recompute, lora_rank=2)
            assert model.packed == (name == "mixtral")
            found.append(gradients(perturbed(model), compute, batch))
        assert_same(*found)
        assert sum(float(g.abs().sum()) for g in found[0][1].values()) > 0.1


@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("falcon_h1", "mixtral"))]
)
def test_ppo_takes_the_same_steps(name, folders, world, tmp_path):
    """Policy and critic on one base, recomputed or not, as separate models."""
    place = folders / name
    changes = {"model": str(place / "model"), "reward_model": str(place / "rm_lora")}
    if name in NO_SCORER:
        changes |= {"reward_model": None, "reward_function": "tests.training.rewards:by_length"}
    forms = {"plain": {}, "again": {"gradient_checkpointing": True}}
    if name not in NO_SCORER:
        forms["apart"] = {"gradient_checkpointing": True, "share_base": "never"}
    runs = {n: built(world, tmp_path / n, **changes | form) for n, form in forms.items()}
    for method, _ in list(runs.values())[1:]:
        copied(runs["plain"][0], method)
    plain, *others = [stepped(method, config, 3) for method, config in runs.values()]
    for other in others:
        for ours, theirs in zip(plain, other, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert value == pytest.approx(theirs[key], rel=1e-4, abs=2e-5), key


def test_a_recomputed_head_has_the_adapters_that_were_on(tmp_path):
    """Those of a role beside the policy, whose adapters PEFT itself has on at all other times."""
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    targets = ("q_proj", "lm_head")
    policy = load_policy(str(tmp_path), CPU, trained=True, lora_rank=2, lora_targets=targets)
    shared.add_adapter(policy, "other", copy.copy(policy.module.peft_config[shared.POLICY]))
    for parameter in shared.adapter_weights(policy, "other").values():
        parameter.requires_grad_(True)
    role = replace(perturbed(policy), adapters=("other",))
    batch = pack(random_examples())

    def in_chunks(model, batch):
        hidden = heads.hidden_states(model, batch)[batch.source_index]
        args = (model, hidden, batch.target_ids)
        return heads.head_log_probs(*args, logit_bytes=0, chunk_bytes=4 * 268 * 3)

    whole = gradients(role, answer_log_probs, batch)
    assert_same(gradients(role, in_chunks, batch), whole)
    assert any("lm_head" in name and grad.abs().max() > 0.1 for name, grad in whole[1].items())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_drop_the_same_when_computed_again(packed, recompute, folders, world, monkeypatch):
    """Numbers and gradients are those of pieces that are all kept."""
    path = str(world / "model") if packed else str(folders / "gemma2" / "model")
    options = {"lora_rank": 2, "lora_dropout": 0.4, "gradient_checkpointing": recompute}
    model = perturbed(load_policy(path, CPU, trained=True, **options))
    batch = pack(random_examples())

    def kept(compute, *args, **_):
        return compute(*args) if compute is answer_log_probs else checkpoint(compute, *args)

    def compute(model, batch):
        return pieces.in_pieces(answer_log_probs, model, batch, 40)

    def dropping():
        with adapter_dropout([model.module], CPU, 5):
            return gradients(model, compute, batch)

    ours = dropping()
    assert (ours[0] - gradients(model, compute, batch)[0]).abs().max() > 1e-2
    monkeypatch.setattr(pieces, "checkpoint", kept)
    assert_same(ours, dropping())
