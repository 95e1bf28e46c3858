"""SFT end to end: its loss against plain Transformers, what is trained, what comes out."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.files import read_rows
from tests.parity.plain import token_log_probs
from tests.tiny import tiny_tokenizer
from tests.training.small import lines, train, write_rows


@torch.no_grad()
def by_hand(model, tokenizer, rows, whole=False):
    """Mean negative log-likelihood per answer token over rows, each run by itself."""
    total = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        if whole:
            prompt, answer = prompt[:1], prompt[1:] + answer
        log_probs = token_log_probs(model, prompt, answer)
        total, count = total - float(log_probs.sum()), count + len(log_probs)
    return total / count


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_the_loss_is_the_mean_over_all_answer_tokens(train_on, world, tmp_path):
    train("sft", world, tmp_path / "run", batch_size=64, train_on=train_on)
    rows = [row for _, row in read_rows(world / "sft.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    expected = by_hand(model, tokenizer, rows, train_on == "all")
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns_its_rows_and_transformers_reads_the_result(rank, world, tmp_path):
    rows = [row for _, row in read_rows(world / "sft.jsonl")][:3]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    train(
        "sft", world, tmp_path / "run", data=data, lora_rank=rank, batch_size=3, epochs=60.0,
        lr=1e-2 if not rank else 5e-2, eval_data=data,
    )  # fmt: skip
    last = lines(tmp_path / "run")[-1]
    assert last["eval/loss"] < 1 < 3 < lines(tmp_path / "run")[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    with warnings.catch_warnings():  # PEFT's, inside Transformers
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert by_hand(model, tokenizer, rows) == pytest.approx(last["eval/loss"], abs=1e-5)
    # And prefloop itself, by the run's directory: adapters upon adapters too.
    more = {"data": data, "eval_data": data, "batch_size": 3, "lora_rank": rank}
    train("sft", world, tmp_path / "more", model=str(tmp_path / "run"), **more)
    (line,) = lines(tmp_path / "more")
    assert line["loss"] == pytest.approx(last["eval/loss"], abs=1e-4)
    train("sft", world, tmp_path / "third", model=str(tmp_path / "more"), **more)
    assert lines(tmp_path / "third")[0]["loss"] == pytest.approx(line["eval/loss"], abs=1e-4)


def test_every_assistant_turn_of_a_chat_is_trained(world, tmp_path):
    model = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(world / "model").save_pretrained(model)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.save_pretrained(model)
    turns = [("user", "a boat"), ("assistant", "oath"), ("user", "that"), ("assistant", "the bath")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = str(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]))
    train("sft", world, tmp_path / "run", data=data, model=str(model), batch_size=1)
    # By hand: ChatML, with the loss on "oath<|im_end|>" and "the bath<|im_end|>".
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    parts = text.replace("assistant\n", "assistant\n\0").replace("<|im_end|>", "<|im_end|>\0")
    ids, trained = [], []
    for part in parts.split("\0"):
        piece = tokenizer(part)["input_ids"] if part else []
        trained += [part in ("oath<|im_end|>", "the bath<|im_end|>")] * len(piece)
        ids += piece
    assert sum(trained) == len("oath") - 1 + 1 + len(tokenizer("the bath")["input_ids"]) + 1
    plain = AutoModelForCausalLM.from_pretrained(world / "model")
    log_probs = token_log_probs(plain, ids[:1], ids[1:])
    expected = -log_probs[torch.tensor(trained[1:])].mean().detach()
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
