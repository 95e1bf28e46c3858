"""PPO whose reward is an LLM judge's score by a rubric."""

import pytest

from prefloop.config.endpoint import EndpointConfig
from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.records import Prompt
from prefloop.rewards.llm import rubric_judge
from prefloop.rewards.scorers import text_scorer
from tests.evaluation.llm_server import section, serving
from tests.training.small import lines, train


def by_vowels(prompt, before):
    text = section(prompt, "answer").partition("\n[The answer was cut")[0]
    return f"[[{min(10, 1 + sum(letter in 'aeiou' for letter in text))}]]"


def settings(server, tmp_path, **more):
    return {
        "reward_model": None,
        "judge": server.judge,
        "judge_cache": tmp_path / "cache",
        "batch_size": 3,
        "max_steps": 2,
        "ppo_epochs": 1,
    } | more


def test_scores_are_the_judges_and_their_cost_is_logged(world, tmp_path):
    with serving(by_vowels) as server:
        train("ppo", world, tmp_path / "run", **settings(server, tmp_path))
    first, second = [line for line in lines(tmp_path / "run") if "objective/scores" in line]
    samples = lines(tmp_path / "run", "samples.jsonl")
    for sample in samples:
        vowels = sum(letter in "aeiou" for letter in sample["completion"])
        assert sample["score"] == min(10, 1 + vowels)
    assert first["judge/requests"] + second["judge/requests"] == len(server.asked)
    assert first["judge/prompt_tokens"] == 100 * first["judge/requests"]
    assert len({sample["score"] for sample in samples}) > 1


def test_an_answer_without_a_score_takes_the_mean_of_the_others(world):
    answers = ["a", "refused", "aeiou"]

    def says(prompt, before):
        return 400 if section(prompt, "answer") == "refused" else by_vowels(prompt, before)

    with serving(says) as server:
        judge = rubric_judge(server.judge, EndpointConfig(judge_cache=world / "judged"))
        prompts = [Prompt("p")] * 3
        ends = [Example((5,), ((6, 2),), ((True, True),), 0, "")] * 3
        scored = text_scorer(judge, frozenset({2}))(prompts, answers, ends)
    assert scored.scores == [2.0, 4.0, 6.0]
    assert (scored.cost["judge/failed"], scored.cost["judge/requests"]) == (1, 2)


def test_a_run_whose_judge_stays_away_goes_on_when_it_is_back(world, tmp_path):
    """What was scored is asked for once; the run's end is that of one that was never ended."""
    with serving(by_vowels) as server:
        other = {"judge_cache": tmp_path / "other"}
        train("ppo", world, tmp_path / "whole", **settings(server, tmp_path, **other))
        asked = len(server.asked)

    def dies(prompt, before):
        return 401 if len(failing.asked) > 3 else by_vowels(prompt, before)

    port = int(server.url.rsplit(":", 1)[1].removesuffix("/v1"))
    with serving(dies, port=port) as failing, pytest.raises(UserError, match="status 401"):
        train("ppo", world, tmp_path / "run", **settings(failing, tmp_path))
    with serving(by_vowels, port=port) as again:
        train("ppo", world, tmp_path / "run", **settings(again, tmp_path))
    assert 3 + len(again.asked) == asked
    for name in ("loss", "objective/scores"):
        ours = [line[name] for line in lines(tmp_path / "run")]
        assert ours == [line[name] for line in lines(tmp_path / "whole")]
