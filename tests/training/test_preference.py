"""DPO and kin: the reference is what it should be, and the numbers are those worked by hand."""

import json
import math
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop import distributed
from prefloop.data import formats
from prefloop.data.batches import pack
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import encode_prompt, tokenize
from prefloop.files import read_rows
from prefloop.losses.masked import segment_sum
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.records import RowCounts
from prefloop.training.kto import KTO
from prefloop.training.preference import Preference
from prefloop.training.reference import mismatched
from tests.parity.plain import token_log_probs
from tests.training.small import (
    CPU,
    assert_same_run,
    config,
    lines,
    only_checkpoint,
    perturbed,
    policy,
    train,
    write_rows,
)

LOG2 = math.log(2)


def examples_of(path, model, kind="preference"):
    records = formats.load(str(path), kind, RowCounts())
    return tokenize(records, model.tokenizer, 128, "error", RowCounts())


def method(world, model, examples, tmp_path, **changes):
    settings = config("dpo", world, tmp_path / "run", **changes)
    kind = KTO if settings.loss == "kto" else Preference
    return kind(settings, model, examples, [], tmp_path / "cache.safetensors")


def one_step(dpo):
    """The first step's batches, and its loss and metrics, divided once."""
    dpo.config = replace(dpo.config, batch_size=len(dpo.examples))
    (step,) = dpo.steps(0)
    outs = [dpo.loss(item) for item in step.batches]
    count = sum(dpo.counts(item)["preference"] for item in step.batches)
    metrics = {}
    for out in outs:
        for name, (total, size) in out.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + float(total), before[1] + size)
    loss = sum(out.terms["preference"] for out in outs) / count
    return loss, {name: total / size for name, (total, size) in metrics.items()}


@torch.no_grad()
def log_prob(model, tokenizer, prompt, answer):
    """log pi(y|x) by plain Transformers."""
    ids = encode_prompt(tokenizer, prompt), Encoder(tokenizer).answer(prompt, answer)
    return float(token_log_probs(model, *ids).sum())


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "plackett-luce"])
@pytest.mark.parametrize("rank", [0, 2])
def test_step_one_is_log_2_for_the_weights_in_memory(loss, rank, world, tmp_path):
    """Also when they are no longer those on disk: the reference is never silently reloaded."""
    model = perturbed(policy(world, lora_rank=rank))
    examples = examples_of(world / "pairs.jsonl", model)
    dpo = method(world, model, examples, tmp_path, loss=loss)
    assert one_step(dpo)[0].item() == pytest.approx(LOG2, abs=1e-5)
    # And it stays what it was while the policy moves on.
    perturbed(model, scale=1.0, seed=1)
    assert one_step(dpo)[0].item() != pytest.approx(LOG2, abs=5e-5)


def mark(cache, key, values):
    """The file as a run writes it, with other numbers."""
    save_file({key: values}, cache, {"sha256": sha256(values.numpy().tobytes()).hexdigest()})


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_cache_is_told_and_made_again(damage, world, tmp_path, capsys):
    model = policy(world)
    examples = examples_of(world / "pairs.jsonl", model)
    method(world, model, examples, tmp_path)
    cache = tmp_path / "cache.safetensors"
    whole = cache.read_bytes()
    flipped = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    cache.write_bytes(flipped if damage == "flipped" else whole[:-2])
    again = method(world, model, examples, tmp_path)
    said = capsys.readouterr().err
    assert f"{cache}: " in said and said.endswith("; it is computed again\n")
    assert cache.read_bytes() == whole
    assert one_step(again)[0].item() == pytest.approx(LOG2, abs=1e-5)


def test_the_cache_is_used_for_the_same_weights_and_for_no_others(world, tmp_path):
    model = policy(world)
    examples = examples_of(world / "pairs.jsonl", model)
    first = method(world, model, examples, tmp_path)
    cache = tmp_path / "cache.safetensors"
    stored = load_file(cache)
    (key,) = stored
    marked = stored[key] + torch.arange(len(stored[key]))  # as no forward pass would give it
    mark(cache, key, marked)
    again = method(world, model, examples, tmp_path)
    for number, example in enumerate(examples):
        moved = again.reference.log_probs[id(example)] - first.reference.log_probs[id(example)]
        torch.testing.assert_close(moved, torch.tensor([2.0 * number, 2.0 * number + 1]))
    # Other weights, other rows, another precision: computed anew.
    for other, rows in (
        (perturbed(policy(world)), examples),
        (model, examples[::-1]),
        (replace(model, dtype="bfloat16"), examples),
    ):
        mark(cache, key, marked)
        fresh = method(world, other, rows, tmp_path)
        assert one_step(fresh)[0].item() == pytest.approx(LOG2, abs=1e-2)
        assert key not in load_file(cache)


def test_a_resumed_run_uses_the_cache(world, tmp_path):
    """Its numbers are read again: altered in the file, they give other rewards."""
    changes = {"batch_size": 3, "save_every": 1, "keep_checkpoints": 9}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train("dpo", world, whole, **changes)
    only_checkpoint(whole, again, 1)
    cache = again / "reference_log_probs.safetensors"
    ((key, value),) = load_file(cache).items()
    shutil.copytree(again, tmp_path / "altered")
    mark(tmp_path / "altered" / cache.name, key, value - 1000.0)
    train("dpo", world, tmp_path / "altered", **changes)
    assert lines(tmp_path / "altered")[1]["logps/chosen_shift"] > 900
    train("dpo", world, again, **changes)
    assert_same_run(whole, again)


def test_a_reference_that_is_named(world, tmp_path):
    model = policy(world)
    examples = examples_of(world / "rank.jsonl", model)
    dpo = method(world, model, examples, tmp_path, ref_model=str(world / "reference"))
    plain = AutoModelForCausalLM.from_pretrained(world / "reference")
    for example in examples:
        with torch.no_grad():
            expected = [token_log_probs(plain, example.prompt, a).sum() for a in example.answers]
        torch.testing.assert_close(
            dpo.reference.log_probs[id(example)], torch.stack(expected), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_no_reference_is_computed_in_vain(loss, world, tmp_path):
    train("dpo", world, tmp_path / "run", loss=loss)
    assert not (tmp_path / "run" / "reference_log_probs.safetensors").exists()
    assert "logps/chosen_shift" not in lines(tmp_path / "run")[0]


# --- numbers by hand -----------------------------------------------------------------------------


def test_metrics_by_hand(world, tmp_path):
    """Two pairs; policy and reference are two models that plain Transformers runs."""
    rows = [row for _, row in read_rows(world / "pairs.jsonl")][:2]
    data = str(write_rows(tmp_path / "two.jsonl", rows))
    ref = str(world / "reference")
    train("dpo", world, tmp_path / "run", data=data, ref_model=ref, beta=0.3)
    (line,) = lines(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    models = [AutoModelForCausalLM.from_pretrained(world / n) for n in ("model", "reference")]
    table = [
        [[log_prob(m, tokenizer, row["prompt"], row[side]) for m in models] for row in rows]
        for side in ("chosen", "rejected")
    ]
    chosen, rejected = ([0.3 * (pi - ref) for pi, ref in side] for side in table)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    expected = {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / 2,
        "rewards/chosen": sum(chosen) / 2,
        "rewards/rejected": sum(rejected) / 2,
        "rewards/margins": sum(margins) / 2,
        "rewards/accuracies": sum(m > 0 for m in margins) / 2,
        "logps/chosen": sum(pi for pi, _ in table[0]) / 2,
        "logps/rejected": sum(pi for pi, _ in table[1]) / 2,
        "logps/chosen_shift": sum(pi - ref for pi, ref in table[0]) / 2,
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_mismatched_takes_the_next_answer_of_another_prompt(world, tmp_path):
    model = policy(world)
    rows = [("a", " boat"), ("a", " bath"), ("oath", " took"), ("that", " thin")]
    records = [{"prompt": p, "completion": c, "label": True} for p, c in rows]
    path = write_rows(tmp_path / "unpaired.jsonl", records)
    examples = examples_of(path, model, "unpaired")
    partners = mismatched(examples)
    order = [2, 2, 3, 0]  # the third's next is the fourth, the fourth's the first
    for example, partner, number in zip(examples, partners, order, strict=True):
        assert partner.prompt == example.prompt
        assert partner.answers == examples[number].answers


def test_the_kl_estimate_and_loss_of_kto_by_hand(world, tmp_path):
    """z = max(0, mean log-ratio of each prompt with another's answer), over the whole step."""
    rows = [row for _, row in read_rows(world / "pairs.jsonl")][:3]
    answers = [
        (r["prompt"], r[side], side == "chosen") for r in rows for side in ("chosen", "rejected")
    ]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    changes = {"loss": "kto", "ref_model": str(world / "reference"), "beta": 0.1}
    changes |= {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    models = [AutoModelForCausalLM.from_pretrained(world / n) for n in ("model", "reference")]

    def ratio(prompt, answer):
        new, old = (log_prob(m, tokenizer, prompt, answer) for m in models)
        return new - old

    others = [answers[n][1] for n in (2, 2, 4, 4, 0, 0)]
    drift = [ratio(p, other) for (p, _, _), other in zip(answers, others, strict=True)]
    z = max(0.0, sum(drift) / 6)
    losses = []
    for prompt, answer, good in answers:
        x = 0.1 * (ratio(prompt, answer) - z)
        losses.append(2 / (1 + math.exp(x)) if good else 0.5 / (1 + math.exp(-x)))
    for tokens in (8192, 1):
        output = tmp_path / str(tokens)
        train("dpo", world, output, data=data, micro_batch_tokens=tokens, **changes)
        (line,) = lines(output)
        assert line["kl"] == pytest.approx(z, rel=1e-5, abs=1e-5)
        assert line["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_the_kl_estimate_is_never_below_0_and_follows_the_policy(world, tmp_path):
    """With the reference far likelier it is 0; and a moved policy gives another."""
    model = policy(world)
    examples = examples_of(world / "pairs.jsonl", model, "unpaired")
    kto = method(world, model, examples, tmp_path, loss="kto")
    assert one_step(kto)[1]["kl"] == pytest.approx(0, abs=1e-5)
    references = kto.reference.log_probs
    for key in references:
        references[key] = references[key] + 50.0
    assert one_step(kto)[1]["kl"] == 0.0
    for key in references:
        references[key] = references[key] - 80.0
    assert one_step(kto)[1]["kl"] == pytest.approx(30.0, abs=1e-3)


def test_a_rank_measures_its_share_of_the_estimate(world, tmp_path, monkeypatch):
    """Of 18 held-out answers and their 18 partners, the first of two ranks computes 9 and 9."""
    model, computed = policy(world), []
    examples = examples_of(world / "pairs.jsonl", model, "unpaired")
    settings = config("dpo", world, tmp_path / "run", loss="kto")
    kto = KTO(settings, model, examples, examples, tmp_path / "cache.safetensors")
    run = kto._log_probs
    monkeypatch.setattr(kto, "_log_probs", lambda b: computed.append(b.answers) or run(b))
    monkeypatch.setattr(distributed, "mine", lambda items, size: items[::2])
    kto.evaluate()
    assert (len(examples), sum(computed)) == (18, 18)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("sigmoid", {}),
        ("ipo", {}),
        ("hinge", {"beta": 0.02}),
        ("apo-zero", {}),
        ("sigmoid-norm", {}),
        ("simpo", {}),
    ],
)
def test_a_ranking_is_its_strict_pairs(loss, changes, world, tmp_path):
    """K = 4 in tiers of 1, 2, 1: five pairs, each answer computed once; the same gradient."""
    row = {
        "prompt": "a boat",
        "completions": [" took", " the bath", " oath that", " thin ant"],
        "tiers": [[2], [0, 3], [1]],
    }
    pairs = [(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]
    separate = [
        {"prompt": "a boat", "chosen": row["completions"][w], "rejected": row["completions"][l]}
        for w, l in pairs
    ]
    found = []
    for name, rows in (("ranking", [row]), ("pairs", separate)):
        model = policy(world)
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        (tmp_path / name).mkdir()
        reference = {} if loss == "simpo" else {"ref_model": str(world / "reference")}
        dpo = method(
            world, model, examples_of(path, model), tmp_path / name,
            loss=loss, **changes, **reference,
        )  # fmt: skip
        value, metrics = one_step(dpo)
        value.backward()
        gradients = {n: p.grad for n, p in model.module.named_parameters()}
        assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4
        found.append((value.item(), metrics, gradients))
    (value, metrics, gradients), (other, others, their) = found
    assert value == pytest.approx(other, rel=1e-6)
    assert metrics == pytest.approx(others, rel=1e-5, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their[name], rtol=1e-4, atol=1e-6, msg=name)


def test_plackett_luce_by_hand(world, tmp_path):
    """[2] > [0, 3] > [1]: the first choice is among all four, each tied one against the last."""
    row = {
        "prompt": "a boat",
        "completions": [" took", " the bath", " oath that", " thin ant"],
        "tiers": [[2], [0, 3], [1]],
    }
    data = str(write_rows(tmp_path / "row.jsonl", [row]))
    ref = str(world / "reference")
    train("dpo", world, tmp_path / "run", data=data, ref_model=ref, loss="plackett-luce")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    models = [AutoModelForCausalLM.from_pretrained(world / n) for n in ("model", "reference")]
    r = [
        0.1
        * (
            log_prob(models[0], tokenizer, "a boat", a)
            - log_prob(models[1], tokenizer, "a boat", a)
        )
        for a in row["completions"]
    ]

    def choice(winner, among):
        return -r[winner] + math.log(sum(math.exp(r[i]) for i in among))

    expected = choice(2, [0, 1, 2, 3]) + choice(0, [0, 1]) + choice(3, [3, 1])
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_nll_of_the_chosen_by_hand(world, tmp_path):
    """alpha x the mean over the chosen answers' tokens, beside the pair loss."""
    rows = [row for _, row in read_rows(world / "pairs.jsonl")][:2]
    data = str(write_rows(tmp_path / "two.jsonl", rows))
    train("dpo", world, tmp_path / "run", data=data, sft_coefficient=0.5)
    (line,) = lines(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    plain = AutoModelForCausalLM.from_pretrained(world / "model")
    total = sum(log_prob(plain, tokenizer, r["prompt"], r["chosen"]) for r in rows)
    size = sum(len(Encoder(tokenizer).answer(r["prompt"], r["chosen"])) for r in rows)
    assert line["loss/nll"] == pytest.approx(-0.5 * total / size, rel=1e-5)
    assert line["loss/preference"] == pytest.approx(LOG2, abs=1e-5)


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns_its_preferences(rank, world, tmp_path):
    train("dpo", world, tmp_path / "run", lora_rank=rank, batch_size=9, epochs=25.0, lr=1e-2)
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert first["loss"] == pytest.approx(LOG2, abs=1e-5)
    assert last["rewards/accuracies"] > 0.95
    assert last["loss"] < 0.3
    trained = load_policy(str(tmp_path / "run"), CPU)
    examples = examples_of(world / "rank.jsonl", trained)
    batch = pack(examples)
    with torch.no_grad():
        per_token = [answer_log_probs(m, batch) for m in (trained, policy(world))]
    gained = segment_sum(per_token[0] - per_token[1], batch.target_answer, batch.answers)
    winners, losers = batch.pairs()
    assert float((gained[winners] > gained[losers]).float().mean()) > 0.95


def test_rows_that_say_nothing_are_counted(world, tmp_path):
    """A ranking that is one tie has no pair: dropped, and in the run's record."""
    rows = [row for _, row in read_rows(world / "rank.jsonl")][:2]
    rows.append({"prompt": "a", "completions": [" b", " c"], "tiers": [[0, 1]]})
    train("dpo", world, tmp_path / "run", data=str(write_rows(tmp_path / "r.jsonl", rows)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    counts = record["rows"]["data"]
    assert (counts["read"], counts["used"]) == (3, 2)
    assert counts["dropped"] == {"ranking without a strict pair": 1}
    assert pack(examples_of(world / "rank.jsonl", policy(world))).answers > 9
