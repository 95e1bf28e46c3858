"""The monitor: what it measures, that it disturbs nothing, the best step, the end by hacking."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefloop.config.checks import problems
from prefloop.data.tokenize import Example, stop_token_ids, with_answers
from prefloop.errors import UserError
from prefloop.generation.engine import Engine, in_process
from prefloop.generation.sampler import Sampling
from prefloop.models.load import load_policy, load_reward_model
from prefloop.rewards.judges import load_judge
from prefloop.rewards.scorers import scores_of
from prefloop.training import loop
from prefloop.training.monitor import load_monitor
from prefloop.training.rows import read_examples
from prefloop.training.sft import SFT
from prefloop.training.start import model_options, start
from tests.evaluation.llm_server import section, serving
from tests.training.small import (
    CPU,
    REWARDS,
    assert_same_run,
    checkpoint,
    config,
    lines,
    only_checkpoint,
    policy,
    train,
    weights,
    write_rows,
)

PPO = {"batch_size": 3, "ppo_epochs": 2, "num_minibatches": 2, "epochs": 2.0, "kl_target": 0.01}
PPO |= {"kl_horizon": 20.0, "normalize_scores": True, "lr": 3e-3}
RUNS = {
    "ppo": ("ppo", PPO),
    "dpo": ("dpo", {"batch_size": 3, "epochs": 2.0}),
    "kto": ("dpo", {"batch_size": 3, "loss": "kto", "data": "pairs.jsonl", "epochs": 2.0}),
    "sft": ("sft", {"batch_size": 3, "epochs": 2.0}),
}
LENGTH = f"{REWARDS}:by_length"
SLOW = pytest.mark.slow


def monitored(world, **changes):
    """Settings of a monitor that measures at every second step."""
    rows = str(world / "prompts.jsonl")
    base = {"monitor": LENGTH, "monitor_data": rows, "monitor_steps": 2, "max_new_tokens": 6}
    return base | changes


def changes_of(name, world):
    command, changes = RUNS[name]
    return command, changes | ({"data": str(world / changes["data"])} if "data" in changes else {})


def measurements(output):
    return {row["step"]: row for row in lines(output) if "monitor/kl" in row}


def record(output):
    return json.loads((output / "run.json").read_text())


# --- what is measured ----------------------------------------------------------------------------


def answers(model, world, seed=0):
    """The texts and tokens that the monitor's prompts are answered with, made here."""
    rows = (world / "prompts.jsonl").read_text().splitlines()
    asked = [json.loads(row)["prompt"] for row in rows]
    ids = [model.encoder.prompt(prompt) for prompt in asked]
    stops = stop_token_ids(model.tokenizer, model.hf.generation_config)
    sampling = Sampling(6, 1.0, stop_token_ids=stops)
    samples = [row[0] for row in Engine(model).generate(ids, 1, sampling, seed)]
    texts = [model.encoder.said(p, s.tokens) for p, s in zip(asked, samples, strict=True)]
    return asked, texts, samples


@pytest.mark.parametrize("monitor", [LENGTH, "rm_one"])
def test_the_start_and_every_nth_step_are_measured(monitor, world, tmp_path, monkeypatch):
    """Score, length and cut answers at the start, by the starting model's own answers; each beside
    its own prompt.
    """
    monkeypatch.setattr("prefloop.training.monitor.copied_share", lambda a, p: len(a) * sum(p))
    judge = monitor if ":" in monitor else str(world / monitor)
    changes = monitored(world, monitor=judge, monitor_steps=3, max_steps=8, seed=4)
    train("ppo", world, tmp_path / "run", **PPO | changes)
    found = measurements(tmp_path / "run")
    assert list(found) == [0, 3, 6, 8]
    start, last = found[0], found[8]
    asked, texts, samples = answers(policy(world), world, seed=4)
    scores = load_judge(judge, device="cpu")(
        asked, texts, [s.finish_reason == "stop" for s in samples]
    )
    assert start["monitor/score"] == pytest.approx(sum(scores) / 9, abs=1e-5)
    assert start["monitor/low"] < start["monitor/score"] < start["monitor/high"]
    assert start["monitor/length"] == pytest.approx(sum(len(s.tokens) for s in samples) / 9)
    cut = sum(s.finish_reason == "length" for s in samples)
    assert start["monitor/truncated"] == pytest.approx(cut / 9)
    sums = [sum(policy(world).encoder.prompt(prompt)) for prompt in asked]
    beside = sum(len(s.tokens) * total for s, total in zip(samples, sums, strict=True))
    assert start["monitor/copied"] == pytest.approx(beside / 9)
    assert start["monitor/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(last["monitor/kl"]) > 1e-3
    assert start.keys() - {k for k in start if k.startswith("monitor/")} == {"step"}


def test_the_result_is_what_was_measured_last(world, tmp_path):
    """The exported model's own answers give the last measurement; KL by its log-probs."""
    train("dpo", world, tmp_path / "run", **RUNS["dpo"][1] | monitored(world) | {"lr": 1e-2})
    last = list(measurements(tmp_path / "run").values())[-1]
    model = load_policy(str(tmp_path / "run" / "model"), CPU)
    asked, texts, samples = answers(model, world)
    assert last["monitor/score"] == pytest.approx(sum(map(len, texts)) / 90, abs=1e-5)

    plain = [
        AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "run/model", world / "model")
    ]

    def log_prob(which, prompt, tokens):
        ids = torch.tensor([[*model.encoder.prompt(prompt), *tokens]])
        logits = which(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None]).flatten()[-len(tokens) :].sum()

    with torch.no_grad():
        pairs = [
            log_prob(plain[0], p, s.tokens) - log_prob(plain[1], p, s.tokens)
            for p, s in zip(asked, samples, strict=True)
        ]
    assert last["monitor/kl"] == pytest.approx(float(sum(pairs) / 9), rel=1e-3)


def test_the_spread_of_the_runs_own_models(world, tmp_path):
    """Mean of their scores less the deviation between them; by hand of two: half their distance."""
    paths = tuple(str(world / name) for name in ("rm_one", "rm_two"))
    changes = monitored(world, monitor="spread", reward_model=paths, max_steps=1)
    train("ppo", world, tmp_path / "run", **PPO | changes, samples_per_prompt=2)
    start = measurements(tmp_path / "run")[0]
    model = policy(world)
    asked, _, samples = answers(model, world)
    pairs = zip(asked, samples, strict=True)
    tokens = [with_answers(Example(tuple(model.encoder.prompt(p))), [s.tokens]) for p, s in pairs]
    one, two = (scores_of(load_reward_model(path, CPU), tokens, 999) for path in paths)
    halves = [abs(a - b) / 2 for a, b in zip(one, two, strict=True)]
    assert start["monitor/spread"] == pytest.approx(sum(halves) / 9, abs=1e-5)
    least = [min(a, b) for a, b in zip(one, two, strict=True)]
    assert start["monitor/score"] == pytest.approx(sum(least) / 9, abs=1e-5)


# --- it disturbs nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n == "kto" else ()) for n in RUNS])
def test_a_monitored_run_is_the_run_without(name, world, tmp_path):
    """Bit for bit, though the monitor draws from every generator, as the reward does."""
    command, changes = changes_of(name, world)
    drawing = {"reward_function": f"{REWARDS}:random"} if command == "ppo" else {}
    train(command, world, tmp_path / "without", **changes | drawing)
    other = monitored(world, monitor=f"{REWARDS}:drawing")
    train(command, world, tmp_path / "with", **changes | drawing | other)
    mine = [row for row in lines(tmp_path / "with") if row["step"]]
    for row in mine:
        for key in [key for key in row if key.startswith("monitor/")]:
            del row[key]
    assert mine == lines(tmp_path / "without")
    left, right = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize("name", [pytest.param("ppo", marks=SLOW), "dpo"])
def test_every_checkpoint_leads_to_the_same_best(name, world, tmp_path):
    """Metrics, the step kept and its weights; also from the checkpoint before the best one."""
    command, changes = changes_of(name, world)
    changes = changes | monitored(world, monitor_steps=1, keep_best=True)
    whole = tmp_path / "whole"
    train(command, world, whole, save_every=1, keep_checkpoints=100, **changes)
    best, last = record(whole)["best_step"], len(lines(whole)) - 1
    for step in {max(best - 1, 1), max(best, 1), last - 1}:
        again = tmp_path / f"from-{step}"
        only_checkpoint(whole, again, step)
        train(command, world, again, **changes)
        assert_same_run(whole, again)
        assert record(again)["best_step"] == record(again)["model_step"] == best
        assert not (again / "checkpoints").exists()


class Offline:
    """A tracker that fails at a step, when the monitor has measured it."""

    def __init__(self, step):
        self.step = step

    def log(self, step, metrics):
        if step == self.step:
            raise ConnectionError("tracker")

    def close(self):
        pass


def test_what_fails_after_a_new_best_costs_nothing(world, tmp_path):
    """The checkpoint is of the step before it was measured, and so knows the best before it."""
    changes = {"batch_size": 2, "lr": 1e-2} | monitored(world, monitor_steps=1, keep_best=True)
    train("sft", world, tmp_path / "whole", **changes)
    best = record(tmp_path / "whole")["best_step"]
    assert best > 0
    settings = config("sft", world, tmp_path / "run", **changes)
    run, device = start(settings, "sft")
    model = load_policy(settings.model, device, **model_options(settings))
    rows = read_examples(settings, "demonstration", model, run)
    monitor = load_monitor(settings, model, run, in_process)
    run._tracker = Offline(best)
    with pytest.raises(ConnectionError), run:
        loop.train(SFT(settings, model, *rows), settings, run, monitor)
    [kept] = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert kept.name == f"step-{best}"
    assert [file.name for file in kept.glob("best-*")] != [f"best-{best}.pt"]
    train("sft", world, tmp_path / "run", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert record(tmp_path / "run")["model_step"] == best


# --- the best step -------------------------------------------------------------------------------

KINDS = {
    "whole": {},
    "adapters": {"lora_rank": 2, "share_base": "never"},
    "one base": {"lora_rank": 2, "reward_model": "rm_one"},
}


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_step_is_exported(kind, world, tmp_path):
    """What is written is what the checkpoint of that step holds, and not that of the last."""
    changes = KINDS[kind]
    if "reward_model" in changes:
        changes = changes | {"reward_model": str(world / changes["reward_model"])}
    changes = PPO | {"lr": 1e-2} | changes | monitored(world, monitor_steps=1, keep_best=True)
    run = tmp_path / "run"
    train("ppo", world, run, save_every=1, keep_checkpoints=99, **changes)
    scores = {step: row["monitor/score"] for step, row in measurements(run).items()}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert record(run)["best_step"] == record(run)["model_step"] == best
    assert 0 < best < max(scores) == record(run)["value_model_step"]
    kept = checkpoint(run, best)["models"]["policy"]
    last = checkpoint(run, max(scores))["models"]["policy"]
    [file] = (run / "model").glob("*.safetensors")
    written = load_file(file)
    known = {name.replace(".policy", "").replace(".default", ""): t for name, t in kept.items()}
    matched = [name for name in known if name in written]
    assert len(matched) >= len(written) - 1  # a head tied to the embeddings is written once
    assert all(torch.equal(known[name], written[name]) for name in matched)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert not torch.equal(
        *(checkpoint(run, s)["models"]["value"].popitem()[1] for s in (best, max(scores)))
    )


def test_of_equal_steps_the_first_is_kept(world, tmp_path):
    """A constant monitor keeps the start."""
    changes = monitored(world, monitor=f"{REWARDS}:constant", keep_best=True)
    train("sft", world, tmp_path / "run", batch_size=3, **changes)
    assert record(tmp_path / "run")["model_step"] == 0
    start = load_file(world / "model" / "model.safetensors")
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(start[name], written[name]) for name in written)


def test_without_keep_best_the_last_step_is_exported(world, tmp_path):
    train("sft", world, tmp_path / "run", batch_size=3, **monitored(world))
    train("sft", world, tmp_path / "plain", batch_size=3)
    assert record(tmp_path / "run")["model_step"] == 3
    left, right = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert all(torch.equal(left[name], right[name]) for name in right)


# --- the end -------------------------------------------------------------------------------------

ENDS = {  # command, what training is rewarded with, the rule, the step of the end
    "gamed": ("ppo", "rising", "proxy up, judge down", 2),
    "both fall": ("ppo", "sinking", "judge down", 8),
    "no reward": ("dpo", None, "judge down", 2),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_when_it_is_gamed(name, world, tmp_path, capsys):
    """The monitor falls each time: below its best for the second time at step 2."""
    command, reward, rule, step = ENDS[name]
    own = {"ppo_epochs": 1, "epochs": 3.0, "batch_size": 3, "num_minibatches": 1, "max_steps": 8}
    own = own | {"reward_function": f"{REWARDS}:{reward}"} if reward else {"batch_size": 2}
    changes = monitored(world, monitor=f"{REWARDS}:falling", monitor_steps=1)
    changes |= own | {"keep_best": True, "stop_on_hacking": True}
    train(command, world, tmp_path / "run", **changes)
    told, kept = capsys.readouterr().err, record(tmp_path / "run")
    assert (kept["status"], kept["steps"], kept["best_step"], kept["model_step"]) == (
        "finished", step, 0, 0,
    )  # fmt: skip
    [found] = [sign for sign in kept["health"] if sign["name"] == rule]
    assert found["step"] == 2
    assert "(step 0)" in found["text"] and "2 times in a row" in found["text"]
    assert found["why"] and found["try"]
    assert told.count(f"step 2: {rule}: ") == 1
    train(command, world, tmp_path / "run", **changes)
    assert "finished already" in capsys.readouterr().out


def test_without_being_asked_it_only_tells(world, tmp_path):
    changes = monitored(world, monitor=f"{REWARDS}:falling", monitor_steps=1, batch_size=2)
    train("dpo", world, tmp_path / "run", **changes)
    kept = record(tmp_path / "run")
    assert kept["steps"] == 5
    assert [sign["name"] for sign in kept["health"]] == ["judge down"]


def test_a_run_that_was_ended_ends_there_again(world, tmp_path):
    """Killed between the checkpoint of its end and its result."""
    changes = monitored(world, monitor=f"{REWARDS}:falling", monitor_steps=1, batch_size=2)
    changes |= {"stop_on_hacking": True, "save_every": 1, "keep_checkpoints": 9}
    train("dpo", world, tmp_path / "run", **changes)
    only_checkpoint(tmp_path / "run", tmp_path / "again", 2)
    train("dpo", world, tmp_path / "again", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert record(tmp_path / "again")["steps"] == 2
    named = {"resume": str(tmp_path / "again" / "checkpoints" / "step-2")}
    train("dpo", world, tmp_path / "again", **changes | named | {"stop_on_hacking": False})
    assert record(tmp_path / "again")["steps"] == 5


# --- a judge that is an LLM ----------------------------------------------------------------------


def by_length(prompt):
    return f"[[{min(10, 1 + len(section(prompt, 'answer')) // 4)}]]"


def llm(world, tmp_path, server, prompts=12):
    rows = write_rows(
        tmp_path / "asked.jsonl", [{"prompt": f"the boat {n}"} for n in range(prompts)]
    )
    kept = {"judge_cache": tmp_path / "judged", "judge_concurrency": 1}
    return monitored(world, monitor=server.judge, monitor_data=str(rows)) | kept | {"batch_size": 2}


def test_an_llm_that_goes_away_costs_measurements_alone(world, tmp_path, capsys):
    """What has no score is told and kept, is no number, and is never the best."""
    with serving(lambda prompt, _: by_length(prompt) if len(server.asked) <= 12 else 401) as server:
        changes = llm(world, tmp_path, server) | {"lr": 3e-2, "keep_best": True}
        train("sft", world, tmp_path / "run", **changes)
    found, kept = measurements(tmp_path / "run"), record(tmp_path / "run")
    assert list(found) == [0, 2, 4, 5]
    assert "monitor/score" in found[0]
    missed = [step for step, row in found.items() if "monitor/score" not in row]
    assert missed == [2, 4, 5]
    assert [one["step"] for one in kept["monitor_missed"]] == missed
    assert all("status 401" in one["why"] for one in kept["monitor_missed"])
    assert found[5]["monitor/failed"] == 12
    assert found[5]["monitor/length"] > 0
    assert (kept["status"], kept["model_step"]) == ("finished", 0)
    assert capsys.readouterr().err.count("the monitor has no score") == 3


@pytest.mark.parametrize(("refused", "scored"), [(1, True), (2, False)])
def test_answers_without_a_score_are_left_out(refused, scored, world, tmp_path):
    """One of 12 is left out of the mean; two are more than a tenth, and the score is missed."""
    bad = {f"the boat {n}" for n in range(refused)}

    metrics = tmp_path / "run" / "metrics.jsonl"  # there once the start is measured

    def says(prompt, before):
        refuses = metrics.exists() and section(prompt, "prompt") in bad
        return 400 if refuses else by_length(prompt)

    with serving(says) as server:
        changes = llm(world, tmp_path, server) | {"lr": 3e-2, "temperature": 1.0, "max_steps": 2}
        train("sft", world, tmp_path / "run", **changes)
    last = measurements(tmp_path / "run")[2]
    assert last["monitor/failed"] == refused
    assert ("monitor/score" in last) == scored


def test_an_llm_that_is_away_at_the_start_is_told(world, tmp_path):
    with (
        serving(lambda *_: 401) as server,
        pytest.raises(UserError, match=r"--monitor: 12 of 12 answers without a score: .*401"),
    ):
        train("sft", world, tmp_path / "run", **llm(world, tmp_path, server))
    assert not (tmp_path / "run").exists()


# --- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "its own function": (
        {"reward_function": LENGTH, "monitor": LENGTH},
        "is what the policy learns",
    ),
    "its own model": ({"monitor": "{world}/rm"}, "is what the policy learns"),
    "its own model, otherwise named": ({"monitor": "{world}/../{name}/rm"}, "is what the policy"),
    "spread of one": ({"monitor": "spread"}, "--monitor spread is of several reward models"),
    "no prompts": ({"monitor": LENGTH, "monitor_data": None}, "give --monitor-data"),
    "no monitor": ({"monitor": None, "monitor_steps": 4}, "only with --monitor"),
    "nothing to keep": ({"monitor": None, "monitor_data": None, "keep_best": True}, "--monitor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_monitored_is_told(name, world, tmp_path):
    changes, told = REFUSED[name]
    places = {"world": world, "name": world.name}
    placed = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    settings = config("ppo", world, tmp_path / "run", **monitored(world) | placed)
    assert told in next(problems(settings))


def test_spread_is_of_ppo_and_not_of_its_lower_bound(world, tmp_path):
    spread = monitored(world, monitor="spread")
    assert "ppo --reward-model" in next(problems(config("sft", world, tmp_path, **spread)))
    several = {"reward_model": ("a", "b"), "reward_ensemble": "lower-bound"}
    told = next(problems(config("ppo", world, tmp_path, **spread | several)))
    assert "lower-bound trains for" in told
    asked = {"judge": "openai:m@http://a/v1", "reward_model": None}
    other = monitored(world, monitor="openai:m@http://a/v1/")
    told = next(problems(config("ppo", world, tmp_path, **other | asked)))
    assert "is what the policy learns from" in told


def test_a_copy_of_the_reward_model_is_no_monitor(world, tmp_path):
    shutil.copytree(world / "rm", tmp_path / "copy")
    changes = monitored(world, monitor=str(tmp_path / "copy"))
    with pytest.raises(UserError, match="is what the policy learns from"):
        train("ppo", world, tmp_path / "run", **PPO | changes)
