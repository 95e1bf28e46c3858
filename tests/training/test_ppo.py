"""PPO end to end: steps, ratios, rewards, penalties, what scores and what is trained."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from prefloop.data.batches import TokenBatch, pack
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import Example, encode_prompt, with_answers
from prefloop.errors import UserError
from prefloop.files import read_rows
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.losses import ppo as losses
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_scorer
from prefloop.training import loop
from prefloop.training.ppo import build
from prefloop.training.rollout import Rollouts, RunningScores, rollout_metrics
from prefloop.training.start import start
from tests.parity.plain import token_log_probs
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import (
    CPU,
    REWARDS,
    assert_close_runs,
    assert_same_run,
    checkpoint,
    config,
    lines,
    only_checkpoint,
    policy,
    train,
    weights,
    write_rows,
)

LENGTH = {"reward_function": f"{REWARDS}:by_length"}


def built(world, tmp_path, **changes):
    settings = config("ppo", world, tmp_path / "built", **changes)
    run, device = start(settings, "ppo")
    return build(settings, device, run)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"advantage": "grpo"}], ids=str)
def test_the_first_step_of_an_iteration_has_ratio_1(temperature, changes, world, tmp_path):
    """What samples, what recomputes and what trains are one model, at one temperature."""
    changes = changes | {"temperature": temperature, "batch_size": 3, "samples_per_prompt": 2}
    train("ppo", world, tmp_path / "run", ppo_epochs=2, lr=1e-2, **changes)
    rows = lines(tmp_path / "run")
    assert len(rows) == 3 * 2
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert first["policy/approxkl_avg"] <= 1e-9
        assert first["policy/clipfrac_avg"] == 0
        assert second["policy/approxkl_avg"] > 1e-6
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-2]["objective/kl"] != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_log_probs(temperature, world):
    model = policy(world)
    prompts = [(9, 40), (60, 61, 62)]
    sampling = Sampling(max_new_tokens=8, temperature=temperature, stop_token_ids={2})
    groups = Engine(model).generate(prompts, 3, sampling, seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            example = Example(prompt, (sample.tokens,), ((True,) * len(sample.tokens),))
            ours = answer_log_probs(model, pack([example]), temperature)
            torch.testing.assert_close(ours.detach(), torch.tensor(sample.log_probs))


@pytest.mark.parametrize(
    ("epochs", "minibatches", "passes"), [(1, 1, 1.0), (3, 2, 1.0), (2, 3, 2.0)]
)
def test_the_number_of_optimiser_steps(epochs, minibatches, passes, world, tmp_path):
    """9 prompts, 1 a step: iterations x ppo_epochs x num_minibatches, each a real update."""
    output = tmp_path / "run"
    changes = {"ppo_epochs": epochs, "num_minibatches": minibatches, "epochs": passes}
    changes |= {"lr": 1e-5, "critic_warmup": 0}  # clipping then leaves a gradient to every step
    train("ppo", world, output, batch_size=1, save_every=1, keep_checkpoints=1, **changes, **LENGTH)
    iterations = math.ceil(9 * passes / minibatches)
    total = iterations * epochs * minibatches
    assert [line["step"] for line in lines(output)] == list(range(1, total + 1))
    assert sum("objective/kl" in line for line in lines(output)) == iterations
    state = checkpoint(output, total)["optimizer"]["state"]
    assert {float(s["step"]) for s in state.values()} == {total}
    assert all(line["grad_norm"] > 0 for line in lines(output))


def test_every_sample_is_seen_once_a_pass(world, tmp_path):
    """The minibatches of a pass are a partition of the iteration's prompts, shuffled anew."""
    ppo = built(world, tmp_path, batch_size=2, num_minibatches=4, ppo_epochs=2, **LENGTH)
    orders = []
    for number, step in enumerate(ppo.steps(0)):
        if number % 4 == 0:
            orders.append([])
        orders[-1] += [e.prompt for item in step.batches for e in item.batch.examples]
        if number == 7:
            break
    prompts = [e.prompt for e in ppo.rollouts.examples]
    assert len(prompts) == 8
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(prompts)
    assert orders[0] != orders[1]


def test_target_kl_leaves_the_remaining_passes(world, tmp_path):
    """Skipped steps change no weight, and the next iteration trains again."""
    output = tmp_path / "run"
    changes = {"ppo_epochs": 3, "num_minibatches": 2, "batch_size": 2, "target_kl": 1e-4}
    train("ppo", world, output, save_every=1, keep_checkpoints=99, lr=1e-2, **changes)
    rows = lines(output)
    assert len(rows) == 3 * 6
    skipped = [row["step"] for row in rows if "policy/approxkl_avg" not in row]
    assert skipped
    assert 1 not in skipped and 7 not in skipped and 13 not in skipped
    for row in rows[:-1]:
        step = row["step"]
        if step == 1:
            continue
        before, after = (checkpoint(output, s)["models"] for s in (step - 1, step))
        same = all(
            torch.equal(before[model][name], tensor)
            for model in after
            for name, tensor in after[model].items()
        )
        assert same == (step in skipped)
        if step in skipped:  # by the last step that measured it, in this iteration
            last = max(s for s in range(1, step) if s not in skipped)
            assert rows[last - 1]["policy/approxkl_avg"] > 1e-4
            assert (last - 1) // 6 == (step - 1) // 6


# --- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "moves"), [(1e-3, 1), (1e3, -1)])
def test_adaptive_kl_moves_towards_its_target(target, moves, world, tmp_path):
    """beta x (1 +- 0.2 x 6 answers / 60) an iteration, the error clipped at 0.2."""
    changes = {"kl_target": target, "kl_horizon": 60.0, "batch_size": 3, "samples_per_prompt": 2}
    changes |= {"lr": 1e-2, "epochs": 2.0}
    train("ppo", world, tmp_path / "run", **changes)
    betas = [row["kl_coef"] for row in lines(tmp_path / "run") if "kl_coef" in row]
    kls = [row["objective/kl"] for row in lines(tmp_path / "run") if "kl_coef" in row]
    expected = 0.05
    for beta, kl in zip(betas, kls, strict=True):
        assert beta == pytest.approx(expected)
        error = min(max(kl / target - 1, -0.2), 0.2)
        expected *= 1 + error * 6 / 60
    assert (betas[-1] - betas[0]) * moves > 0


def test_missing_eos_penalty_replaces_the_score(world, tmp_path):
    """A function gives 1 to all; answers that did not stop count -5 instead."""
    changes = {"reward_function": f"{REWARDS}:constant", "missing_eos_penalty": -5.0}
    changes |= {"samples_per_prompt": 8, "max_new_tokens": 40, "batch_size": 9, "ppo_epochs": 1}
    train("ppo", world, tmp_path / "run", **changes)
    (row,) = lines(tmp_path / "run")
    stopped = row["val/num_eos_tokens"]
    assert 0 < stopped < 72
    assert row["truncated"] == pytest.approx(1 - stopped / 72)
    assert row["objective/scores"] == pytest.approx((stopped - 5 * (72 - stopped)) / 72)
    for sample in lines(tmp_path / "run", "samples.jsonl"):
        assert sample["score"] == 1.0  # as the function gave it


def test_rollouts_by_hand(world, tmp_path):
    """Scores, rewards, advantages and returns of one iteration from plain Transformers' numbers."""
    changes = {"samples_per_prompt": 2, "kl_coef": 0.3, "temperature": 0.8, "batch_size": 3}
    changes |= {"ref_model": str(world / "reference"), "reward_clip": 0.5, "value_model": None}
    ppo = built(world, tmp_path, **changes)
    step = next(iter(ppo.steps(0)))
    rollouts = ppo.rollouts
    models = [AutoModelForCausalLM.from_pretrained(world / n) for n in ("model", "reference")]
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    answers = [(e.prompt, answer) for e in rollouts.examples for answer in e.answers]
    assert len(answers) == 6
    wide, mask = rollouts.mask.shape[1], rollouts.mask
    new, old, values = torch.zeros(3, 6, wide)
    scores = torch.zeros(6)
    with torch.no_grad():
        for i, (prompt, answer) in enumerate(answers):
            size = len(answer)
            assert mask[i].tolist() == [True] * size + [False] * (wide - size)
            new[i, :size] = token_log_probs(models[0], prompt, answer, 0.8)
            old[i, :size] = token_log_probs(models[1], prompt, answer, 0.8)
            ids = torch.tensor([[*prompt, *answer]])
            states = scorer.score(scorer.model(ids).last_hidden_state)[0, :, 0]
            values[i, :size] = states[len(prompt) - 1 : -1]
            scores[i] = states[-1].clamp(-0.5, 0.5)
    for mine, plain in zip(
        (rollouts.log_probs, rollouts.ref_log_probs, rollouts.values),
        (new, old, values),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    rewards = losses.token_rewards(scores, new, old, mask, 0.3)
    advantages = losses.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(rollouts.returns, (advantages + values) * mask, rtol=1e-4, atol=1e-4)
    real = advantages[mask]
    white = (real - real.mean()) / (real.var() + 1e-8).sqrt()
    torch.testing.assert_close(rollouts.advantages[mask], white, rtol=1e-4, atol=1e-4)
    assert rollouts.advantages[~mask].eq(0).all()
    kl = ((new - old) * mask).sum(1).mean()
    assert step.metrics["objective/kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert step.metrics["objective/scores"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert step.metrics["objective/rlhf_reward"] == pytest.approx(
        (scores.mean() - 0.3 * kl).item(), rel=1e-4
    )
    explained = 1 - (rollouts.returns - values)[mask].var() / rollouts.returns[mask].var()
    assert step.metrics["val/explained_variance"] == pytest.approx(explained.item(), abs=1e-4)


def test_cut_answers_go_on_in_the_critics_eyes(world, tmp_path):
    """Its value after the last token, from plain Transformers, is what a cut answer's end returns
    beside its score; an answer that stopped has the score alone."""
    changes = {"bootstrap_cut": True, "kl_coef": 0.0, "batch_size": 9, "gae_lambda": 1.0}
    ppo = built(
        world, tmp_path, **changes, value_model=None, max_new_tokens=24, samples_per_prompt=8
    )
    next(iter(ppo.steps(0)))
    rollouts, stops = ppo.rollouts, ppo.sampler.stop_token_ids
    critic = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    answers = [(e.prompt, answer) for e in rollouts.examples for answer in e.answers]
    cut = [answer[-1] not in stops for _, answer in answers]
    assert 0 < sum(cut) < len(cut)
    end = ppo.policy.tokenizer.eos_token_id  # what the reward model reads for any stop token
    for row, (prompt, answer) in enumerate(answers):
        ids = [*prompt, *answer] if cut[row] else [*prompt, *answer[:-1], end]
        with torch.no_grad():
            states = critic.model(torch.tensor([ids])).last_hidden_state
            last = critic.score(states)[0, -1, 0].item()  # the score too, of a policy's first day
        expected = last * (1 + cut[row])
        assert rollouts.returns[row, len(answer) - 1].item() == pytest.approx(expected, abs=1e-5)


def test_the_critic_alone_learns_first(world, tmp_path):
    """Two iterations of two steps: the policy keeps its bits, then moves."""
    changes = {"batch_size": 3, "ppo_epochs": 2, "critic_warmup": 2, "epochs": 3.0, "save_every": 1}
    train("ppo", world, tmp_path / "run", **changes, keep_checkpoints=99)
    rows = lines(tmp_path / "run")
    assert [("loss/policy_avg" in row, "val/ratio" in row) for row in rows[:6]] == [
        *[(False, False)] * 4, *[(True, True)] * 2,
    ]  # fmt: skip
    first = policy(world).module.state_dict()
    kept = [checkpoint(tmp_path / "run", step)["models"] for step in (1, 4, 5)]
    moved = [any(not torch.equal(t, first[n]) for n, t in k["policy"].items()) for k in kept]
    assert moved == [False, False, True]
    critics = [torch.cat([t.flatten() for t in k["value"].values()]) for k in kept]
    assert not torch.equal(critics[0], critics[1])


def test_the_critics_warm_up_by_default(world, tmp_path):
    """4 iterations of a long run, an eighth of a short one's; what is given is kept."""
    ppo = built(world, tmp_path, batch_size=3, ppo_epochs=2)
    for iterations, changes, wanted in (
        (100, {}, 4), (32, {}, 4), (23, {}, 2), (7, {}, 0),
        (100, {"critic_warmup": 0}, 0), (7, {"critic_warmup": 5}, 5),
    ):  # fmt: skip
        ppo.config = replace(ppo.config, critic_warmup=None, max_steps=2 * iterations + 1)
        ppo.config = replace(ppo.config, **changes)
        assert ppo.critic_warmup == wanted
    ppo.critic = None
    ppo.config = replace(ppo.config, critic_warmup=None, max_steps=200)
    assert ppo.critic_warmup == 0


def test_a_warm_up_without_end_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"--critic-warmup 3 leaves no step of 3 to the policy"):
        built(world, tmp_path, batch_size=3, ppo_epochs=1, critic_warmup=3)


def test_whitened_rewards_keep_their_mean(world, tmp_path):
    plain = built(world, tmp_path / "a", batch_size=9, gamma=0.0, **LENGTH)
    white = built(world, tmp_path / "b", batch_size=9, gamma=0.0, whiten_rewards=True, **LENGTH)
    found = []
    for ppo in (plain, white):
        next(iter(ppo.steps(0)))
        found.append(ppo.rollouts.returns[ppo.rollouts.mask])  # with gamma 0 the rewards
    assert found[1].mean().item() == pytest.approx(found[0].mean().item(), abs=1e-5)
    assert found[1].std().item() == pytest.approx(1, abs=1e-5)
    assert found[0].std().item() != pytest.approx(1, abs=1e-2)


OF_KL = {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward"}


def test_a_kl_that_costs_nothing_keeps_no_reference(world, tmp_path, capsys):
    """Its metrics are left out, which is told; a reference that is named is measured, and changes
    nothing.
    """
    changes = {"kl_coef": 0.0, "batch_size": 3, "ppo_epochs": 2, **LENGTH}
    assert built(world, tmp_path, **changes).sampler.reference is None
    assert capsys.readouterr().err.count("no reference is kept") == 1
    train("ppo", world, tmp_path / "none", save_every=1, keep_checkpoints=99, **changes)
    only_checkpoint(tmp_path / "none", tmp_path / "again", 3)  # in mid-iteration
    train("ppo", world, tmp_path / "again", **changes)
    assert_same_run(tmp_path / "none", tmp_path / "again")
    capsys.readouterr()
    train("ppo", world, tmp_path / "named", ref_model=str(world / "reference"), **changes)
    assert "no reference is kept" not in capsys.readouterr().err
    for none, named in zip(lines(tmp_path / "none"), lines(tmp_path / "named"), strict=True):
        assert named.keys() - none.keys() == (OF_KL if "objective/kl" in named else set())
        assert all(named[key] == value for key, value in none.items())
    assert lines(tmp_path / "named")[0].keys() >= OF_KL


def test_a_kl_that_costs_nothing_is_measured_where_adapters_give_the_reference(
    world, tmp_path, capsys
):
    """As from the starting weights as a model of their own; training is the same."""
    changes = {"kl_coef": 0.0, "batch_size": 3, "ppo_epochs": 2, "lora_rank": 2, "lr": 1e-2}
    free = built(world, tmp_path, **changes, **LENGTH)
    assert free.sampler.reference.module is free.policy.module
    train("ppo", world, tmp_path / "free", **changes, **LENGTH)
    assert "no reference is kept" not in capsys.readouterr().err
    train("ppo", world, tmp_path / "named", ref_model=str(world / "model"), **changes, **LENGTH)
    sampled = lines(tmp_path / "free")[::2]
    assert sampled[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(sampled[-1]["objective/kl"]) > 1e-2
    for row, named in zip(sampled, lines(tmp_path / "named")[::2], strict=True):
        assert row["objective/kl"] == pytest.approx(named["objective/kl"], abs=1e-5)
        assert row["loss"] == pytest.approx(named["loss"], abs=1e-6)
        assert row["objective/non_score_reward"] == 0
        assert row["objective/rlhf_reward"] == row["objective/scores"]


def test_the_ptx_term_by_hand(world, tmp_path):
    """ptx_coef x the mean over the SFT rows' answer tokens, in every step."""
    rows = [row for _, row in read_rows(world / "sft.jsonl")][:2]
    data = str(write_rows(tmp_path / "sft.jsonl", rows))
    changes = {"sft_data": data, "ptx_coef": 0.7, "batch_size": 3, "ppo_epochs": 2}
    train("ppo", world, tmp_path / "run", **changes, **LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    plain = AutoModelForCausalLM.from_pretrained(world / "model")
    total = size = 0
    for row in rows:
        ids = (
            encode_prompt(tokenizer, row["prompt"]),
            Encoder(tokenizer).answer(row["prompt"], row["completion"]),
        )
        with torch.no_grad():
            total -= float(token_log_probs(plain, *ids).sum())
        size += len(ids[1])
    found = lines(tmp_path / "run")
    # A step takes 3 rows of the 2, so one of them twice; both orders are by the seed.
    assert all("loss/ptx" in row for row in found)
    ptx = built(world, tmp_path, **changes, **LENGTH)
    step = next(iter(ptx.steps(0)))
    batch = [item for item in step.batches if isinstance(item, TokenBatch)]
    nll = tokens = 0.0
    for item in batch:
        for example in item.examples:
            with torch.no_grad():
                nll -= float(token_log_probs(plain, example.prompt, example.answers[0]).sum())
            tokens += len(example.answers[0])
    assert sum(len(item.examples) for item in batch) == 3
    assert found[0]["loss/ptx"] == pytest.approx(0.7 * nll / tokens, rel=1e-5)
    assert found[0]["loss"] == pytest.approx(
        sum(v for k, v in found[0].items() if k.startswith("loss/")), rel=1e-5
    )
    assert total / size > 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [("raises", "ink"), ("one_too_few", "2 scores for 3"), ("not_a_number", "finite")],
)
def test_a_wrong_reward_function_is_the_users_error(function, expected, world, tmp_path):
    changes = {"reward_function": f"{REWARDS}:{function}", "batch_size": 3}
    with pytest.raises(UserError, match=expected):
        train("ppo", world, tmp_path / "run", **changes)


# --- models --------------------------------------------------------------------------------------


def other_reward_model(folder):
    """A scorer whose tokenizer has another token, so that ids do not carry over."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(["boat"])
    base = folder / "base"
    tiny_model("qwen3", vocab_size=len(tokenizer), seed=5).save_pretrained(base)
    tokenizer.save_pretrained(base)
    scorer = load_scorer(str(base), CPU, seed=3)
    scorer.hf.config.reward_mean = 0.25
    export_model(scorer, folder / "rm")
    return str(folder / "rm")


def test_a_reward_model_with_another_tokenizer_scores_the_text(world, tmp_path):
    path = other_reward_model(tmp_path)
    train("ppo", world, tmp_path / "run", reward_model=path, batch_size=9, ppo_epochs=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain = AutoModelForSequenceClassification.from_pretrained(path)
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert len(samples) == 4
    for sample in samples:
        ids = encode_prompt(tokenizer, sample["prompt"])
        ids += Encoder(tokenizer).answer(sample["prompt"], sample["completion"])
        ended, cut = (plain(torch.tensor([row])).logits.item() - 0.25 for row in (ids, ids[:-1]))
        assert min(abs(sample["score"] - score) for score in (ended, cut)) < 1e-5


def chat_world(folder):
    """A chat policy, a reward model with another tokenizer, and prompts of messages."""
    for seed, name in enumerate(("policy", "base")):
        tokenizer = tiny_tokenizer(chat=True)
        if name == "base":
            tokenizer.add_tokens(["boat"])
        tiny_model(vocab_size=len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    export_model(load_scorer(str(folder / "base"), CPU), folder / "rm")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a boat", "the", "oath")]
    write_rows(folder / "chats.jsonl", rows)
    return {
        "model": str(folder / "policy"),
        "reward_model": str(folder / "rm"),
        "data": str(folder / "chats.jsonl"),
        "batch_size": 3,
        "ppo_epochs": 1,
    }


def test_chats_are_scored_by_a_reward_model_with_another_tokenizer(world, tmp_path):
    changes = chat_world(tmp_path)
    train("ppo", world, tmp_path / "run", **changes)
    tokenizer = AutoTokenizer.from_pretrained(changes["reward_model"])
    plain = AutoModelForSequenceClassification.from_pretrained(changes["reward_model"])
    for sample in lines(tmp_path / "run", "samples.jsonl"):
        chat = [*sample["prompt"], {"role": "assistant", "content": sample["completion"]}]
        ids = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        ids = tokenizer(ids, add_special_tokens=False)["input_ids"]  # cut: without its stop token
        scores = [plain(torch.tensor([row])).logits.item() for row in (ids, ids[:-1])]
        assert min(abs(sample["score"] - score) for score in scores) < 1e-5


def test_a_cut_answer_is_scored_without_a_stop_token(world, tmp_path):
    """By the same reward model through its tokens and through its text."""
    rm, other = str(world / "rm"), tmp_path / "other"
    shutil.copytree(rm, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["a token that no text holds"])
    tokenizer.save_pretrained(other)
    found = []
    for name, path in (("tokens", rm), ("text", str(other))):
        out, changes = tmp_path / name, {"advantage": "rloo", "samples_per_prompt": 2}
        train("ppo", world, out, reward_model=path, batch_size=9, max_new_tokens=3, **changes)
        rows = lines(out, "samples.jsonl")
        found.append({(r["prompt"], r["completion"]): r["score"] for r in rows if r["step"] == 1})
    assert found[0].keys() == found[1].keys()
    readable = [key for key in found[0] if "\ufffd" not in key[1]]
    assert readable
    for key in readable:
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-5)


def test_a_reward_model_with_a_padding_token_of_its_own_is_the_policys(tmp_path):
    """pad = eos and nothing to take instead: `prefloop reward` adds a token, ids stay the same."""
    tokenizer = tiny_tokenizer(chat=False)
    core = type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str().replace("<pad>", "q")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rm = load_scorer(str(tmp_path / "model"), CPU, seed=1)
    assert len(rm.tokenizer) == len(tokenizer) + 1
    export_model(rm, tmp_path / "rm")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a boat"}])
    critic = built(tmp_path, tmp_path).critic
    assert torch.equal(critic.hf.score.weight, rm.hf.score.weight)
    train("ppo", tmp_path, tmp_path / "run", batch_size=1)


@pytest.mark.parametrize(("flag", "folder"), [("ref_model", "base"), ("value_model", "rm")])
def test_models_that_read_other_words_are_refused(flag, folder, world, tmp_path):
    other_reward_model(tmp_path)
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} .*its tokenizer is not"):
        built(world, tmp_path, **{flag: str(tmp_path / folder)})


def test_scores_and_values_are_around_the_same_mean(world, tmp_path):
    """A reward model's mean is subtracted from its scores, and from a critic that began as one."""
    shutil.copytree(world / "rm", tmp_path / "rm")
    settings = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps(settings | {"reward_mean": 5.0}))
    shifted = built(world, tmp_path / "a", reward_model=str(tmp_path / "rm"), batch_size=9)
    plain = built(world, tmp_path / "b", batch_size=9)
    steps = [next(iter(ppo.steps(0))) for ppo in (shifted, plain)]
    found = [step.metrics["objective/scores"] for step in steps]
    assert found[0] == pytest.approx(found[1] - 5.0, abs=1e-4)
    torch.testing.assert_close(shifted.rollouts.values[:, 0], plain.rollouts.values[:, 0] - 5.0)


def test_scores_are_normalised_by_all_so_far(world, tmp_path):
    """Over the first 4 and then over 8 answers, by hand; clipped after, the penalty last of all."""
    changes = {"normalize_scores": True, "reward_clip": 1.0, "missing_eos_penalty": -7.0, **LENGTH}
    ppo = built(world, tmp_path, batch_size=4, ppo_epochs=1, **changes)
    seen, running = [], RunningScores()
    for raw in ([1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 4.0, 8.0]):
        stopped = torch.tensor([True, True, False, True])
        seen += raw
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        expected = [max(-1.0, min(1.0, (x - mean) / deviation)) for x in raw]
        expected[2] = -7.0
        found = ppo.sampler._adjusted(torch.tensor(raw), stopped, running)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_held_out_answers_do_not_move_the_running_scores(world, tmp_path):
    prompts = str(world / "prompts.jsonl")
    ppo = built(world, tmp_path, normalize_scores=True, eval_data=prompts, batch_size=9, **LENGTH)
    next(iter(ppo.steps(0)))
    before = replace(ppo.running)
    ppo.evaluate()
    assert before.count == 9
    assert ppo.running == before


def test_sampler_and_trainer_are_compared_in_every_iteration(world, tmp_path):
    train("ppo", world, tmp_path / "run", batch_size=3, temperature=0.7, ppo_epochs=1)
    gaps = [row["val/sampler_gap"] for row in lines(tmp_path / "run") if "val/sampler_gap" in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-5
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert {row["weights_version"] for row in samples} == {0, 1, 2}


def test_the_critic_starts_from_the_reward_model(world, tmp_path):
    critic = built(world, tmp_path / "a").critic.hf.state_dict()
    rm = AutoModelForSequenceClassification.from_pretrained(world / "rm").state_dict()
    assert critic.keys() == rm.keys()
    assert all(torch.equal(critic[name], rm[name]) for name in rm)
    # With a function, or a model with another tokenizer, from the policy with a new head.
    base = AutoModelForCausalLM.from_pretrained(world / "model").model.state_dict()
    other = {"reward_model": other_reward_model(tmp_path)}
    for number, changes in enumerate((LENGTH, other)):
        critic = built(world, tmp_path / str(number), **changes).critic.hf
        for name, tensor in critic.model.state_dict().items():
            assert torch.equal(tensor, base[name])
        assert critic.score.weight.abs().sum() > 0


def test_the_critic_learns_at_its_own_rate_and_is_exported(world, tmp_path):
    train("ppo", world, tmp_path / "run", batch_size=3, value_lr=1e-2, save_every=1)
    groups = checkpoint(tmp_path / "run", 11)["optimizer"]["param_groups"]
    assert sorted({group["lr"] for group in groups}) == [1e-3, 1e-2]
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value_model")
    rm = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    assert value.config.num_labels == 1
    assert not torch.equal(value.score.weight, rm.score.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "value_model").eos_token == "<eos>"


def test_the_reward_model_and_the_reference_stay_as_they_were(world, tmp_path):
    """The reference is a copy in memory: frozen, while the policy moves."""
    ppo = built(world, tmp_path, batch_size=3, lr=1e-2)
    before = {
        name: tensor.clone() for name, tensor in ppo.sampler.reference.hf.state_dict().items()
    }
    settings = ppo.config
    run, _ = start(settings, "ppo")
    with run:
        loop.train(ppo, settings, run)
    after = ppo.sampler.reference.hf.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    moved = ppo.policy.hf.state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in moved.items())
    assert not any(p.requires_grad for p in ppo.sampler.reference.module.parameters())


def test_a_policy_with_adapters_is_its_own_reference(world, tmp_path):
    """Adapters off equals the base model named outright as the reference."""
    changes = {"lora_rank": 2, "batch_size": 3, "lr": 1e-2, "ppo_epochs": 2}
    train("ppo", world, tmp_path / "off", **changes)
    train("ppo", world, tmp_path / "named", ref_model=str(world / "model"), **changes)
    assert_close_runs(tmp_path / "off", tmp_path / "named", tolerance=1e-4)
    assert abs(lines(tmp_path / "off")[-2]["objective/kl"]) > 1e-3
    method = built(world, tmp_path, lora_rank=2)
    assert method.sampler.reference.module is method.policy.module
    assert any("lora" in name for name in weights(tmp_path / "off"))


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr-grpo"])
def test_group_baselines_have_no_critic(advantage, world, tmp_path):
    changes = {"advantage": advantage, "samples_per_prompt": 2, "batch_size": 3}
    train("ppo", world, tmp_path / "run", save_every=1, **changes)
    assert set(checkpoint(tmp_path / "run", 11)["models"]) == {"policy"}
    assert not (tmp_path / "run" / "value_model").exists()
    for row in lines(tmp_path / "run"):
        assert not {"loss/value_avg", "val/clipfrac_avg", "grad_norm/value"} & row.keys()
        assert "val/explained_variance" not in row
        assert math.isfinite(row["loss"])


def test_group_advantages_by_hand(world, tmp_path):
    """RLOO: the score less beta x KL, minus the other sample's, on every token of the answer."""
    changes = {"advantage": "rloo", "samples_per_prompt": 2, "batch_size": 3, "kl_coef": 0.2}
    ppo = built(world, tmp_path, ref_model=str(world / "reference"), **changes, **LENGTH)
    step = next(iter(ppo.steps(0)))
    r = ppo.rollouts
    scores = [
        len(ppo.policy.tokenizer.decode(list(a), skip_special_tokens=True)) / 10
        for e in r.examples
        for a in e.answers
    ]
    kl = ((r.log_probs - r.ref_log_probs) * r.mask).sum(1)
    net = torch.tensor(scores) - 0.2 * kl
    expected = (net - net.view(3, 2).flip(1).flatten())[:, None] * r.mask
    torch.testing.assert_close(r.advantages, expected, rtol=1e-4, atol=1e-5)
    assert step.samples[0].keys() == {"prompt", "completion", "score", "weights_version"}


def test_dr_grpo_by_hand(world, tmp_path):
    """Advantage: the score less the mean of both; the loss of a step divides by 6 answers x 40."""
    changes = {"advantage": "dr-grpo", "samples_per_prompt": 2, "batch_size": 3, "kl_coef": 0.0}
    changes |= {"max_new_tokens": 40, "temperature": 9.0}  # so that some stop
    found = {}
    for norm in ("tokens", "constant"):
        output = tmp_path / norm
        output.mkdir()
        ppo = built(world, output, policy_norm=norm, **changes, **LENGTH)
        step = next(iter(ppo.steps(0)))
        r = ppo.rollouts
        answers = [list(answer) for example in r.examples for answer in example.answers]
        texts = ppo.policy.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = torch.tensor([len(text) / 10 for text in texts]).view(3, 2)
        expected = (scores - scores.sum(1, keepdim=True) / 2).flatten()[:, None] * r.mask
        torch.testing.assert_close(r.advantages, expected, rtol=1e-4, atol=1e-5)
        found[norm] = sum(ppo.counts(batch)["policy_avg"] for batch in step.batches)
        tokens = int(r.mask.sum())
    assert found == {"tokens": tokens, "constant": 6 * 40}
    assert tokens < found["constant"]


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"advantage": "rloo"}], ids=str)
def test_it_earns_more_reward(changes, world, tmp_path):
    """Longer text earns more; without a KL penalty a few dozen steps show it."""
    long = {"lr": 1e-2, "epochs": 15.0, "ppo_epochs": 2, "batch_size": 9, "kl_coef": 0.0}
    long |= {"samples_per_prompt": 4, "max_new_tokens": 8} | LENGTH | changes
    train("ppo", world, tmp_path / "run", **long)
    scores = [
        row["objective/scores"] for row in lines(tmp_path / "run") if "objective/scores" in row
    ]
    assert sum(scores[-3:]) / 3 > scores[0] + 0.1


def test_held_out_prompts_are_answered_and_change_nothing(world, tmp_path):
    """Evaluation draws with seeds of its own: the training steps are the same without it."""
    changes = {"batch_size": 3, "max_steps": 4, "ppo_epochs": 1}
    train("ppo", world, tmp_path / "a", **changes)
    held_out = {"eval_data": str(world / "prompts.jsonl"), "eval_every": 2}
    train("ppo", world, tmp_path / "b", **changes, **held_out)
    rows = lines(tmp_path / "b")
    assert [("eval/objective/scores" in row) for row in rows] == [False, True, False, True]
    kept = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows]
    assert kept == lines(tmp_path / "a")
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert record["rows"]["eval_data"]["used"] == 9


def test_metrics_are_summed_beyond_float32():
    """2^24 + 1 nats, which float32 does not hold."""
    log_probs, mask = torch.tensor([[-(2.0**24), -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    none, example = torch.zeros(1, 2), with_answers(Example((1,)), [(2, 3)])
    rollouts = Rollouts((example,), mask, log_probs, none, none, none, none)
    ended = torch.tensor([True])
    found = rollout_metrics(rollouts, none, none[:, 0], ended, -log_probs, 0.5, CPU)
    assert found["objective/entropy"] == 2**24 + 1
    assert found["objective/kl"] == -(2**24 + 1)
    assert found["objective/rlhf_reward"] == (2**24 + 1) / 2
    assert found["val/sampler_gap"] == (2**24 + 1) / 2
