import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.commands import show_comparison
from prefloop.config import CompareConfig
from prefloop.errors import UserError
from prefloop.evaluation.compare import compare
from prefloop.evaluation.frontier import best_of_n_kl
from prefloop.files import read_rows, write_jsonl
from prefloop.intervals import Interval
from prefloop.models.export import export_model
from prefloop.models.load import load_scorer
from prefloop.rewards.judges import load_judge
from prefloop.rewards.llm import CUT
from tests.evaluation.llm_server import Reply, section, serving
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ("The film", "A", "It is", "What")


def vowels(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def folder(path: Path, seed: int) -> str:
    tiny_model(seed=seed).save_pretrained(path)
    tiny_tokenizer(chat=False).save_pretrained(path)
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    sft, other = folder(tmp_path / "sft", 0), folder(tmp_path / "other", 1)
    export_model(load_scorer(sft, torch.device("cpu")), tmp_path / "reward")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return CompareConfig(
        sft=sft,
        models=(f"same={sft}", f"other={other}"),
        data=str(tmp_path / "prompts.jsonl"),
        judge="tests.evaluation.test_compare:vowels",
        output=tmp_path / "out",
        reward_model=str(tmp_path / "reward"),
        best_of=3,
        samples_per_prompt=2,
        max_new_tokens=12,
        device="cpu",
        dtype="float32",
    )


def test_an_answer_is_held_against_its_own_prompt(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied, where that is the answer's length times the sum of the prompt's ids."""
    monkeypatch.setattr(
        "prefloop.evaluation.compare.copied_share", lambda answer, prompt: len(answer) * sum(prompt)
    )
    sums = {prompt: sum(tiny_tokenizer(chat=False)(prompt)["input_ids"]) for prompt in PROMPTS}
    for way in compare(config).ways:
        rows = [row for row in read_answers(config) if row["way"] == way.name]
        beside = [len(tokens) * sums[row["prompt"]] for row in rows for tokens in row["tokens"]]
        assert way.vitals.copied == pytest.approx(sum(beside) / len(beside))


def read_answers(config: CompareConfig) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(config.output / "answers.jsonl")]


def sequence_log_prob(path: str, prompt: str, tokens: Sequence[int]) -> float:
    ids = tiny_tokenizer(chat=False)(prompt)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(tokens))


def test_compare(config: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = compare(config, notes=("A note.",))
    sft, best, same, other = result.ways
    assert [way.name for way in result.ways] == ["SFT", "best-of-3", "same", "other"]
    # 1. The SFT model against itself: the same seeds, so the same answers.
    assert same.vitals == sft.vitals
    said = {
        way: [r["completions"] for r in read_answers(config) if r["way"] == way]
        for way in ("SFT", "same")
    }
    assert said["same"] == said["SFT"]
    assert same.win_rate is not None
    assert same.win_rate.mean == pytest.approx(0.5, abs=0.1)
    assert same.vitals.kl.mean == pytest.approx(0.0, abs=1e-5)
    assert same.signs == ()
    # 2. Best-of-n has a bound.
    assert best.kl_is_bound
    assert best.vitals.kl.mean == best_of_n_kl(3)
    assert [point[0] for point in result.frontier] == [1, 2, 3]
    # 3. Files.
    rows = read_answers(config)
    assert len(rows) == 4 * len(PROMPTS)
    assert [len(row["completions"]) for row in rows[:8]] == [2] * 4 + [1] * 4
    numbers = json.loads((config.output / "compare.json").read_text())
    assert numbers["ways"][3]["vitals"]["gold"]["mean"] == other.vitals.gold.mean
    page = (config.output / "report.html").read_text()
    assert "A note." in page
    judged = [row for row in rows if row["way"] == "other"]
    for row in judged:
        assert row["judge"] == vowels([], row["completions"])
    mean = sum(sum(row["judge"]) / 2 for row in judged) / len(PROMPTS)
    assert other.vitals.gold.mean == pytest.approx(mean)
    # 4. The reward model beside the judge, on the answers that it did not choose itself.
    prompts = {prompt: [row for row in rows if row["prompt"] == prompt] for prompt in PROMPTS}
    pairs = right = 0.0
    for own in prompts.values():
        flat = [
            pair
            for row in own
            if row["way"] != "best-of-3"
            for pair in zip(row["judge"], row["reward_model"], strict=True)
        ]
        for (a, x), (b, y) in combinations(flat, 2):
            pairs += a != b
            right += (a != b) * (1 + ((x > y) - (x < y)) * (1 if a > b else -1)) / 2
    assert result.calibration is not None
    assert result.calibration.pairs.pairs == pairs
    assert result.calibration.accuracy.mean == pytest.approx(right / pairs)
    assert result.calibration.ceiling is None
    # 5. The answer: a sentence for each way but SFT, on every two of four.
    pairs = [("SFT", "best-of-3"), ("SFT", "same"), ("SFT", "other")]
    assert [(v.first, v.second) for v in result.verdicts][:3] == pairs
    assert len(result.verdicts) == 6
    assert result.verdicts[1].difference == Interval(0.0, 0.0, 0.0)
    assert result.verdicts[1].p == 1.0
    assert numbers["sentences"] == list(result.sentences)
    assert [text.split()[0] for text in result.sentences] == ["best-of-3", "same", "other"]
    assert numbers["verdicts"][2]["p_holm"] == result.verdicts[2].p_holm
    capsys.readouterr()
    show_comparison(result)
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(" ".join(result.sentences))


def test_best_of_n_takes_the_reward_models_favourite(config: CompareConfig) -> None:
    compare(replace(config, samples_per_prompt=1, best_of=4))
    rows = read_answers(config)
    one = {row["prompt"]: row for row in rows if row["way"] == "best-of-4"}
    compare(replace(config, samples_per_prompt=5, reward_model=None, best_of=4))
    rows = read_answers(config)
    reward = load_judge(str(config.reward_model), device="cpu")
    for row in rows:
        if row["way"] == "SFT":  # its first answer is the baseline's, the other four the pool
            pool = row["completions"][1:]
            ended = [not cut for cut in row["truncated"][1:]]
            scores = reward([row["prompt"]] * 4, pool, ended)
            assert one[row["prompt"]]["completions"] == [pool[scores.index(max(scores))]]


def test_kl_is_that_of_plain_transformers(config: CompareConfig) -> None:
    compare(replace(config, samples_per_prompt=1, reward_model=None, best_of=4))
    for row in read_answers(config):
        (tokens,) = row["tokens"]
        path = config.models[1].split("=")[1] if row["way"] == "other" else config.sft
        p, q = (sequence_log_prob(model, row["prompt"], tokens) for model in (path, config.sft))
        assert row["kl"][0] == pytest.approx(p - q, abs=1e-4)


def test_faults_are_one_line(config: CompareConfig, tmp_path: Path) -> None:
    for change, message in (
        ({"models": ("other",)}, "name=path"),
        ({"models": ("a=x", "a=x")}, "twice"),
        ({"max_new_tokens": 1022}, "prompts.jsonl:1"),
    ):
        with pytest.raises(UserError, match=message):
            compare(replace(config, **change))  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="tokenizer is not that of"):
        compare(config)
    assert not config.output.exists()


def test_an_llm_judges_by_its_rubric(config: CompareConfig, tmp_path: Path) -> None:
    """Its scores are gold; an answer that it scores not at all is not made up for."""

    def says(prompt: str, before: int) -> Reply:
        return f"[[{1 + sum(c in 'aeiou' for c in section(prompt, 'answer')[:9])}]]"

    changes = {"judge_cache": tmp_path / "cache", "reward_model": None, "best_of": 4}
    with serving(says) as server:
        compare(replace(config, judge=server.judge, **changes))  # type: ignore[arg-type]
        asked = len(server.asked)
        compare(replace(config, judge=server.judge, **changes))  # type: ignore[arg-type]
        assert len(server.asked) == asked
    for row in read_answers(config):
        both = zip(row["completions"], row["truncated"], strict=True)
        shown = [text + CUT if cut else text for text, cut in both]
        assert row["judge"] == [1 + sum(c in "aeiou" for c in text[:9]) for text in shown]
    changes["judge_cache"] = tmp_path / "empty"
    with serving(lambda prompt, _: 400 if len(server.asked) % 2 else "[[4]]") as server:
        result = compare(replace(config, judge=server.judge, **changes))  # type: ignore[arg-type]
    rows = read_answers(config)
    missing = sum(row["judge"].count(None) for row in rows)
    assert result.unjudged == missing > 0
    assert f"{missing} answers got no score" in result.notes[-1]
    known = [all(any(s is not None for s in row["judge"]) for row in rows[i::4]) for i in range(4)]
    assert f"{known.count(False)} prompts, which" in result.notes[-1]


def test_a_prompt_without_a_score_from_one_way_counts_for_none(
    config: CompareConfig, tmp_path: Path
) -> None:
    """Prompt "A" of "other" alone gets none; of the other prompts all ways are measured."""
    path = config.models[1].split("=")[1]
    compare(replace(config, samples_per_prompt=1, reward_model=None, best_of=4))
    texts = {
        (row["way"], row["prompt"]): row["completions"][0] + CUT * row["truncated"][0]
        for row in read_answers(config)
    }
    refused = texts["other", "A"]

    def says(prompt: str, before: int) -> Reply:
        answer = section(prompt, "answer")
        return 400 if answer == refused.strip() else f"[[{1 + len(answer) % 9}]]"

    with serving(says) as server:
        result = compare(
            replace(
                config,
                judge=server.judge,
                judge_cache=tmp_path / "c",
                models=(f"other={path}",),
                samples_per_prompt=1,
                reward_model=None,
                best_of=4,
            )
        )
    rows = {(row["way"], row["prompt"]): row["judge"][0] for row in read_answers(config)}
    assert [key for key, score in rows.items() if score is None] == [("other", "A")]
    sft, other = ([rows[way, p] for p in PROMPTS if p != "A"] for way in ("SFT", "other"))
    assert result.ways[0].vitals.gold.mean == pytest.approx(sum(sft) / 3)
    assert result.verdicts[0].difference.mean == pytest.approx((sum(sft) - sum(other)) / 3)


def test_an_llm_compares_with_sfts_answers(config: CompareConfig, tmp_path: Path) -> None:
    """Its verdict is by length; a score is the share of SFT's two answers that an answer beats."""

    def says(prompt: str, before: int) -> Reply:
        a, b = (len(section(prompt, f"answer_{side}")) for side in "ab")
        return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"

    with serving(says) as server:
        result = compare(
            replace(
                config,
                judge=server.judge,
                judge_mode="pairwise",
                judge_cache=tmp_path / "cache",
                models=config.models[1:],
            )
        )
    rows = read_answers(config)
    by_way = {way: [row for row in rows if row["way"] == way] for way in ("SFT", "other")}
    assert all(row["judge"] == [0.5, 0.5] for row in by_way["SFT"])
    for sft, other in zip(by_way["SFT"], by_way["other"], strict=True):
        sizes, own = (
            [
                len(text + CUT * cut)
                for text, cut in zip(r["completions"], r["truncated"], strict=True)
            ]
            for r in (sft, other)
        )
        shares = [sum((n > m) + (n == m) / 2 for m in sizes) / 2 for n in own]
        assert other["judge"] == shares
    golds = [sum(row["judge"]) / 2 for row in by_way["other"]]
    pair = next(v for v in result.verdicts if (v.first, v.second) == ("SFT", "other"))
    assert pair.difference.mean == pytest.approx(0.5 - sum(golds) / 4)
    # Four prompts, both orders: 2 x 2 pairs with the other model, 3 x 2 with best-of-3's pool.
    assert 0 < len(server.asked) <= 4 * 2 * (4 + 6)


def test_runs_of_one_way_are_told_apart_and_put_together(config: CompareConfig) -> None:
    first, second = (item.split("=")[1] for item in config.models)
    runs = (f"both={first}", f"both={second}")
    result = compare(replace(config, models=runs, reward_model=None, best_of=4))
    sft, both = result.ways
    own = [run.vitals.gold.mean for run in both.runs]
    assert own[0] == sft.vitals.gold.mean
    assert both.vitals.gold.mean == pytest.approx(sum(own) / 2)
    kls = [run.vitals.kl.mean for run in both.runs]
    assert kls[0] == 0.0 != kls[1]
    assert both.vitals.kl.mean == pytest.approx(sum(kls) / 2)
    rows = [row for row in read_answers(config) if row["way"] == "both"]
    assert [row["run"] for row in rows] == [1] * 4 + [2] * 4
    numbers = json.loads((config.output / "compare.json").read_text())
    assert [run["vitals"]["gold"]["mean"] for run in numbers["ways"][1]["runs"]] == own
    assert result.sentences[0].startswith("both (2 runs) is ")
