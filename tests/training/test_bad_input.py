"""The user's mistakes through the command line: one line, exit 2, nothing half-written."""

import json
import math
import re
import shutil
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file

from prefloop.cli import main
from prefloop.config import DPOLoss
from prefloop.errors import UserError
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import REWARDS, checkpoint, flags, lines, settings, train, write_rows

SFT_ROWS = [{"prompt": "a boat", "completion": " took the bath"}] * 3
PAIR = {"prompt": "a", "chosen": " boat", "rejected": " bath"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def prefloop(capfd):
    """Runs a command line that fails, and returns the one line it told."""

    def run(command, config, *words):
        capfd.readouterr()
        assert main([command, *flags(config), *words]) == 2
        said = capfd.readouterr()
        *before, told = said.err.splitlines()
        assert told.startswith("prefloop: ")
        known = r".*: read \d+ rows, used \d+|planned memory of each rank: "
        assert all(re.match(known, line) for line in before)
        return told + "\n"

    return run


def text_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATA = {  # name: command, the file's bytes, flags, what the line says
    "malformed": ("sft", text_of(SFT_ROWS[:1]) + b'{"prompt": "a", \n', [], ["rows.jsonl:2:"]),
    "not an object": ("sft", b'["a"]\n', [], ["rows.jsonl:1:"]),
    "columns": ("sft", b'{"question": "a"}\n', [], ["rows.jsonl:1:", "question", "`prompt`+"]),
    "columns for dpo": ("dpo", text_of(SFT_ROWS), [], ["rows.jsonl:1:", "`chosen`+`rejected`"]),
    "type": ("sft", b'{"prompt": 3, "completion": "a"}\n', [], ["rows.jsonl:1:", "`prompt`"]),
    "empty": ("sft", b"", [], ["rows.jsonl:", "no rows"]),
    "empty for ppo": ("ppo", b"", [], ["rows.jsonl:", "no rows"]),
    "too long": (
        "sft",
        text_of(SFT_ROWS),
        ["--max-length", "8"],
        ["rows.jsonl:1:", "--truncation"],
    ),
    "prompt too long": (
        "ppo",
        b'{"prompt": "a boat took the bath"}\n',
        ["--max-length", "12"],
        ["rows.jsonl:1:", "limit", "--truncation"],
    ),
    "all dropped": (
        "sft",
        text_of(SFT_ROWS),
        ["--max-length", "8", "--truncation", "drop"],
        ["rows.jsonl: no rows left", "dropped 3 (longer than 8 tokens)"],
    ),
    "equal": ("dpo", text_of([PAIR, PAIR | {"rejected": " boat"}]), [], ["rows.jsonl:2:", "equal"]),
    "equal for the reward": ("reward", text_of([PAIR | {"rejected": " boat"}]), [], ["jsonl:1:"]),
    "not UTF-8": ("sft", text_of(SFT_ROWS) + b'{"prompt": "caf\xe9"}\n', [], ["jsonl:4:", "UTF-8"]),
    "messages": ("sft", text_of([{"messages": CHAT}]), [], ["rows.jsonl:1:", "chat template"]),
    "one prompt": ("sft", text_of(SFT_ROWS), ["--eval-fraction", "0.5"], ["--eval-data"]),
}


@pytest.mark.parametrize("name", DATA)
def test_rows(name, world, tmp_path, prefloop):
    command, content, words, expected = DATA[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content)
    output = tmp_path / "runs" / "run"
    said = prefloop(command, settings(command, world, output, data=str(rows)), *words)
    for part in expected:
        assert part in said
    assert not output.exists()


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("missing", ["tokenizer", "weights", "folder"])
def test_models(command, missing, world, tmp_path, prefloop):
    folder = tmp_path / "model"
    if missing != "folder":
        shutil.copytree(world / "model", folder)
    for path in folder.glob("*token*" if missing == "tokenizer" else "*.safetensors"):
        path.unlink()
    output = tmp_path / "run"
    said = prefloop(command, settings(command, world, output, model=str(folder)))
    assert str(folder) in said
    assert ("no tokenizer found" in said) == (missing == "tokenizer")
    assert not output.exists()


def test_a_missing_file(world, tmp_path, prefloop):
    said = prefloop("sft", settings("sft", world, tmp_path / "run", data="absent.jsonl"))
    assert "absent.jsonl: no such file" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lerning-rate", "1"], "unknown flag --lerning-rate"),
        (["--batchsize", "1"], "did you mean --batch-size?"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--loss", "hinge", "--label-smoothing", "0.1"], "--label-smoothing is read only with"),
    ],
)
def test_settings(words, expected, world, tmp_path, prefloop):
    assert expected in prefloop("dpo", settings("dpo", world, tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_file(world, tmp_path, prefloop):
    (tmp_path / "c.yaml").write_text("epoch: 2\n")
    said = prefloop(
        "sft", settings("sft", world, tmp_path / "run"), "--config", str(tmp_path / "c.yaml")
    )
    assert "unknown key `epoch`; did you mean epochs?" in said


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("raises", "failed: RuntimeError: out of ink"),
        ("one_too_few", "gave 3 scores for 4 answers"),
        ("not_a_number", "scores must be finite"),
        ("absent", "cannot import"),
    ],
)
def test_reward_functions(function, expected, world, tmp_path, prefloop):
    source = f"{REWARDS}:{function}"
    config = settings("ppo", world, tmp_path / "run", reward_function=source, batch_size=4)
    assert expected in prefloop("ppo", config)
    assert not (tmp_path / "run").exists()


def broken_model(world, folder):
    """One weight of the model is NaN."""
    shutil.copytree(world / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
def test_a_weight_that_is_not_a_number(command, world, tmp_path, prefloop):
    model = broken_model(world, tmp_path / "broken")
    said = prefloop(command, settings(command, world, tmp_path / "run", model=model))
    assert "nan" in said or "not finite" in said
    assert not (tmp_path / "run").exists()


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(world, tmp_path, prefloop):
    """The first step at such a learning rate makes weights whose loss is not finite."""
    output = tmp_path / "run"
    config = settings("sft", world, output, lr=1e30, batch_size=2, save_every=1)
    said = prefloop("sft", config)
    assert "step 2: the loss is" in said
    assert str(output / "checkpoints" / "step-1") in said
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-1"]
    assert checkpoint(output, 1)["step"] == 1
    assert [line["step"] for line in lines(output)] == [1]
    assert not (output / "model").exists()
    assert json.loads((output / "run.json").read_text())["status"] == "failed"


def test_a_run_of_other_settings_is_not_touched(world, tmp_path, prefloop):
    output = tmp_path / "run"
    assert main(["sft", *flags(settings("sft", world, output, batch_size=4))]) == 0
    before = (output / "metrics.jsonl").read_bytes()
    other = settings("sft", world, output, batch_size=2)
    assert "--batch-size was 4, now 2" in prefloop("sft", other)
    assert "holds a run already" in prefloop("sft", other, "--resume", "never")
    assert "holds a run of `sft`" in prefloop("dpo", settings("dpo", world, output))
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_broken_checkpoint(world, tmp_path, prefloop):
    output = tmp_path / "run"
    config = settings("sft", world, output, batch_size=2, max_steps=4, save_every=2)
    assert main(["sft", *flags(config)]) == 0
    state = output / "checkpoints" / "step-2" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    said = prefloop("sft", config, "--resume", str(state.parent))
    assert "state.pt has 1,000 bytes, not " in said


def test_a_language_model_is_no_reward_model(world, tmp_path, prefloop):
    """A language model given as the reward model would score with a random head."""
    config = settings("ppo", world, tmp_path / "run", reward_model=str(world / "model"))
    assert "not a reward model" in prefloop("ppo", config)
    assert not (tmp_path / "run").exists()


def test_a_set_of_mistakes_leaves_nothing_beside_the_output(world, tmp_path, prefloop):
    write_rows(tmp_path / "rows.jsonl", [{"question": "a"}])
    config = settings("sft", world, tmp_path / "run", data=str(tmp_path / "rows.jsonl"))
    prefloop("sft", config)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_beyond_the_models_positions_is_named_before_the_first_step(
    prefloop, world, tmp_path
):
    tiny_model("gpt2", n_positions=24).save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " boat" * 9}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"model": str(tmp_path / "model"), "data": str(data)}
    told = prefloop("sft", settings("sft", world, tmp_path / "run", **changes))
    assert "rows.jsonl:2: " in told
    assert "exact up to 24 only" in told
    assert not (tmp_path / "run").exists()


def test_kto_has_no_chosen_answer_to_imitate(prefloop, world, tmp_path):
    changes = {"loss": "kto", "sft_coefficient": 0.5, "data": str(world / "pairs.jsonl")}
    told = prefloop("dpo", settings("dpo", world, tmp_path / "run", **changes))
    assert "--sft-coefficient is read only with --loss" in told


@pytest.mark.parametrize(
    ("command", "loss"),
    [("reward", x) for x in ("plackett-luce", "rao-kupper", "davidson")]
    + [("dpo", x) for x in get_args(DPOLoss) if x != "sigmoid"],
)
def test_a_margin_that_the_loss_does_not_read_is_told(command, loss, world, tmp_path):
    """Whichever loss: the row, the loss, and what to do."""
    pair = {"prompt": "a", "chosen": " boat", "rejected": " ant"}
    data = write_rows(tmp_path / "pairs.jsonl", [pair, pair | {"chosen": " in", "margin": 0.5}])
    with pytest.raises(UserError) as caught:
        train(command, world, tmp_path / "run", data=str(data), loss=loss)
    assert f"{data}:2: `margin` is " in str(caught.value)
    assert f"--loss {loss} reads none; remove" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rankings_margin_is_of_each_of_its_pairs(world, tmp_path):
    """As its pairs with that margin, one row each."""
    ranking = {"prompt": "a", "completions": [" in", " ant", " boat"], "tiers": [[1], [0], [2]]}
    pairs = [
        {"prompt": "a", "chosen": chosen, "rejected": rejected, "margin": 2}
        for chosen, rejected in ((" ant", " in"), (" ant", " boat"), (" in", " boat"))
    ]
    for name, rows in (("one", [ranking | {"margin": 2}]), ("three", pairs), ("none", [ranking])):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        train("reward", world, tmp_path / name, data=str(data), batch_size=len(rows))
    one, three, none = (lines(tmp_path / x)[0]["loss"] for x in ("one", "three", "none"))
    assert one == pytest.approx(three, rel=1e-5)
    assert one > none + 1
    # DPO begins at d = 0: each pair costs log(1 + e^2) with the margin, log 2 without.
    for name, loss in (("one", math.log1p(math.exp(2))), ("three", math.log1p(math.exp(2)))):
        data = tmp_path / f"{name}.jsonl"
        run = tmp_path / f"dpo-{name}"
        train("dpo", world, run, data=str(data), batch_size=1 if name == "one" else 3)
        assert lines(run)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    data = write_rows(tmp_path / "pl.jsonl", [ranking | {"margin": 2}])
    with pytest.raises(UserError, match=r"pl.jsonl:1: `margin` is 2, and --loss plackett-luce"):
        train("reward", world, tmp_path / "pl", data=str(data), loss="plackett-luce")
