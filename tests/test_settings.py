"""No setting of the commands that train nothing is accepted and ignored.

As tests/training/test_settings.py: each, changed alone, in every mode, is told or shows in what is
printed or written.
"""

import contextlib
import json
from dataclasses import fields
from pathlib import Path

import pytest

from prefloop.commands import COMMANDS
from prefloop.errors import UserError
from tests.training.small import REWARDS, write_rows, write_world

FUNCTION, OTHER = f"{REWARDS}:by_length", "tests.evaluation.test_compare:vowels"
ANSWERS = {"max_new_tokens": 24, "device": "cpu", "dtype": "float32"}
COMPARED = {"sft": "model", "models": ("other=reference",), "data": "few.jsonl", "judge": FUNCTION}
RANKED = {"data": "sampled.jsonl"}
SIDES = {"answers": "one.jsonl", "baseline": "two.jsonl"}
MODES = {
    "generate": [
        {"model": "model", "prompt": ("the boat", "ant")} | ANSWERS,
        {"model": "model", "data": "few.jsonl"} | ANSWERS,
        {"model": "model", "data": "few.jsonl", "temperature": 0.0} | ANSWERS,
    ],
    "sample": [
        {"model": "model", "data": "few.jsonl"} | ANSWERS,
        {"model": "model", "data": "few.jsonl", "temperature": 0.0} | ANSWERS,
    ],
    "compare": [
        COMPARED | ANSWERS,
        COMPARED | ANSWERS | {"reward_model": "rm"},
        COMPARED | ANSWERS | {"judge": "rm"},
    ],
    "rejudge": [
        {"comparison": Path("compared"), "judge": FUNCTION},
        {"comparison": Path("compared"), "judge": "rm"},
    ],
    "rank": [
        RANKED | {"judge": FUNCTION},
        RANKED | {"judge": "rm", "device": "cpu", "dtype": "float32"},
        RANKED | {"judge": FUNCTION, "form": "best"},
    ],
    "evaluate winrate": [
        SIDES | {"judge": FUNCTION},
        SIDES | {"judge": "rm", "device": "cpu", "dtype": "float32"},
    ],
    "evaluate judge": [
        {"data": "rated.jsonl", "judge": FUNCTION},
        {"data": "rated.jsonl", "judge": "rm", "device": "cpu", "dtype": "float32"},
    ],
    "evaluate reward-model": [
        {"reward_model": "rm", "data": "rank.jsonl", "device": "cpu", "dtype": "float32"}
    ],
    "check": [{"model": "model"}, {"model": "model", "data": "rank.jsonl"}],
}
CHANGES = {
    "model": "reference",
    "sft": "reference",
    "models": ("other=model",),
    "prompt": ("oath",),
    "data": "pairs.jsonl",
    "answers": "two.jsonl",
    "baseline": "one.jsonl",
    "comparison": Path("compared-2"),
    "judge": OTHER,
    "reward_model": "rm2",
    "output": "elsewhere",
    "max_new_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.3,
    "top_k": 2,
    "seed": 7,
    "max_prompts": 1,
    "max_length": 30,
    "truncation": "drop",
    "dtype": "bfloat16",
    "weights": "nf4",
    "device": "cuda:63",
    "samples_per_prompt": 3,
    "to_labels": "labels.db",
    "best_of": 7,
    "agreement": 0.8,
    "kind": "prompt",
    "form": "best",
    "min_score": 5.0,
    "max_rows": 2,
}
WITH = {  # read only with these
    "max_length": {"truncation": "drop"},
    "truncation": {"max_length": 30},
    "best_of": {"reward_model": "rm"},
    "kind": {"data": "few.jsonl"},
    "min_score": {"form": "best"},
}
ALONE = {  # (command, setting): why it may be given where it changes nothing
    ("check", "model"): "the two tokenizers are one",
    ("sample", "output"): "the same rows, elsewhere",
    ("compare", "output"): "the same rows, elsewhere",
    ("rejudge", "output"): "the same rows, elsewhere",
    ("evaluate judge", "dtype"): "signs of scores are compared",
    ("evaluate judge", "weights"): "as with dtype",
    ("rank", "output"): "the same rows, elsewhere",
    ("rank", "form"): "one mode has it",
    ("generate", "seed"): "greedy answers draw nothing, and one command line serves both",
    ("sample", "seed"): "as for generate; the rows note it",
    ("generate", "dtype"): "rounding seldom changes which token is likeliest",
    ("generate", "weights"): "as with dtype",
    ("evaluate winrate", "seed"): "the bootstrap of equal scores has no width",
    **{(command, "truncation"): "the rows say whether any is too long" for command in MODES},
    **{(command, "max_length"): "the rows say whether any is too long" for command in MODES},
}
WRITING = ("sample", "compare", "rejudge", "rank")
ELSEWHERE = {  # tests/training/test_settings.py, _template_args.py, _planning.py, _sharded_plan.py
    "rollout_engine",  # these: tests/rollouts
    "rollout_patience",
    "rollout_timeout",
    "bad_rows",
    "chat",
    "command",
    "config",
    "judge_args",  # these: tests/evaluation/test_llm_judges.py
    "judge_cache",
    "judge_concurrency",
    "judge_mode",
    "judge_prompt",
    "judge_timeout",
    "max_concurrent",
    "memory",
    "micro_batch_tokens",
    "ranks",
    "template_args",
}
TOLD = {  # whose other value here is nothing but told, or required and the same in what is compared
    "compare": {"device", "output"},
    "rejudge": {"output"},
    "sample": {"device", "output"},
    "check": {"model"},
    "rank": {"device", "output", "max_length", "data"},
    "evaluate judge": {"device", "max_length", "data", "dtype", "weights"},
    "evaluate winrate": {"device", "max_length"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    import torch

    from prefloop.models.export import export_model
    from prefloop.models.load import load_scorer

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    scorer = load_scorer(str(folder / "model"), torch.device("cpu"), seed=7)
    export_model(scorer, folder / "rm2")
    asked = ["the boat", "a thin ant took the bath that the oath took", "in"]
    write_rows(folder / "few.jsonl", [{"prompt": prompt} for prompt in asked])
    for name, said in (("one", "a boat"), ("two", "the ant in a bath")):
        more = [*asked, *(f"oath {n}" for n in range(9))]
        rows = [{"prompt": p, "completion": said[n:] + said * (n % 3)} for n, p in enumerate(more)]
        write_rows(folder / f"{name}.jsonl", rows)
    long = "the ant in a bath that took the thin boat and the oath in it"
    said = [[long[20 * n :], "", "in"] for n in range(len(asked))]
    rows = [{"prompt": p, "completions": c} for p, c in zip(asked, said, strict=True)]
    write_rows(folder / "sampled.jsonl", rows)
    people = [[[0], [1, 2]], [[1], [0], [2]], [[2], [1], [0]], [[0, 1], [2]]]
    said = ["aeio", "thn tht", "in"]  # by length another order than by vowels
    rows = [
        {"prompt": f"{p}{n}", "completions": said, "raters": [people[n], people[n * k % 4]]}
        for k, p in enumerate(asked)
        for n in range(4)
    ]
    write_rows(folder / "rated.jsonl", rows)
    compare = COMMANDS["compare"]
    with contextlib.chdir(folder):
        for name, seed in (("compared", 0), ("compared-2", 3)):
            settings = COMPARED | ANSWERS | {"output": Path(name), "seed": seed}
            compare.function(compare.config(**settings))
    return folder


def shown(value):
    """A result without times and settings."""
    if hasattr(value, "ways"):
        ways = [(way.name, way.vitals, way.win_rate, way.signs) for way in value.ways]
        return repr([ways, value.calibration])
    return repr(value)


def outcome(name, place, capsys, **changes):
    """The error's line, or what was printed and written, but for the settings told along."""
    command = COMMANDS[name]
    names = {field.name for field in fields(command.config)}
    if "output" in names and "output" not in changes and name in WRITING:
        changes["output"] = place
    capsys.readouterr()
    try:
        result = command.function(command.config(**changes))
    except UserError as error:
        return str(error).replace(str(place), "")
    rows = changes.get("output", place)
    rows = rows / "answers.jsonl" if rows.is_dir() else rows
    written = rows.read_text() if rows.exists() else ""
    if name == "sample":
        keep = ("completions", "finish_reasons", "log_probs")
        written = [[json.loads(line)[key] for key in keep] for line in written.splitlines()]
    return capsys.readouterr().out, shown(result).replace(str(place), ""), written


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODES)
def test_no_setting_is_accepted_and_ignored(name, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    found, ignored, known = set(), [], {}

    def ends(**changes):
        key = repr(sorted(changes.items()))
        if key not in known:
            ending = "" if name in ("compare", "rejudge") else ".jsonl"
            place = tmp_path / f"out-{len(known)}{ending}"
            known[key] = outcome(name, place, capsys, **changes)
        return known[key]

    every = {field.name for field in fields(COMMANDS[name].config)} - ELSEWHERE
    for base in MODES[name]:
        assert isinstance(ends(**base), tuple), ends(**base)
        for setting in sorted(every):
            value = CHANGES[setting]
            if setting == "output":
                value = tmp_path / f"elsewhere-{len(known)}.jsonl"
            if setting == "to_labels":
                value = f"{tmp_path}/labels-{len(known)}.db"
            if (name, setting) not in ALONE and ends(**base | {setting: value}) == ends(**base):
                ignored.append((base, setting))
            with_it = base | {k: v for k, v in WITH.get(setting, {}).items() if k in every}
            after = ends(**with_it | {setting: value})
            if isinstance(after, tuple) and after != ends(**with_it):
                found.add(setting)
    assert ignored == []
    assert every - found <= TOLD.get(name, {"device"})
