"""The benchmarks' rows, turns and sums, without their peers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import (
    balance,
    compare,
    gradients,
    growth,
    llama_side,
    margins,
    optimizers,
    ranks,
    ranks_side,
    startup,
)
from benchmarks.ceilings import model_flops, weight_bytes
from benchmarks.meter import MARK
from benchmarks.sides import Form, forms
from benchmarks.work import WORKS, Work, write_rows
from safetensors.torch import load_file

from prefloop import distributed
from prefloop.labelling.export import read_records
from prefloop.models.load import load_policy
from prefloop.models.weights import Storage
from prefloop.recipes.fetch import RatedSentence
from prefloop.records import RowCounts
from tests.training.small import write_world

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny policy, reference and scorer, under the names that the sides look for."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    (folder / "policy").symlink_to(folder / "model")
    (folder / "scorer").symlink_to(folder / "rm")
    return folder


@pytest.fixture
def rows(tmp_path):
    def write(answers, count=1):
        completions = [" the oath" + " in" * i for i in range(answers)]
        text = json.dumps({"prompt": "a boat", "completions": completions}) + "\n"
        path = tmp_path / "rows.jsonl"
        path.write_text(text * count)
        return str(path)

    return write


def turns(module, *words, count=2):
    """What a side tells of its turns."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = process.communicate("turn\n" * count, timeout=120)
    ready, *found = (json.loads(x.removeprefix(MARK)) for x in told.splitlines() if MARK in x)
    assert ready == {"ready": True}
    assert len(found) == count
    return found


def number_of_words(text):
    return len(text.split())


def test_rows_have_the_wanted_lengths(tmp_path):
    work = Work("dpo", 5, (4, 12), (2, 10), 2)
    write_rows(work, ["a b c", "d e f g", "h i"], number_of_words, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(number_of_words(row["prompt"]) for row in rows) == [4, 6, 8, 10, 12]
    answers = [number_of_words(answer) for row in rows for answer in row["completions"]]
    assert sorted(answers) == [2 + 8 * i // 9 for i in range(10)]
    assert all(answer.startswith(" ") for row in rows for answer in row["completions"])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("sft", "later"),
        ("reward-4", "later"),
        ("dpo", "first"),
        ("dpo-lora", "later"),
        pytest.param("memory", "checkpointing", marks=pytest.mark.slow),
        pytest.param("ppo", "later", marks=pytest.mark.slow),
        ("generate", "later"),
        pytest.param("decode-8", "later", marks=pytest.mark.slow),
    ],
)
def test_prefloops_side_takes_turns(name, form, models, rows):
    """One turn and another: an answer each, with seconds, memory and a loss that falls."""
    work = WORKS[name]
    path = rows(work.answers, count=1 if work.kind == "reward" else 2)
    first, second = turns("prefloop_side", name, path, models, "float32", form)
    for turn in (first, second):
        assert turn["tokens"] > 0
        assert turn["cpu"] > 0
        assert turn["wall"] > 0
        assert turn["peak_gib"] > 0.05
        assert ("flops" in turn) == (work.kind != "generate")
    if work.kind in ("sft", "reward", "dpo"):
        assert second["same"]["loss"] < first["same"]["loss"]
        assert ("logps" in first["same"]) == (work.kind == "dpo")
    elif work.kind == "ppo":
        assert first["tokens"] == 2 * work.answer[1]
        assert math.isfinite(first["alike"]["kl"])
    else:
        assert first["same"]["prompt_log_prob"] < 0
        assert first.get("steps") == (None if work.stops else work.answer[1])


@pytest.mark.parametrize(
    "form", ["generate", pytest.param("generate-batch", marks=pytest.mark.slow)]
)
def test_transformers_side_takes_turns(form, models, rows):
    for turn in turns("transformers_side", "decode-8", rows(1), models, "float32", form):
        assert turn["tokens"] == WORKS["decode-8"].answer[1]


SMALL = {"max_length": 32, "micro_batch_tokens": 64, "batch_size": 4, "dtype": "float32"}


def test_one_process_holds_the_whole_model(models, tmp_path):
    """Its weights as the file has them; as much of gradients, and twice as much of moments, beside
    a step's number (float32) for each tensor.
    """
    settings = ranks.COMMON | SMALL | {"model": str(models / "policy")}
    ranks_side.main(json.dumps(settings), str(tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    sizes = [t.nbytes for t in load_file(models / "policy" / "model.safetensors").values()]
    assert found["weights"] == found["gradients"] == sum(sizes)
    assert found["moments"] == 2 * sum(sizes) + 4 * len(sizes)
    assert found["rate"] > 0


@pytest.mark.slow
def test_two_processes_hold_half_each(models):
    settings = ranks.COMMON | SMALL | {"model": str(models / "policy")}
    found = ranks.on_ranks(settings, count=2, threads=1)
    whole = sum(t.nbytes for t in load_file(models / "policy" / "model.safetensors").values())
    assert found["weights"] == found["gradients"]
    assert found["moments"] >= 2 * found["weights"]
    assert whole / 2 <= found["weights"] <= 0.55 * whole
    assert found["rate"] > 0


@pytest.mark.slow
def test_growths_side_takes_turns(models):
    shape = {"rows": 2, "answers": 3, "prompt": 5, "answer": 4}
    for decode, tokens in ((False, 2 * (5 + 3 * 4)), (True, 2 * 3 * 4)):
        point = json.dumps(shape | {"decode": decode})
        assert turns("growth_side", models / "policy", "float32", point)[1]["tokens"] == tokens


def test_model_flops_by_hand(models):
    """Two tokens of one sequence, the head on one row."""
    model = load_policy(str(models / "policy"), CPU)
    config = model.hf.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    matrices = layers * (2 * width * q + 2 * width * k + 3 * width * inner)
    head, seen = width * config.vocab_size, 1 + 2
    forward = 2 * 2 * matrices + 2 * head + 4 * layers * q * seen
    assert model_flops(model, torch.tensor([0, 1]), 1, trains=False) == forward
    assert model_flops(model, torch.tensor([0, 1]), 1, trains=True) == 3 * forward
    assert weight_bytes(model, torch.bfloat16) == 2 * (matrices + head)


def test_adapters_alone_need_no_gradient_of_the_weights(models):
    positions = torch.tensor([0, 1])
    whole = load_policy(str(models / "policy"), CPU)
    small = load_policy(str(models / "policy"), CPU, lora_rank=1)
    forward = model_flops(small, positions, 1, trains=False)
    trained = model_flops(small, positions, 1, trains=True)
    assert 2 * forward < trained < 3 * forward
    assert forward > model_flops(whole, positions, 1, trains=False)


def test_shares_of_the_ceilings_by_hand():
    ceilings = {"float32": 100.0, "bfloat16": 200.0, "bandwidth": 10.0}
    training = [{"wall": 2.0, "flops": 200e9}]
    assert compare._shares(training, "bfloat16", ceilings) == {"gflops": 100.0, "mfu": 0.5}
    decoding = [{"wall": 4.0, "steps": 8, "step_bytes": 1e9}]
    assert compare._shares(decoding, "float32", ceilings) == pytest.approx(
        {"step_ms": 500.0, "bandwidth_share": 0.2}
    )


def test_sampled_metrics_must_be_alike():
    def rounds(ours, theirs):
        return [
            tuple({"alike": {"kl": x}} for x in pair) for pair in zip(ours, theirs, strict=True)
        ]

    form = Form("trl_ppo_side", "best")
    compare._require_alike(form, rounds([1.0, 1.2, 0.8, 1.1], [1.1, 0.9, 1.0, 1.2]))
    with pytest.raises(SystemExit, match="another kl"):
        compare._require_alike(form, rounds([1.0, 1.2, 0.8, 1.1], [2.1, 1.9, 2.0, 2.2]))


def test_every_work_has_peers():
    assert all(forms(name) for name in WORKS)
    assert forms("memory")[0].ours == "checkpointing"


def test_a_revision_takes_the_settings_that_the_peers_are_compared_with():
    found = [Form("prefloop_side", form, form) for form in ("first", "later")]
    assert list(forms("dpo", "7357f06")) == found
    assert forms("sft", "7357f06") == (Form("prefloop_side", "later", "later"),)


@pytest.mark.parametrize("method", gradients.METHODS)
def test_bfloat16_gradients_are_compared(method, models, rows):
    work = gradients.METHODS[method]
    found = gradients.compare(method, work, rows(WORKS[work].answers, count=2), str(models))
    assert found.keys() == ({"policy", "value"} if method == "ppo" else {*found})
    for sides in found.values():
        for side in ("prefloop", "stock"):
            assert 0.98 < sides[side]["cosine"][0] < 0.9999999
            assert 0.9 < sides[side]["norm"][0] < 1.1


def test_a_loss_of_precision_must_exceed_its_spread():
    assert gradients.loses_more([0.90, 0.91, 0.89], [0.99, 0.99, 0.98])
    assert not gradients.loses_more([0.99, 0.98, 0.99], [0.99, 0.99, 0.98])


class CountingEngine:
    """In place of llama.cpp: draws 1 more than the token read, and 0, a stop, after 9."""

    def __init__(self):
        self.shared, self.calls = [], []

    def clear(self):
        pass

    def share(self, source, target):
        self.shared.append((source, target))

    def read(self, tokens):
        self.calls.append(list(tokens))

    def draw(self, place):
        return (self.calls[-1][place][0] + 1) % 10


def test_llamas_side_stops_and_counts():
    engine = CountingEngine()
    work = Work("generate", 2, (1, 2), (4, 4), 2)
    prompts, stops = [[3, 7], [8]], frozenset({0})
    # 7 goes on with 8 9 0, 8 with 9 0: two answers each
    assert llama_side.generate(engine, work, prompts, stops) == 2 * 3 + 2 * 2
    assert engine.shared == [(0, 1), (2, 3)]
    assert engine.calls[0] == [(3, 0, 0, False), (7, 1, 0, True), (8, 0, 2, True)]
    assert engine.calls[1] == [(8, 2, 0, True), (8, 2, 1, True), (9, 1, 2, True), (9, 1, 3, True)]
    assert engine.calls[2] == [(9, 3, 0, True), (9, 3, 1, True)]
    assert len(engine.calls) == 3


def test_llamas_side_ends_at_the_most_tokens():
    work = Work("generate", 1, (1, 1), (4, 4), 1)
    assert llama_side.generate(CountingEngine(), work, [[1]], frozenset({0})) == 4


def test_the_heaviest_rank_by_hand():
    """In turn 8 and 2 tokens, at best 5 and 5; of 5 rows two steps of 2 are full."""
    assert balance.ratio([4, 1, 4, 1], 2, balance.in_turn) == 8 / 5
    assert balance.ratio([4, 1, 4, 1], 2, distributed.shares) == 1
    assert balance.ratios([3] * 5, 2, 2, balance.in_turn) == [1, 1]


def test_padded_pairs_by_hand():
    assert growth.Point(rows=2, answers=4, prompt=10, answer=5).padded_pairs == 2 * 6 * 2 * 15


def test_growth_is_drawn(tmp_path):
    found = {
        title: [
            {field: v, "cpu": 1.0, "peak_gib": 2.0, "per_second": 3.0, "tokens": 4}
            | {"padded_pairs": 5}
            for v in values
        ]
        for title, (field, values, _) in growth.SERIES.items()
    }
    growth.draw(found, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").stat().st_size > 10_000


def test_startup_times_the_help():
    found = startup.to_the_end(("--help",), dict(os.environ))
    assert 0 < found["cpu"] < 60
    assert startup.cpu_seconds(os.getpid()) > 0


def test_held_out_losses_are_compared_seed_by_seed():
    """1.00 to 1.01 and 2.00 to 1.96: 2 %, though the means are nearer."""
    start = {"sft": {"float32": 3.0, "bfloat16": 3.0}}
    told = optimizers.table({"sft": {"a": [1.0, 2.0], "b": [1.01, 1.96]}}, start)
    assert told[2:] == [
        "| sft | a | 1.0000 · 2.0000 (mean 1.5000) | 0.00% |",
        "| sft | b | 1.0100 · 1.9600 (mean 1.4850) | 2.00% |",
        "| sft | before training | 3.0000 | |",
    ]


def test_every_form_learns_from_the_same_start(models, tmp_path):
    """Also bfloat16 weights, whose copy must not be the weights themselves."""
    model = load_policy(str(models / "policy"), CPU, Storage("bfloat16", "bfloat16"), trained=True)
    first = optimizers.first_weights(model)
    rows = [{"prompt": "a boat", "completion": f" the oath{' in' * n}"} for n in range(9)]
    for name in ("sft", "sft-held-out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started, ended = optimizers.train("sft", model, tmp_path, "adamw", seed=0)
    optimizers.put_back(model, first)
    again, other = optimizers.train("sft", model, tmp_path, "adamw", seed=1)
    assert started == again
    assert ended != other
    assert ended < started


def test_simulated_labellers_say_by_how_much(tmp_path):
    """Ratings 4, 1, 0 and -4: differences of 8, 5, 4, 3 and 1 are much, much, clearly, clearly and
    slightly better, whose margins are 1, 1, 2/3, 2/3 and 1/3."""
    rated = {" best": 4, " good": 1, " fair": 0, " bad": -4}
    sentences = [RatedSentence(text.strip(), (rating,)) for text, rating in rated.items()]
    store = margins.label(sentences, tmp_path, 0, 600)
    records = read_records(store, "preference", RowCounts(), margins=True)
    share = {8: 1.0, 5: 1.0, 4: 2 / 3, 3: 2 / 3, 1: 1 / 3}
    assert len(records) == 12  # each two texts in both orders
    for record in records:
        ((winner, loser),) = record.pairs()
        texts = record.completions
        assert record.margin == share[rated[texts[winner]] - rated[texts[loser]]]
