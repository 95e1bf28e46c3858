"""Whatever ends a run: its last whole step is saved, and leads on to the same bits."""

import json

import pytest
import torch

from prefloop.errors import UserError
from prefloop.models.load import load_policy
from prefloop.runs import newest_checkpoint
from prefloop.training import loop, ppo, rows
from prefloop.training.sft import SFT
from prefloop.training.start import start
from tests.training.small import REWARDS, assert_same_run, config, lines, train

# The reward draws from every generator that a run keeps; evaluating draws from them, too.
PPO = {
    "batch_size": 3,
    "ppo_epochs": 2,
    "num_minibatches": 2,
    "epochs": 2.0,
    "reward_function": f"{REWARDS}:random",
    "normalize_scores": True,
    "kl_target": 0.01,
    "kl_horizon": 20.0,
    "eval_fraction": 0.2,
    "eval_every": 1,
}
SUPERVISED = {"batch_size": 2, "eval_fraction": 0.2, "eval_every": 1}


class Breaks:
    """A method one of whose members raises when it is called for the `at`th time."""

    def __init__(self, method, member, at, error):
        self._method, self._member, self._left, self._error = method, member, at, error

    def __getattr__(self, name):
        value = getattr(self._method, name)
        if name != self._member:
            return value

        def call(*words):
            found = value(*words)
            if name == "steps":
                return self._broken(found)
            self._count()
            return found

        return call

    def _broken(self, steps):
        for step in steps:
            self._count()
            yield step

    def _count(self):
        self._left -= 1
        if self._left == 0:
            raise self._error


def begun(command, world, output, **changes):
    """The method of a run, and what `train` takes beside it."""
    settings = config(command, world, output, **changes)
    run, device = start(settings, command)
    if command == "ppo":
        return ppo.build(settings, device, run), settings, run
    policy = load_policy(settings.model, device)
    examples = rows.read_examples(settings, "demonstration", policy, run)
    return SFT(settings, policy, *examples), settings, run


def broken_run(world, output, member, at, error, command="ppo", **changes):
    method, settings, run = begun(command, world, output, **changes)
    with pytest.raises(BaseException) as caught, run:
        loop.train(Breaks(method, member, at, error), settings, run)
    return caught.value


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train("ppo", world, folder / "ppo", **PPO)
    train("sft", world, folder / "sft", **SUPERVISED)
    return folder


ENDS = {  # what fails: member, the how manyth time, with what; the step that is kept
    "sampling": ("steps", 6, RuntimeError("reward service"), 5),
    "the user, in a rollout": ("steps", 5, KeyboardInterrupt(), 4),
    "memory": ("loss", 7, torch.OutOfMemoryError("CUDA out of memory."), None),
    "main memory": ("loss", 7, RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), None),
    "evaluation": ("evaluate", 7, UserError("judge.py: no answer"), 6),
    "the last evaluation": ("evaluate", 13, ZeroDivisionError(), 12),
    "export": ("export", 1, OSError("no space left"), 12),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_last_whole_step_is_kept(name, world, whole, tmp_path):
    member, at, error, step = ENDS[name]
    output = tmp_path / "run"
    told = broken_run(world, output, member, at, error, **PPO)
    kept = newest_checkpoint(output)
    assert kept is not None
    if step is not None:
        assert kept.name == f"step-{step}"
        assert told is error
    else:
        assert isinstance(told, UserError)
        assert "out of memory (" in str(told) and "lower --micro-batch-tokens" in str(told)
    assert json.loads((output / "run.json").read_text())["status"] in ("failed", "interrupted")
    train("ppo", world, output, **PPO)
    assert_same_run(whole / "ppo", output)


@pytest.mark.parametrize(("member", "at", "step"), [("steps", 3, 2), ("evaluate", 3, 2)])
def test_so_it_is_for_rows(member, at, step, world, whole, tmp_path):
    output = tmp_path / "run"
    broken_run(world, output, member, at, ValueError(), command="sft", **SUPERVISED)
    assert newest_checkpoint(output).name == f"step-{step}"
    train("sft", world, output, **SUPERVISED)
    assert_same_run(whole / "sft", output)


def test_a_tracker_that_fails_costs_no_line(world, whole, tmp_path):
    class Offline:
        def log(self, step, metrics):
            if step == 5:
                raise ConnectionError("tracker")

        def close(self):
            pass

    method, settings, run = begun("ppo", world, tmp_path / "run", **PPO)
    run._tracker = Offline()
    with pytest.raises(ConnectionError), run:
        loop.train(method, settings, run)
    assert newest_checkpoint(run.directory).name == "step-5"
    train("ppo", world, tmp_path / "run", **PPO)
    assert_same_run(whole / "ppo", tmp_path / "run")


def test_half_a_step_is_not_kept(world, whole, tmp_path):
    """From the moment that weights change until the step is whole, nothing is saved."""
    broken_run(world, tmp_path / "bare", "stepped", 3, KeyboardInterrupt(), **PPO)
    assert newest_checkpoint(tmp_path / "bare") is None
    output = tmp_path / "run"
    broken_run(world, output, "stepped", 3, KeyboardInterrupt(), **PPO, save_every=2)
    assert newest_checkpoint(output).name == "step-2"
    train("ppo", world, output, **PPO, save_every=2)
    assert_same_run(whole / "ppo", output)


def test_what_is_not_finite_is_not_kept(world, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 2: the loss is nan .* saved over .*step-1; lower"):
        train("sft", world, output, batch_size=2, lr=1e30, save_every=1)
    assert newest_checkpoint(output).name == "step-1"


def test_runs_save_by_time_too(world, tmp_path):
    for minutes, kept in ((1e-9, [f"step-{n}" for n in range(1, 6)]), (0.0, ["step-5"])):
        output = tmp_path / str(minutes)
        changes = {"batch_size": 2, "save_minutes": minutes, "keep_checkpoints": 99}
        broken_run(world, output, "export", 1, OSError(), command="sft", **changes)
        assert sorted(p.name for p in (output / "checkpoints").iterdir()) == kept
        train("sft", world, output, **changes)
        assert not (output / "checkpoints").exists()  # not asked for, so not left behind


def test_skipped_steps_have_no_loss(world, tmp_path):
    changes = {"ppo_epochs": 4, "num_minibatches": 2, "batch_size": 3, "target_kl": 1e-3}
    train("ppo", world, tmp_path / "run", lr=3e-3, **changes)
    skipped = [line for line in lines(tmp_path / "run") if "policy/approxkl_avg" not in line]
    assert skipped
    assert all(not {"loss", "grad_norm"} & line.keys() and "lr" in line for line in skipped)
