from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefloop.config import ChatConfig, GenerateConfig, SampleConfig
from prefloop.console.chat import chat
from prefloop.data import formats
from prefloop.data.tokenize import decode_answer, encode_prompt, stop_token_ids
from prefloop.errors import UserError
from prefloop.generation.commands import generate, sample
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.load import load_policy
from prefloop.records import Message, RowCounts
from prefloop.terminal import shown
from tests.generation.naive import greedy
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [{"role": "user", "content": "the cab"}]
ROWS = [
    {"prompt": "the ab", "topic": "cabs", "tiers": [[0], [1]], "completions": ["x", "y"]},
    {"prompt": CHAT, "label": True},
    {"prompt": "a"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_writes_what_the_engine_draws(folder: str, tmp_path: Path) -> None:
    config = SampleConfig(
        dtype="float32",
        model=folder,
        data=written(tmp_path / "prompts.jsonl", ROWS),
        output=tmp_path / "sub" / "samples.jsonl",
        samples_per_prompt=3,
        max_new_tokens=6,
        temperature=0.7,
        max_length=64,
        seed=4,
        max_concurrent=4,
    )
    sample(config)
    rows = read(config.output)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    assert rows[0]["topic"] == "cabs"
    assert not any({"tiers", "label"} & row.keys() for row in rows)
    assert rows[0]["sampling"] == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 6,
    }
    assert (rows[0]["seed"], rows[0]["model"]) == (4, folder)

    model = load_policy(folder, torch.device("cpu"))
    stops = stop_token_ids(model.tokenizer, model.hf.generation_config)
    texts = ["the ab", (Message("user", "the cab"),), "a"]
    drawn = Engine(model).generate(
        [encode_prompt(model.tokenizer, text) for text in texts],
        3,
        Sampling(max_new_tokens=6, temperature=0.7, stop_token_ids=stops),
        seed=4,
    )
    for row, samples in zip(rows, drawn, strict=True):
        answers = [decode_answer(model.tokenizer, s.tokens) for s in samples]
        assert row["completions"] == answers
        assert row["finish_reasons"] == [s.finish_reason for s in samples]
        assert row["log_probs"] == pytest.approx([sum(s.log_probs) for s in samples], abs=1e-5)

    before = config.output.read_bytes()
    sample(config)
    assert config.output.read_bytes() == before
    # What was sampled is a file of prompts again, and of no rankings yet.
    assert len(formats.load(str(config.output), "prompt", RowCounts())) == 3
    with pytest.raises(UserError):
        formats.load(str(config.output), "preference", RowCounts())


def test_long_prompts_are_refused_dropped_or_cut(folder: str, tmp_path: Path) -> None:
    data = written(tmp_path / "prompts.jsonl", [{"prompt": "b"}, {"prompt": "b" * 30}])
    config = SampleConfig(
        dtype="float32",
        model=folder,
        data=data,
        output=tmp_path / "out.jsonl",
        max_new_tokens=4,
        max_length=24,
    )
    with pytest.raises(UserError, match=r"prompts.jsonl:2: .*30.*over the limit of 20"):
        sample(config)
    assert not config.output.exists()
    sample(replace(config, truncation="drop"))
    assert [row["prompt"] for row in read(config.output)] == ["b"]
    sample(replace(config, truncation="left"))
    assert len(read(config.output)) == 2


@pytest.mark.parametrize("name", ["out.csv", "."])
def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path: Path, name: str) -> None:
    config = SampleConfig(
        dtype="float32", model="nowhere", data="nowhere.jsonl", output=tmp_path / name
    )
    with pytest.raises(UserError, match="jsonl"):
        sample(config)


def test_generate_prints_or_writes(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GenerateConfig(
        dtype="float32",
        model=folder,
        prompt=("the ab", "a"),
        temperature=0,
        max_new_tokens=5,
        max_length=64,
    )
    tokenizer, model = tiny_tokenizer(), tiny_model()
    expected = [
        decode_answer(tokenizer, greedy(model, encode_prompt(tokenizer, text), 5, stop=4))
        for text in config.prompt
    ]
    generate(config)
    assert capsys.readouterr().out == "\n\n".join(map(shown, expected)) + "\n"

    output = tmp_path / "answers.jsonl"
    data = written(tmp_path / "p.jsonl", [{"prompt": "the ab", "n": 1}, {"prompt": "a", "n": 2}])
    generate(replace(config, prompt=(), data=data, output=output))
    rows = read(output)
    assert [(row["prompt"], row["n"], row["completion"]) for row in rows] == [
        ("the ab", 1, expected[0]),
        ("a", 2, expected[1]),
    ]
    assert [decode_answer(tokenizer, row["completion_ids"]) for row in rows] == expected
    assert [row["completion_finish_reason"] for row in rows] == ["length", "length"]
    generate(replace(config, prompt=(), data=data, output=output, max_prompts=1))
    assert len(read(output)) == 1


def test_chat_remembers_and_forgets(folder: str) -> None:
    config = ChatConfig(
        dtype="float32", model=folder, temperature=0, max_new_tokens=6, max_length=48, system="ab"
    )
    out = io.StringIO()
    chat(config, io.StringIO("the cab\n\n a\n" + "b" * 60 + "\nthe cab\n"), out)

    tokenizer, model = tiny_tokenizer(), tiny_model()
    history = [Message("system", "ab")]
    expected = ""

    def answer(line: str) -> int:
        nonlocal expected
        history.append(Message("user", line))
        ids = encode_prompt(tokenizer, tuple(history))
        text = decode_answer(tokenizer, greedy(model, ids, 6, stop=4))
        history.append(Message("assistant", text))
        expected += text + "\n"
        return len(ids)

    def forget(line: str, keep: list[Message]) -> None:
        nonlocal history, expected
        ids = encode_prompt(tokenizer, (*history, Message("user", line)))
        expected += f"({len(ids)} tokens, 42 fit: the oldest turn is cut)\n"
        history = keep

    assert answer("the cab") <= 42
    forget("a", history[:1])
    answer("a")
    forget("b" * 60, history[:1])
    forget("b" * 60, history[:1])
    answer("the cab")
    assert out.getvalue() == expected


def test_chat_needs_a_template(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        chat(ChatConfig(dtype="float32", model=str(tmp_path)), io.StringIO("hello\n"))
