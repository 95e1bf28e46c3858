"""A reward function that needs the row's solution: wherever Python functions score."""

import importlib
import json

import pytest

from tests.training.small import lines

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n), "solution": str(2 * n)} for n in (1, 2)]
RECORDING = """
import asyncio

seen = []

def note(prompts, completions, columns):
    seen.append((list(prompts), columns))
    return [0.0] * len(completions)

def with_keyword(prompts, completions, solution):
    return note(prompts, completions, {"solution": solution})

def optional(prompts, completions, *, solution=None, absent=7):
    assert absent == 7
    return note(prompts, completions, {"solution": solution})

def everything(prompts, completions, **columns):
    return note(prompts, completions, columns)

def trl_style(completions, **kwargs):
    return note(kwargs.pop("prompts"), completions, kwargs)

def only_answers(completions, solution):
    return note([], completions, {"solution": solution})

async def waits(prompts, completions, solution):
    await asyncio.sleep(0)
    return note(prompts, completions, {"solution": solution})

def plain(questions, answers):
    return note(questions, answers, {})

def needs_more(prompts, completions, difficulty):
    raise AssertionError("never called")
"""
KINDS = "with_keyword optional everything trl_style only_answers waits plain".split()


@pytest.fixture
def recording(case):
    """A module of reward functions that note what they were given."""
    (case / "recording.py").write_text(RECORDING)
    importlib.invalidate_caches()
    return importlib.import_module("recording")


def ppo(models, *more):
    words = ["ppo", "--model", models / "plain", "--data", "prompts.jsonl", "--device", "cpu"]
    words += "--max-length 128 --batch-size 2 --max-new-tokens 6 --max-steps 1".split()
    return [*words, *"--ppo-epochs 1 --lr 1e-3".split(), *more]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("function", ["with_keyword", "trl_style"])
def test_the_solution_is_handed_on(function, advantage, models, case, prefloop):
    more = ["--advantage", advantage, "--samples-per-prompt", "2", "--output", "run"]
    told = prefloop(*ppo(models, "--reward-function", f"rewards:{function}", *more))
    assert (told.code, told.err.count("Error")) == (0, 0)
    assert (case / "run" / "model").exists()


@pytest.mark.parametrize("function", KINDS)
def test_columns_stand_by_their_prompts_in_ppo(function, models, recording, prefloop):
    more = ["--samples-per-prompt", "2", "--output", "run"]
    assert prefloop(*ppo(models, "--reward-function", f"recording:{function}", *more)).code == 0
    (prompts, columns), *_ = recording.seen
    solutions = [str(2 * int(prompt[0])) for prompt in prompts]
    if function == "plain":
        assert columns == {}
    elif function == "only_answers":
        assert len(set(columns["solution"][::2])) == 2
        assert columns["solution"][::2] == columns["solution"][1::2]
    else:
        assert columns == {"solution": solutions}


@pytest.mark.parametrize("function", KINDS)
def test_columns_stand_by_their_prompts_in_winrate(function, recording, case, prefloop):
    write(case / "a.jsonl", ROWS)
    write(case / "b.jsonl", [row | {"completion": "7"} for row in reversed(ROWS)])
    words = ["evaluate", "winrate", "--answers", "a.jsonl", "--baseline", "b.jsonl"]
    assert prefloop(*words, "--judge", f"recording:{function}").code == 0
    assert len(recording.seen) == 2  # each side once, in the first file's order
    for prompts, columns in recording.seen:
        assert prompts == ([] if function == "only_answers" else ["1+1=", "2+2="])
        assert columns == ({} if function == "plain" else {"solution": ["2", "4"]})


@pytest.mark.parametrize("function", KINDS)
def test_columns_stand_by_their_prompts_in_compare(function, models, recording, prefloop):
    plain = models / "plain"
    words = ["compare", "--sft", plain, "--models", f"same={plain}", "--data", "prompts.jsonl"]
    words += "--output out --samples-per-prompt 2 --max-new-tokens 4 --device cpu".split()
    assert prefloop(*words, "--judge", f"recording:{function}").code == 0
    for prompts, columns in recording.seen:
        if function != "plain":
            assert columns == {"solution": [x for n in "2468" for x in (n, n)]}
        if function != "only_answers":
            assert prompts == [x for n in "1234" for x in (f"{n}+{n}=",) * 2]


@pytest.mark.parametrize("function", KINDS)
def test_columns_stand_by_their_prompts_in_label_score(function, recording, case, prefloop):
    rows = [
        {"prompt": row["prompt"], "completions": ["1", "2"], "solution": row["solution"]}
        for row in ROWS
    ]
    write(case / "rows.jsonl", rows)
    assert prefloop("label", "import", "--store", "s.db", "--data", "rows.jsonl").code == 0
    words = ["label", "score", "--store", "s.db", "--strategy", "gap"]
    assert prefloop(*words, "--reward-model", f"recording:{function}").code == 0
    ((prompts, columns),) = recording.seen
    if function != "plain":
        assert columns == {"solution": ["2", "2", "4", "4"]}
    if function != "only_answers":
        assert prompts == ["1+1=", "1+1=", "2+2=", "2+2="]


def test_a_column_that_is_missing_is_told_before_the_work(models, recording, case, prefloop):
    """Naming function, argument, and the row; of several functions, the one that asks."""
    lacking = "no column `difficulty`, which recording:needs_more has as an argument; add it"
    both = ["--reward-function", "recording:plain", "recording:needs_more", "--output", "run"]
    told = prefloop(*ppo(models, *both))
    assert told.code == 2
    assert f"prompts.jsonl:1: {lacking}" in told.err
    assert not (case / "run" / "metrics.jsonl").exists()
    # Only one row of the other file lacks it.
    write(case / "a.jsonl", [row | {"difficulty": 1} for row in ROWS])
    write(case / "b.jsonl", [ROWS[0] | {"difficulty": 1}, ROWS[1]])
    words = ["evaluate", "winrate", "--answers", "a.jsonl", "--baseline", "b.jsonl"]
    told = prefloop(*words, "--judge", "recording:needs_more", "--output", "o.json")
    assert (told.code, f"b.jsonl:2: {lacking}" in told.err) == (2, True)
    words = ["compare", "--sft", models / "plain", "--models", f"same={models / 'plain'}"]
    words += ["--data", "prompts.jsonl", "--output", "out", "--device", "cpu"]
    told = prefloop(*words, "--judge", "recording:needs_more")
    assert (told.code, f"prompts.jsonl:1: {lacking}" in told.err) == (2, True)
    write(case / "rows.jsonl", [{"prompt": "p", "completions": ["1", "2"]}])
    assert prefloop("label", "import", "--store", "s.db", "--data", "rows.jsonl").code == 0
    words = ["label", "score", "--store", "s.db", "--strategy", "gap"]
    told = prefloop(*words, "--reward-model", "recording:needs_more")
    assert (told.code, f"s.db#main: prompt 1: {lacking}" in told.err) == (2, True)
    assert recording.seen == []


def test_the_weighted_sum_is_the_score_and_each_mean_is_logged(models, case, prefloop):
    (case / "two.py").write_text(
        "def three(prompts, completions):\n    return [3.0] * len(completions)\n\n"
        "async def evens(prompts, completions, solution):\n"
        "    return [float(int(s) % 4 == 0) for s in solution]\n"
    )
    two = ["--reward-function", "two:three", "two:evens", "--batch-size", "4"]
    for name, more, score in (
        ("plain", [], 3 + 0.5),
        ("weighted", ["--reward-weights", "2", "-0.5"], 2 * 3 - 0.5 * 0.5),
    ):
        assert prefloop(*ppo(models, *two, *more, "--output", name)).code == 0
        (line,) = lines(case / name)
        assert line["objective/scores"] == pytest.approx(score)
        assert line["objective/scores/three"] == pytest.approx(3.0)
        assert line["objective/scores/evens"] == pytest.approx(0.5)
    wrong = prefloop(*ppo(models, *two, "--reward-weights", "2", "--output", "wrong"))
    assert wrong.code == 2
    assert "--reward-weights has 1 numbers for 2 of --reward-function" in wrong.err
    model = prefloop(*ppo(models, "--reward-model", "x", "--reward-weights", "2", "--output", "w"))
    assert "--reward-weights is read only with --reward-function" in model.err
