import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.errors import UserError
from prefloop.models.export import export_model
from prefloop.models.load import load_scorer
from prefloop.records import Message
from prefloop.rewards.functions import function_judge
from prefloop.rewards.judges import load_judge
from tests.tiny import tiny_model, tiny_tokenizer

HERE = "tests.evaluation.test_judges"


def lengths(prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
    return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


def one_for_all(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1.0]


def not_a_number(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float("nan")] * len(completions)


def raises(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    raise KeyError("mood")


def test_a_function_scores_each_answer() -> None:
    assert load_judge(f"{HERE}:lengths")(["ab", "c"], ["d", "efg"]) == [3.0, 4.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{HERE}:one_for_all", "1 scores for 2 answers"),
        (f"{HERE}:not_a_number", "gave nan for the answer 'c'"),
        (f"{HERE}:huge", "scores must be finite, and below"),
        (f"{HERE}:raises", "failed: KeyError: 'mood'"),
    ],
)
def test_a_faulty_function_is_named(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        function_judge(source)(["a", "b"], ["c", "d"])


def huge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1e39] * len(completions)


@pytest.mark.parametrize("body", ["def f(:", "raise RuntimeError('no')", "import sys; sys.exit(3)"])
def test_a_module_that_fails_at_import_is_named(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text(body + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="cannot import it") as caught:
        function_judge("broken_rewards:score")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no.such.module:f", f"{HERE}:no_such_function"])
def test_what_cannot_be_imported_is_named(source: str) -> None:
    with pytest.raises(UserError, match="cannot import"):
        load_judge(source)


def roles(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts if prompt[0]["role"] == "user"]


def test_chats_are_lists_of_dicts_to_a_function() -> None:
    chat = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))
    assert function_judge(f"{HERE}:roles")([chat], ["Bye"]) == [3.0]


def policy_folder(path: Path) -> str:
    tiny_model().save_pretrained(path)
    tiny_tokenizer(chat=False).save_pretrained(path)
    return str(path)


def test_a_reward_model_scores_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    scorer = load_scorer(policy_folder(tmp_path / "policy"), torch.device("cpu"))
    scorer.hf.config.reward_mean = 0.25
    folder = tmp_path / "reward"
    export_model(scorer, folder)
    prompts, answers = ["The film", "A", "The film"], [" is fine.", "b", ""]
    scores = load_judge(str(folder), device="cpu", micro_batch_tokens=12)(prompts, answers)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer(chat=False)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]
        with torch.no_grad():
            expected = plain(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits.item()
        assert score == pytest.approx(expected - 0.25, abs=1e-5)


def test_a_reward_models_faults(tmp_path: Path) -> None:
    policy = policy_folder(tmp_path / "policy")
    with pytest.raises(UserError, match="not a reward model"):
        load_judge(policy, device="cpu")
    folder = tmp_path / "reward"
    export_model(load_scorer(policy, torch.device("cpu")), folder)
    with pytest.raises(UserError, match="raise it"):
        load_judge(str(folder), device="cpu", max_length=4)(["a long prompt"], ["and answer"])
    with pytest.raises(UserError, match="nowhere"):
        load_judge(str(tmp_path / "nowhere"), device="cpu")


async def slowly(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    await asyncio.sleep(0)
    return [2.0] * len(completions)


async def never(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    raise TimeoutError("no answer")


def test_an_async_function_is_awaited_also_where_a_loop_runs() -> None:
    judge = function_judge(f"{HERE}:slowly", f"{HERE}:lengths", weights=(0.5, 10.0))
    assert judge(["a"], ["bc"]) == [0.5 * 2 + 10 * 3]

    async def in_a_notebook() -> list[float]:
        return judge(["a"], ["bc"])

    assert asyncio.run(in_a_notebook()) == [31.0]
    with pytest.raises(UserError, match="never failed: TimeoutError: no answer"):
        function_judge(f"{HERE}:never")(["a"], ["b"])


def test_functions_of_one_name_are_told_apart_by_their_modules() -> None:
    judge = function_judge(f"{HERE}:lengths", "tests.evaluation.test_winrate:length_judge")
    assert judge.names == ("lengths", "length_judge")
    judge = function_judge("tests.training.rewards:raises", f"{HERE}:raises")
    assert judge.names == ("tests.training.rewards:raises", f"{HERE}:raises")
