"""The reward model end to end: plain Transformers scores its folder as we do."""

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from prefloop.data.batches import to_batches
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import encode_prompt, tokenize
from prefloop.files import read_rows
from prefloop.models.heads import answer_scores
from prefloop.models.load import load_scorer
from prefloop.records import Ranking, RowCounts
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import CPU, checkpoint, lines, policy, train, weights, write_rows


def tokenizer_without_pad(kept=False):
    """pad is eos; the vocabulary has a `<pad>` (kept) or nothing that could be one."""
    tokenizer = tiny_tokenizer(chat=False)
    text = tokenizer.backend_tokenizer.to_str()
    core = type(tokenizer.backend_tokenizer).from_str(text if kept else text.replace("<pad>", "q"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


TOKENIZERS = {
    "own pad": lambda: tiny_tokenizer(chat=False),
    "pad is eos": lambda: tokenizer_without_pad(kept=True),
    "pad is eos, no other": tokenizer_without_pad,
}


def write_model(folder, arch, tokenizer):
    tiny_model(arch).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(world, tokenizer):
    """Every prompt with every answer of the rankings as ids."""
    return [
        encode_prompt(tokenizer, row["prompt"]) + Encoder(tokenizer).answer(row["prompt"], answer)
        for _, row in read_rows(world / "rank.jsonl")
        for answer in row["completions"]
    ]


@torch.no_grad()
def plain_scores(model, tokenizer, sequences):
    """Right-padded batches of five through Transformers, as its users would."""
    found = []
    for start in range(0, len(sequences), 5):
        part = {"input_ids": sequences[start : start + 5]}
        batch = tokenizer.pad(part, return_tensors="pt", padding_side="right")
        found.append(model(**batch).logits[:, 0])
    return torch.cat(found)


@torch.no_grad()
def our_scores(folder, world):
    scorer = load_scorer(str(folder), CPU)
    rows = [row for _, row in read_rows(world / "rank.jsonl")]
    records = [
        Ranking(r["prompt"], tuple(r["completions"]), tuple(map(tuple, r["tiers"]))) for r in rows
    ]
    examples = tokenize(records, scorer.tokenizer, 128, "error", RowCounts())
    return torch.cat([answer_scores(scorer, b) for b in to_batches(examples, 64, CPU)])


@pytest.mark.parametrize(
    ("loss", "used"), [("davidson", 2), ("rao-kupper", 2), ("bradley-terry", 1)]
)
def test_rankings_that_are_all_ties_teach_the_losses_of_ties(loss, used, world, tmp_path, capfd):
    rows = [
        {"prompt": "a", "completions": [" b", " c"], "tiers": t} for t in ([[0, 1]], [[0], [1]])
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train("reward", world, tmp_path / "run", data=str(data), loss=loss)
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]["data"]
    assert (counts["read"], counts["used"], counts["tied_pairs"]) == (2, used, used - 1)
    assert f"rows.jsonl: read 2 rows, used {used}" in capfd.readouterr().err


def test_a_reward_model_trained_further_keeps_its_mean_at_0(world, tmp_path):
    first = train("reward", world, tmp_path / "first", batch_size=3)
    again = train("reward", world, tmp_path / "again", model=str(first.model), batch_size=3)
    scores = our_scores(again.model, world)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("pad", TOKENIZERS)
def test_plain_transformers_scores_the_folder_as_we_do(arch, pad, world, tmp_path):
    model = write_model(tmp_path / "base", arch, TOKENIZERS[pad]())
    train("reward", world, tmp_path / "run", model=model, batch_size=3, lr=1e-2)
    folder = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1
    scores = plain_scores(plain, tokenizer, texts(world, tokenizer))
    ours = our_scores(tmp_path / "run", world) + plain.config.reward_mean
    torch.testing.assert_close(ours, scores, rtol=0, atol=1e-5)
    assert scores.std() > 0.05
    # The stored mean and deviation are of the training answers' scores.
    assert plain.config.reward_mean == pytest.approx(float(scores.mean()), abs=1e-5)
    assert plain.config.reward_std == pytest.approx(float(scores.std()), abs=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks by an old name
@pytest.mark.parametrize("pad", TOKENIZERS)
def test_lora_trains_its_head_too(pad, world, tmp_path):
    """The adapter folder gives Transformers and us what was trained, wherever it is read."""
    model = write_model(tmp_path / "base", "llama", TOKENIZERS[pad]())
    output = tmp_path / "run"
    changes = {"model": model, "batch_size": 3, "lr": 1e-2, "save_every": 1, "keep_checkpoints": 9}
    train("reward", world, output, lora_rank=2, **changes)
    first, last = (checkpoint(output, step)["models"]["scorer"] for step in (1, 2))
    heads = [name for name in first if "score" in name]
    assert len(heads) == 1
    assert not torch.equal(first[heads[0]], last[heads[0]])
    assert any("lora_B" in name and last[name].abs().max() > 0 for name in last)
    assert not any("lm_head" in name for name in weights(output))
    ours = our_scores(output, world)
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    if pad == "own pad":
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        plain = PeftModel.from_pretrained(base, output / "model")
        scores = plain_scores(plain, tokenizer, texts(world, tokenizer))
        mean = load_scorer(str(output), CPU).hf.config.reward_mean
        torch.testing.assert_close(ours + mean, scores, rtol=0, atol=1e-5)
    config = load_scorer(str(output), CPU).hf.config
    assert float(ours.mean()) == pytest.approx(0.0, abs=1e-5)
    assert config.reward_std == pytest.approx(float(ours.std()), abs=1e-5)


def test_a_lora_reward_model_serves_ppo(world, tmp_path):
    train("reward", world, tmp_path / "rm", lora_rank=2, batch_size=3, lr=1e-2)
    train("ppo", world, tmp_path / "run", reward_model=str(tmp_path / "rm"), batch_size=3)
    assert (tmp_path / "run" / "value_model").exists()


def test_the_loss_and_accuracy_by_hand(world, tmp_path):
    """One ranking [2] > [0, 1]: the mean of two pairs' losses; metrics over the same answers."""
    data = tmp_path / "one.jsonl"
    rows = [row for _, row in read_rows(world / "rank.jsonl")][1:2]
    data.write_text(json.dumps(rows[0]) + "\n")
    model = str(world / "rm")
    coefficient = {"center_coefficient": 0.5}
    train("reward", world, tmp_path / "run", data=str(data), model=model, **coefficient)
    tokenizer = AutoTokenizer.from_pretrained(world / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    ids = [
        encode_prompt(tokenizer, rows[0]["prompt"])
        + Encoder(tokenizer).answer(rows[0]["prompt"], answer)
        for answer in rows[0]["completions"]
    ]
    a, b, c = plain_scores(plain, tokenizer, ids).tolist()
    pairs = [math.log1p(math.exp(-(c - a))), math.log1p(math.exp(-(c - b)))]
    center = 0.5 * (a * a + b * b + c * c) / 3
    line = lines(tmp_path / "run")[0]
    assert line["loss/ranking"] == pytest.approx(sum(pairs) / 2, abs=1e-5)
    assert line["loss/center"] == pytest.approx(center, abs=1e-5)
    assert line["loss"] == pytest.approx(sum(pairs) / 2 + center, abs=1e-5)
    assert line["accuracy"] == ((c > a) + (c > b)) / 2
    assert line["scores/mean"] == pytest.approx((a + b + c) / 3, abs=1e-5)


def test_the_new_head_is_drawn_as_it_should_be(world):
    """Standard deviation 1/sqrt(width + 1); another seed, another head."""
    heads = [load_scorer(str(world / "model"), CPU, seed=s).hf.score.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    many = torch.cat(
        [load_scorer(str(world / "model"), CPU, seed=s).hf.score.weight for s in range(9)]
    )
    assert float(many.detach().std()) == pytest.approx(33**-0.5, rel=0.15)
    assert AutoModelForCausalLM.from_pretrained(world / "model").config.vocab_size == 268
    assert not policy(world).is_scorer
