"""`init` writes pipelines that `run` takes; `run --dry-run` says what it would do, and does not."""

import re
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from prefloop.cli import main
from prefloop.config import DPOConfig, InitConfig, PPOConfig, SFTConfig
from prefloop.recipes import dry_run
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import write_rows, write_world

USES = get_args(get_type_hints(InitConfig)["use"])
HERE = {"output": "o", "data": "d"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def piped(path, *stages):
    text = yaml.safe_dump({"stages": [dict(zip(("name", "command", "settings"), s, strict=True))
                                      for s in stages]})  # fmt: skip
    path.write_text(text)
    return str(path)


def told(capsys, *words):
    """The lines of a dry run that say what a stage's state is, by its name; and all lines."""
    assert main(["run", *map(str, words), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = (re.fullmatch(r"\[\d/\d\] (\S+) \([\w -]+\): (.*)", line) for line in lines)
    return {found[1]: found[2] for found in stages if found}, lines


@pytest.mark.parametrize("use", USES)
def test_a_pipeline_that_init_writes_is_taken_and_says_what_to_fill_in(use, world, capsys):
    (world / "prompts.jsonl").unlink()
    assert main(["init", use, "--output", "mine.yaml"]) == 0
    assert capsys.readouterr().out == "mine.yaml\n"
    text = (world / "mine.yaml").read_text()
    assert "prefloop run mine.yaml --dry-run" in text
    marked = set(re.findall(r"^\s+data: (\S+\.jsonl) +# FILL IN", text, flags=re.MULTILINE))
    state, lines = told(capsys, "mine.yaml")
    assert list(state) == [stage["name"] for stage in yaml.safe_load(text)["stages"]]
    missing = {line.split(": ")[1] for line in lines if line.startswith("    not there yet")}
    assert missing == marked
    assert "FILL IN" in next(line for line in text.splitlines() if "      model: " in line)
    assert not (world / "runs").exists()


def test_init_writes_over_nothing(world, capsys):
    (world / "pipeline.yaml").write_text("mine")
    assert main(["init", "chat"]) == 2
    assert "--output pipeline.yaml exists" in capsys.readouterr().err
    assert (world / "pipeline.yaml").read_text() == "mine"


@pytest.mark.slow
def test_the_pipeline_for_chats_runs_once_it_is_filled_in(world, capsys):
    tiny_model().save_pretrained(world / "chat")
    tiny_tokenizer().save_pretrained(world / "chat")
    user = {"role": "user", "content": "the boat"}
    said = [{"role": "assistant", "content": text} for text in ("a bath", "thin")]
    asked = [{"prompt": [user | {"content": f"ant {n}"}]} for n in range(25)]
    talks = [{"messages": [*row["prompt"], said[0]]} for row in asked]
    write_rows(world / "conversations.jsonl", talks)
    pair = {"chosen": [said[0]], "rejected": [said[1]]}
    write_rows(world / "preferences.jsonl", [row | pair for row in asked])
    write_rows(world / "held-out-prompts.jsonl", asked[:3])
    assert main(["init", "chat"]) == 0
    text = (world / "pipeline.yaml").read_text()
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "chat")
    text = text.replace("my_judge:score", "tests.training.rewards:by_length")
    (world / "pipeline.yaml").write_text(text)
    assert main(["run", "pipeline.yaml"]) == 0
    assert (world / "runs/pipeline/compare/report.html").exists()
    state, _ = told(capsys, "pipeline.yaml")
    assert set(state.values()) == {"nothing changed, skipped"}


COMMON = {"device": "cpu", "dtype": "float32", "max_length": 64, "max_steps": 1, "batch_size": 4}
SFT = ("sft", "sft", {"model": "model", "data": "sft.jsonl"} | COMMON)
DPO = ("dpo", "dpo", {"model": "${sft}", "data": "pairs.jsonl"} | COMMON)


def test_states(world, capsys):
    """What has finished is skipped; what changed, and what stands on that, would run."""
    path = piped(world / "p.yaml", SFT, DPO)
    assert told(capsys, path)[0] == {"sft": "runs", "dpo": "runs, after sft"}
    assert main(["run", path]) == 0
    capsys.readouterr()
    assert set(told(capsys, path)[0].values()) == {"nothing changed, skipped"}
    changed = piped(world / "p.yaml", SFT, ("dpo", "dpo", DPO[2] | {"beta": 0.2}))
    assert told(capsys, changed)[0] == {
        "sft": "nothing changed, skipped",
        "dpo": "changed: runs anew, its old output is moved aside",
    }
    (world / "sft.jsonl").write_text((world / "sft.jsonl").read_text() * 2)
    assert told(capsys, path)[0]["dpo"] == "runs, after sft"
    assert (world / "runs/p/dpo/model").is_dir()
    assert not (world / "runs/p/dpo.old-1").exists()


def test_time_and_memory_are_those_of_the_model_that_stages_begin_from(world, capsys):
    """Two epochs of 9 rows, 4 a step: 5 steps. What DPO and PPO begin from is not there yet."""
    free = {"max_steps": 0, "epochs": 2}
    ppo = {"model": "${sft}", "reward_model": "rm", "data": "prompts.jsonl", "max_new_tokens": 8}
    path = piped(
        world / "p.yaml",
        (*SFT[:2], SFT[2] | free),
        ("late", "dpo", DPO[2] | {"data": "later.jsonl"}),
        ("ppo", "ppo", ppo | COMMON | free | {"ppo_epochs": 2}),
    )
    _, lines = told(capsys, path)
    planned = [line.strip() for line in lines if line.startswith("    ")]
    assert re.fullmatch(
        r"5 steps, [\d,]+ tokens: about \d+ s; [\d.]+ MiB at most, in .*", planned[0]
    )
    assert planned[1] == "not there yet: later.jsonl"
    assert re.match(r"[\d.]+ MiB at most, in .*; time is known once its rows are there", planned[2])
    assert planned[3].startswith("10 steps, ")
    assert re.fullmatch(r"in all: about \d+ s, and what late may take", lines[-1])


def test_tokens_are_counted(world):
    """Four rows of 3 prompt and 2 answer tokens, two epochs of two steps of two: 40 tokens."""
    write_rows(world / "r.jsonl", [{"prompt": "bcd", "completion": "ef"}] * 4)
    settings = SFTConfig(
        model="model", data="r.jsonl", output=world / "o", epochs=2, batch_size=2, max_length=64
    )
    tokens, steps = dry_run._tokens(settings)
    answer_end = 1
    assert (tokens, steps) == (2 * 4 * (3 + 2 + answer_end), 4)


def test_operations_a_token():
    assert dry_run._passes(SFTConfig(model="m", **HERE)) == 6
    assert dry_run._passes(SFTConfig(model="m", **HERE, lora_rank=4)) == 4
    assert dry_run._passes(SFTConfig(model="m", **HERE, gradient_checkpointing=True)) == 8
    assert dry_run._passes(DPOConfig(model="m", **HERE)) == 8
    assert dry_run._passes(DPOConfig(model="m", **HERE, loss="simpo")) == 6
    ppo = PPOConfig(model="m", **HERE, reward_model="r", ppo_epochs=2)
    # Sampled at 4 times the cost of reading; three others read; two passes over policy and critic.
    assert dry_run._passes(ppo) == 2 * (4 + 3) + 6 * 2 * 2


def test_weights_a_token_meets(world):
    """The tiny model's head is a matrix of its own: its table of embeddings is only looked up."""
    model = tiny_model("llama")
    table = model.get_input_embeddings().weight
    own = model.get_output_embeddings().weight is not table
    count = sum(parameter.numel() for parameter in model.parameters())
    assert dry_run._weights("model") == count - own * table.numel()


def test_the_speed_is_that_of_products():
    speed = dry_run._speed(torch.device("cpu"), torch.float32)
    assert 1e8 < speed < 1e14
