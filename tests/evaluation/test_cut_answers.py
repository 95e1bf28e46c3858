"""Judges know which answers were cut, and score those of no tokens too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefloop.data.batches import TokenBatch, pack
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import Example, encode_prompt
from prefloop.evaluation import winrate
from prefloop.files import write_jsonl
from prefloop.models.heads import answer_scores
from prefloop.models.load import load_scorer
from prefloop.models.model import LoadedModel
from prefloop.records import Message, Text
from prefloop.rewards import scorers
from prefloop.rewards.scorers import ModelJudge
from tests.tiny import tiny_model, tiny_tokenizer

NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CPU = torch.device("cpu")


def scorer(folder: Path, template: str | None = None) -> LoadedModel:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=template is not None, template=template).save_pretrained(folder)
    return load_scorer(str(folder), CPU, seed=0)


@torch.no_grad()
def by_hand(model: LoadedModel, prompt: Text, answer: list[int]) -> float:
    head = tuple(encode_prompt(model.tokenizer, prompt))
    ids = (*head, *answer)
    example = Example(ids[:1], (ids[1:],), ((True,) * (len(ids) - 1),))
    return float(answer_scores(model, pack([example]).to(CPU))[0])


def test_a_cut_answer_is_scored_without_a_stop_token(tmp_path: Path) -> None:
    model = scorer(tmp_path)
    ids = Encoder(model.tokenizer).answer("a:", "bc")
    expected = [by_hand(model, "a:", ids), by_hand(model, "a:", ids[:-1])]
    expected += [by_hand(model, "a:", ids[-1:]), by_hand(model, "a:", [])]
    judge = ModelJudge(model, 100)
    told = judge(["a:"] * 4, ["bc", "bc", "", ""], [True, False, True, False])
    assert told == pytest.approx(expected, abs=1e-5)


def test_a_prompt_is_computed_once_for_answers_that_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scorer(tmp_path)
    prompts, answers = ["abcdefgh:", "abcdefgh:", "ij:", "abcdefgh:"], ["k", "lm", "n", "o"]
    encoder = Encoder(model.tokenizer)
    ids = [encoder.answer(*both) for both in zip(prompts, answers, strict=True)]
    expected = [by_hand(model, p, own) for p, own in zip(prompts, ids, strict=True)]
    heads = [len(encode_prompt(model.tokenizer, prompt)) for prompt in prompts]
    computed: list[int] = []

    def counted(model: LoadedModel, batch: TokenBatch) -> torch.Tensor:
        computed.append(batch.input_ids.numel())
        return answer_scores(model, batch)

    monkeypatch.setattr(scorers, "answer_scores", counted)
    assert ModelJudge(model, 1000)(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert sum(computed) == sum(heads) - heads[1] + sum(map(len, ids))


def test_an_empty_answer_that_nothing_ends_is_scored_at_its_prompt(tmp_path: Path) -> None:
    model = scorer(tmp_path, NO_STOP)
    prompt = (Message("user", "a"),)
    assert Encoder(model.tokenizer).answer(prompt, (Message("assistant", ""),)) == []
    told = ModelJudge(model, 100)([prompt], [""])
    assert told == pytest.approx([by_hand(model, prompt, [])], abs=1e-5)


def test_winrate_reads_finish_reasons(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "p", "completions": ["a", "b"], "finish_reasons": ["stop", "length"]},
        {"prompt": "p", "completion": "c", "completion_finish_reason": "length"},
        {"prompt": "p", "completion": "d"},
        {"prompt": "p", "completions": ["e", "f"], "finish_reasons": [None, "length"]},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (said,) = winrate._read_answers(tmp_path / "a.jsonl").values()
    assert [(text, ended) for text, ended, _ in said] == [
        *(("a", True), ("b", False), ("c", False), ("d", True), ("e", True), ("f", False)),
    ]
