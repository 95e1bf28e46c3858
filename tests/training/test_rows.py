"""Rows of training: several sources for each setting, and bad rows that only training finds."""

import json
import math
from pathlib import Path

import pytest

from prefloop import SFTConfig, sources
from prefloop.cli import main
from prefloop.config.resolve import resolve
from prefloop.data.batches import TokenBatch
from prefloop.data.stream import mixed_order
from prefloop.errors import UserError
from prefloop.labelling.assign import next_assignment, submit
from prefloop.records import RowCounts
from tests.labelling.small import add, in_order, open_store, put
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import REWARDS, assert_same_run, lines, train, write_rows
from tests.training.test_ppo import built

PTX = {"ptx_coef": 0.5, "batch_size": 4, "ppo_epochs": 2, "max_new_tokens": 3}


@pytest.fixture
def two(tmp_path):
    """Two files of six demonstrations."""
    for name in "ab":
        answers = [{"prompt": f"{name}{n}", "completion": f" {n}"} for n in range(6)]
        write_rows(tmp_path / f"{name}.jsonl", answers)
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def used(folder, of):
    return json.loads((folder / "run.json").read_text())["rows"][of]["used"]


# --- several sources -----------------------------------------------------------------------------


def test_held_out_rows_come_from_several_sources(two, world, tmp_path):
    """As from one file that holds the rows of both."""
    both = tmp_path / "both.jsonl"
    both.write_text("".join(Path(path).read_text() for path in two))
    for name, eval_data in (("two", two), ("one", str(both))):
        train("sft", world, tmp_path / name, batch_size=9, eval_data=eval_data)
        assert used(tmp_path / name, "eval_data") == 12
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert "eval/loss" in lines(tmp_path / "two")[-1]


def test_one_held_out_source_is_told_alike_however_it_was_given():
    words = ["--model", "m", "--output", "o", "--data", "d.jsonl", "--eval-data"]
    assert resolve(SFTConfig, None, [*words, "a.jsonl"]).eval_data == "a.jsonl"
    assert resolve(SFTConfig, None, [*words, "a.jsonl", "b"]).eval_data == ("a.jsonl", "b")


@pytest.mark.parametrize("weighted", [("{a}=0.7",), ("{a}=1", "{b}=2"), ("{a}", "{b}=2")])
def test_held_out_rows_have_no_weights(weighted, two, world, tmp_path):
    given = tuple(source.format(a=two[0], b=two[1]) for source in weighted)
    with pytest.raises(UserError, match=r"--eval-data .*=[\d.]+: weights share out the rows of tr"):
        train("sft", world, tmp_path / "run", eval_data=given)
    assert not (tmp_path / "run").exists()


def test_commands_that_use_all_rows_take_no_weight(two, world, capsys):
    words = f"generate --model {world / 'model'} --device cpu --data {two[0]}=0.5"
    assert main(words.split()) == 2
    assert "a.jsonl=0.5: weights share out the rows of training" in capsys.readouterr().err


def test_what_is_wrong_names_the_setting(two, world, tmp_path):
    with pytest.raises(UserError, match=r"^--eval-data .*a\.jsonl is given twice"):
        train("sft", world, tmp_path / "run", eval_data=(two[0], two[0]))
    with pytest.raises(UserError, match=r"^--sft-data .*give each source a weight"):
        train("ppo", world, tmp_path / "run", sft_data=(f"{two[0]}=1", two[1]), **PTX)


def test_ptx_rows_are_drawn_by_weight(two, world, tmp_path):
    data = (f"{two[0]}=1", f"{two[1]}=3")
    ppo = built(world, tmp_path, sft_data=data, max_steps=6, **PTX)
    drawn = [
        e.index
        for step in ppo.steps(0)
        for item in step.batches
        if isinstance(item, TokenBatch)
        for e in item.examples
    ]
    parts = [0] * 6 + [1] * 6
    epochs = [row for epoch in range(2) for row in mixed_order(parts, (1, 3), 0, epoch)]
    assert sorted(drawn) == sorted(epochs[:24])
    assert sum(row < 6 for row in drawn) == 6  # 24 rows, a quarter of them from the first


def test_ptx_rows_of_several_sources_are_those_of_one(two, world, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text("".join(Path(path).read_text() for path in two))
    for name, data in (("two", two), ("one", str(both))):
        train("ppo", world, tmp_path / name, sft_data=data, max_steps=3, **PTX)
        assert used(tmp_path / name, "sft_data") == 12
    assert_same_run(tmp_path / "two", tmp_path / "one")


# --- bad rows ------------------------------------------------------------------------------------


def dropped(folder):
    counts = json.loads((folder / "run.json").read_text())["rows"]["data"]
    return counts["dropped"], [row["line"] for row in lines(folder, "bad_rows.jsonl")]


def test_margins_that_the_loss_does_not_read_are_bad_rows(world, tmp_path):
    pair = {"prompt": "a", "chosen": " boat", "rejected": " bath"}
    more = [pair | {"prompt": "in", "margin": margin} for margin in (0.5, 2, 1e-3)]
    data = str(write_rows(tmp_path / "pairs.jsonl", [pair, *more]))
    same = {"data": data, "loss": "ipo", "bad_rows": "drop"}
    train("dpo", world, tmp_path / "run", **same)
    reasons, where = dropped(tmp_path / "run")
    assert reasons == {"bad row: `margin` is N, and --loss ipo reads none": 3}
    assert where == [f"{data}:{n}" for n in (2, 3, 4)]


def test_turns_out_of_the_loss_are_bad_rows_where_all_is_trained(world, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    kept = [*said, said[0], {**said[1], "train": False}]
    data = str(write_rows(tmp_path / "m.jsonl", [{"messages": m} for m in (said, kept)]))
    same = {"model": str(tmp_path / "m"), "data": data, "train_on": "all"}
    with pytest.raises(UserError, match=r"m\.jsonl:2: flags keep turns out of the loss"):
        train("sft", world, tmp_path / "run", **same)
    train("sft", world, tmp_path / "run", bad_rows="drop", **same)
    assert dropped(tmp_path / "run")[1] == [f"{data}:2"]


def test_rows_without_a_column_that_the_reward_needs_are_bad_rows(world, tmp_path):
    rows = [{"prompt": "a", "wanted": 1}, {"prompt": "in"}, {"prompt": "boat", "wanted": 2}]
    data = str(write_rows(tmp_path / "p.jsonl", rows))
    same = {"data": data, "reward_function": f"{REWARDS}:near_wanted", "max_steps": 1}
    with pytest.raises(UserError, match=r"p\.jsonl:2: no column `wanted`"):
        train("ppo", world, tmp_path / "run", **same)
    train("ppo", world, tmp_path / "run", bad_rows="drop", **same)
    assert dropped(tmp_path / "run")[1] == [f"{data}:2"]


def test_positions_that_end_are_no_bad_rows(world, tmp_path):
    """Too long for the model is too long: dropping such rows is --truncation's."""
    tiny_model("gpt2", n_positions=24).save_pretrained(tmp_path / "m")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "m")
    data = str(write_rows(tmp_path / "d.jsonl", [{"prompt": "a " * 40, "completion": "b"}]))
    same = {"model": str(tmp_path / "m"), "data": data, "max_length": 900}
    with pytest.raises(UserError, match=r"d\.jsonl:1: .*exact up to \d+ only; lower --max-length"):
        train("sft", world, tmp_path / "run", bad_rows="drop", **same)


def test_a_kind_that_there_is_not_is_told(two):
    for read in (sources.load, sources.load_parts):
        with pytest.raises(UserError, match=r"no kind 'pairs' of rows; give one of demonstration,"):
            read(two[0], "pairs", RowCounts())


@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_margins_of_what_labellers_said_reach_the_loss(command, world, tmp_path):
    """One pair, said to be much better and for sure: margin 1. DPO begins at d = 0."""
    pair = [{"prompt": "a", "completions": [" boat", " ant"]}]
    put(tmp_path, pair, mode="pairwise")
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    task = next_assignment(store, ann)
    submit(store, ann, task.id, in_order(task, "request-1", strength=3, confidence=3))
    store.close()
    found = []
    for asked in (False, True):
        run = tmp_path / str(asked)
        train(command, world, run, data=str(tmp_path / "labels.db"), label_margins=asked)
        found.append(lines(run)[0]["loss"])
    x = math.log(math.exp(found[0]) - 1)  # loss = log(1 + e^x), and with the margin x + 1
    assert found[1] == pytest.approx(math.log1p(math.exp(x + 1)), rel=1e-4)
    if command == "dpo":
        assert found == [pytest.approx(math.log(2)), pytest.approx(math.log1p(math.e))]
