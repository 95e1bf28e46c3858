"""prefloop's own commands against TRL: rows in a file -> tokens -> packed batches -> one step.

The micro-batches are far smaller than TRL's one batch, so nothing here may depend on the split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.config import DPOConfig, DPOLoss, PPOConfig, RewardConfig, SFTConfig
from prefloop.data.batches import pack_all, to_batches
from prefloop.data.formats import load
from prefloop.data.tokenize import Example, tokenize, with_answers
from prefloop.generation.engine import Engine
from prefloop.models.heads import answer_log_probs, answer_scores, token_values
from prefloop.models.load import load_policy, load_scorer
from prefloop.records import Prompt, RowCounts
from prefloop.training import preference, reward, sft
from prefloop.training.ppo import PPO
from prefloop.training.rollout import (
    Rollouts,
    Sampler,
    advantages_and_returns,
    padded,
    rollout_metrics,
)
from prefloop.training.rows import Prompts
from tests.parity import models, rows

CPU = torch.device("cpu")
SIZE = len(rows.PAIRS)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path: Path, data: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every model, with a tokenizer, as a folder."""
    at, text = tmp_path_factory.mktemp("models"), models.text_tokenizer()
    policy, reference = models.causal_lm(models.POLICY), models.causal_lm(models.REFERENCE)
    chat = models.chat_tokenizer()
    return {
        "policy": save(policy, text, at / "policy"),
        "reference": save(reference, text, at / "reference"),
        "policy_chat": save(policy, chat, at / "policy_chat"),
        "reference_chat": save(reference, chat, at / "reference_chat"),
        "policy_conversation": save(policy, models.marked_chat_tokenizer(), at / "conversation"),
        "scorer": save(models.scorer(models.SCORER), text, at / "scorer"),
        "critic": save(models.scorer(models.CRITIC), text, at / "critic"),
    }


def common(tmp_path: Path, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": write(tmp_path / "rows.jsonl", data),
        "output": tmp_path / "run",
        "batch_size": SIZE,
        "micro_batch_tokens": 60,
        "max_steps": 1,
        "device": "cpu",
        "dtype": "float32",
    }


def first_step(output: Path) -> dict[str, float]:
    line: dict[str, float] = json.loads((output / "metrics.jsonl").read_text().split("\n")[0])
    return line


def agree(ours: dict[str, float], trl: dict[str, float], names: Sequence[str]) -> None:
    for name in names:
        assert ours[name] == pytest.approx(trl[name], rel=1e-5, abs=1e-5), name


CHATS = [{"prompt": c["prompt"], "completion": c["chosen"]} for c in rows.CHATS]
SFT: dict[str, tuple[str, Sequence[dict[str, Any]], dict[str, Any]]] = {
    "text": ("policy", rows.DEMONSTRATIONS, {}),
    "all": ("policy", rows.DEMONSTRATIONS, {"train_on": "all"}),
    "chat": ("policy_chat", CHATS, {}),
    "conversation": ("policy_conversation", rows.CONVERSATIONS, {}),
}


@pytest.mark.parametrize("kind", SFT)
def test_sft(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    model, data, options = SFT[kind]
    config = SFTConfig(model=folders[model], **options, **common(tmp_path, data))
    sft.run(config)
    agree(first_step(config.output), models.read("sft")[kind]["step"], ["loss", "grad_norm"])


@pytest.mark.parametrize("name", ["plain", "margin"])
def test_reward(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    data = [
        {**row, **({"margin": pair.margin} if name == "margin" else {})}
        for row, pair in zip(rows.PREFERENCES, rows.PAIRS, strict=True)
    ]
    config = RewardConfig(model=folders["scorer"], **common(tmp_path, data))
    reward.run(config)
    step = models.read("reward")[name]["step"]
    ours = first_step(config.output)
    agree(ours, step, ["loss", "grad_norm", "accuracy"])
    assert ours["scores/mean"] == pytest.approx(step["mean_reward"], rel=1e-5)


def test_reward_with_centring(folders: dict[str, str], tmp_path: Path) -> None:
    """TRL's term squares r_w + r_l; ours is checked against TRL's own scores."""
    config = RewardConfig(
        model=folders["scorer"], center_coefficient=0.01, **common(tmp_path, rows.PREFERENCES)
    )
    reward.run(config)
    trl, ours = models.read("reward")["plain"], first_step(config.output)
    scores = [row[name] for row in trl["rows"] for name in ("min_reward", "max_reward")]
    centring = 0.01 * sum(score**2 for score in scores) / len(scores)
    assert ours["loss/ranking"] == pytest.approx(trl["step"]["loss"], rel=1e-5)
    assert ours["loss/center"] == pytest.approx(centring, rel=1e-5)


METRICS = [
    *("loss", "grad_norm", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
]
CASES: dict[str, tuple[DPOLoss, dict[str, Any]]] = {
    "sigmoid": ("sigmoid", {}),
    "sigmoid_sft": ("sigmoid", {"sft_coefficient": 0.5}),
    "cdpo": ("sigmoid", {"label_smoothing": 0.1}),
    "robust": ("robust", {"label_smoothing": 0.1}),
    "ipo": ("ipo", {}),
    "hinge": ("hinge", {}),
    "apo_zero": ("apo-zero", {}),
    "sigmoid_norm": ("sigmoid-norm", {}),
    "chat": ("sigmoid", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_dpo(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    loss, options = CASES[name]
    chat = name == "chat"
    suffix = "_chat" if chat else ""
    config = DPOConfig(
        model=folders["policy" + suffix],
        ref_model=folders["reference" + suffix],
        loss=loss,
        **options,
        **common(tmp_path, rows.CHATS if chat else rows.PREFERENCES),
    )
    preference.run(config)
    names = [m for m in METRICS if name != "sigmoid_norm" or not m.startswith("rewards")]
    agree(first_step(config.output), models.read("preference")[name]["step"], names)


def test_plackett_luce_of_pairs(folders: dict[str, str], tmp_path: Path) -> None:
    """TRL has no losses over rankings; over two answers this one is `sigmoid`."""
    config = DPOConfig(
        model=folders["policy"],
        ref_model=folders["reference"],
        loss="plackett-luce",
        **common(tmp_path, rows.PREFERENCES),
    )
    preference.run(config)
    agree(first_step(config.output), models.read("preference")["sigmoid"]["step"], METRICS)


@pytest.mark.parametrize("name", ["simpo", "simpo_sft"])
def test_simpo(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    config = DPOConfig(
        model=folders["policy"],
        loss="simpo",
        beta=2.0,
        simpo_gamma=0.5,
        sft_coefficient=0.5 if name == "simpo_sft" else 0.0,
        **common(tmp_path, rows.PREFERENCES),
    )
    preference.run(config)
    names = [m for m in METRICS if not m.startswith("logps")]  # TRL's are per token there
    agree(first_step(config.output), models.read("preference")[name]["step"], names)


def test_orpo(folders: dict[str, str], tmp_path: Path) -> None:
    """The odds-ratio term is ORPOTrainer's; the NLL, over answers alone, is CPOTrainer's."""
    config = DPOConfig(
        model=folders["policy"],
        loss="orpo",
        orpo_lambda=0.1,
        **common(tmp_path, rows.PREFERENCES),
    )
    preference.run(config)
    trl, ours = models.read("preference"), first_step(config.output)
    odds = -0.1 * trl["orpo"]["step"]["log_odds_ratio"]
    assert ours["loss/preference"] == pytest.approx(odds, rel=1e-5)
    assert ours["loss/nll"] == pytest.approx(trl["simpo_sft"]["step"]["nll_loss"], rel=1e-5)


def test_kto(folders: dict[str, str], tmp_path: Path) -> None:
    """TRL pairs a prompt with the answer of the row before, prefloop with the row after."""
    fixture = models.read("kto")
    config = DPOConfig(
        model=folders["policy"],
        ref_model=folders["reference"],
        loss="kto",
        **fixture["options"],
        **common(tmp_path, rows.UNPAIRED[::-1]),
    )
    preference.run(config)
    names = ["loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected"]
    agree(first_step(config.output), fixture["step"], names)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_tokens_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    fixture = models.read("preference")
    trl = fixture["tokens"] if kind == "text" else fixture["chat"]["tokens"]
    data = rows.PREFERENCES if kind == "text" else rows.CHATS
    tokenizer = models.text_tokenizer() if kind == "text" else models.chat_tokenizer()
    counts = RowCounts()
    found = load(write(tmp_path / "rows.jsonl", data), "preference", counts)
    examples = tokenize(found, tokenizer, 512, "error", counts)
    ours = [
        {"prompt_ids": list(e.prompt), "chosen_ids": list(e.answers[0]), "rejected_ids": list(r)}
        for e in examples
        for r in e.answers[1:]
    ]
    assert ours == trl


def test_reward_tokens_are_those_of_trl() -> None:
    """Prompt and answer, as in the preference rows."""
    pairs = [
        {
            "chosen_ids": [*row["prompt_ids"], *row["chosen_ids"]],
            "rejected_ids": [*row["prompt_ids"], *row["rejected_ids"]],
        }
        for row in models.read("preference")["tokens"]
    ]
    assert pairs == models.read("reward")["tokens"]


OURS = {"lam": "gae_lambda"}  # TRL's name: prefloop's


def ppo(folders: dict[str, str], variant: str, prompt_ids: list[list[int]], tmp_path: Path) -> PPO:
    options: dict[str, Any] = models.read("ppo")[variant]["options"]
    config = PPOConfig(
        model=folders["policy"],
        data="",
        output=tmp_path,
        ppo_epochs=2,
        temperature=0.7,
        **{OURS.get(name, name): value for name, value in options.items()},
        micro_batch_tokens=60,
        max_steps=2,
    )
    policy, reference = (load_policy(folders[n], CPU) for n in ("policy", "reference"))
    critic = load_scorer(folders["critic"], CPU)

    def scorer(prompts: object, completions: object, examples: Sequence[Example]) -> list[float]:
        model = load_scorer(folders["scorer"], CPU)
        with torch.no_grad():
            return torch.cat(
                [answer_scores(model, b) for b in to_batches(examples, 60, CPU)]
            ).tolist()

    sampler = Sampler(
        config, policy, critic, reference, scorer, frozenset({models.EOS}), Engine(policy)
    )
    records = tuple(Prompt(text) for text in rows.PROMPTS)
    prompts = Prompts(records, tuple(Example(tuple(ids)) for ids in prompt_ids))
    return PPO(config, sampler, prompts, [], Prompts((), ()), fixed=())


@pytest.mark.parametrize("variant", ["length", "whitened", "discounted"])
def test_ppo(variant: str, folders: dict[str, str], tmp_path: Path) -> None:
    """From TRL's sampled tokens alone to the first step's losses, gradients and metrics.

    No answer stopped by itself, so TRL's score stands where ours does.
    """
    trl = models.read("ppo")[variant]
    told = trl["rollout"]
    method = ppo(folders, variant, told["prompts"], tmp_path)
    config, sampler = method.config, method.sampler
    examples = [
        with_answers(prompt, [answer])
        for prompt, answer in zip(method.prompts.examples, told["answers"], strict=True)
    ]

    # 1. Log-probs, values, scores.
    batches = pack_all(examples, config.micro_batch_tokens)
    assert sampler.reference is not None
    assert sampler.critic is not None
    with torch.no_grad():
        log_probs, ref_log_probs = (
            padded(torch.cat([answer_log_probs(m, b, 0.7) for b in batches]), examples)
            for m in (sampler.policy, sampler.reference)
        )
        values = padded(torch.cat([token_values(sampler.critic, b) for b in batches]), examples)
    scores = torch.tensor(sampler.scorer([], [], examples))
    ours = {"logprobs": log_probs, "ref_logprobs": ref_log_probs, "values": values}
    for name, value in {**ours, "scores": scores}.items():
        torch.testing.assert_close(value, torch.tensor(told[name]), rtol=1e-5, atol=1e-5)

    # 2. Advantages and returns.
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    advantages, returns = advantages_and_returns(
        config, scores, log_probs, ref_log_probs, values, mask, config.kl_coef
    )
    torch.testing.assert_close(advantages, torch.tensor(told["advantages"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, torch.tensor(told["returns"]), rtol=1e-5, atol=1e-5)

    # 3. Losses and gradients of the first step, from the state a checkpoint would hold.
    rollouts = Rollouts(
        tuple(examples), mask, log_probs, ref_log_probs, advantages, values, returns
    )
    method.load_state_dict(method.state_dict() | {"rollouts": rollouts.state})
    terms, sums = losses_of(method)
    first = trl["epochs"][0]
    assert terms["policy_avg"] == pytest.approx(first["policy_loss"], abs=1e-6)
    assert terms["value_avg"] == pytest.approx(config.vf_coef * first["value_loss"], rel=1e-5)
    assert sums["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert sums["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
    assert sums["policy/clipfrac_avg"] == 0.0
    policy_norm = models.grad_norm(sampler.policy.module)
    assert policy_norm == pytest.approx(first["policy_grad_norm"], rel=1e-5)
    critic_norm = models.grad_norm(sampler.critic.module)
    assert critic_norm == pytest.approx(first["critic_grad_norm"], rel=1e-5)

    # 4. Metrics of the rollout.
    metrics = rollout_metrics(
        rollouts,
        ref_log_probs,
        scores,
        torch.zeros(len(scores), dtype=torch.bool),
        torch.zeros_like(rollouts.log_probs),
        config.kl_coef,
        CPU,
    )
    names = [f"objective/{n}" for n in ("kl", "scores", "rlhf_reward", "non_score_reward")]
    agree(metrics, trl["metrics"], [*names, "objective/entropy"])


def losses_of(method: PPO) -> tuple[dict[str, float], dict[str, float]]:
    """Terms and metrics of one step over the loaded rollouts, gradients taken."""
    step = next(method.steps(1))
    counts = {
        name: sum(method.counts(batch)[name] for batch in step.batches)
        for name in ("policy_avg", "value_avg")
    }
    terms, sums = dict.fromkeys(counts, 0.0), {}
    for batch in step.batches:
        out = method.loss(batch)
        divided = {name: value / counts[name] for name, value in out.terms.items()}
        torch.stack(list(divided.values())).sum().backward()
        for name, value in divided.items():
            terms[name] += value.item()
        for name, (value, _) in out.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return terms, {name: value / counts["policy_avg"] for name, value in sums.items()}
