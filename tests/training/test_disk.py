"""A disk that is full, and signals while a checkpoint is written: what stood before stays."""

import resource
import signal
from contextlib import contextmanager

import pytest

from prefloop.errors import UserError
from prefloop.files import append
from prefloop.recipes.recorder import Recorder
from prefloop.resume import flaw
from prefloop.training.interrupt import Interrupt, uninterrupted
from tests.training.small import assert_same_run, only_checkpoint, train

ROWS = {"batch_size": 2, "save_every": 1, "keep_checkpoints": 99}  # 9 of them: 5 steps


@contextmanager
def no_file_beyond(size):
    """A write past so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train("sft", world, folder, **ROWS)
    return folder


@pytest.mark.parametrize(
    ("step", "told"), [(2, "checkpoints/step-3: cannot"), (5, "run/model: cannot")]
)
def test_no_room_for_a_checkpoint_or_the_model_costs_nothing(step, told, world, whole, tmp_path):
    run = tmp_path / "run"
    only_checkpoint(whole, run, step)
    with no_file_beyond(20_000), pytest.raises(UserError) as caught:
        train("sft", world, run, **ROWS)
    said = str(caught.value)
    assert told in said
    assert "File too large" in said
    assert said.endswith("); make room, then give the same command again")
    assert [path.name for path in run.joinpath("checkpoints").iterdir()] == [f"step-{step}"]
    assert flaw(run / "checkpoints" / f"step-{step}") == ""
    assert not list(run.rglob(".*"))
    train("sft", world, run, **ROWS)
    assert_same_run(whole, run)


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, "a" * 90 + "\n")
    with no_file_beyond(100), pytest.raises(UserError, match=r"cannot be written .* make room"):
        append(path, "b" * 90 + "\n")
    assert path.read_text() == "a" * 90 + "\n"
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device"):
        append(tmp_path / "/dev/full", "b")


def test_an_iteration_cut_short_by_a_kill_is_forgotten(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"iteration": 0}\n{"itera')
    Recorder(None, None, file)
    assert file.read_text() == '{"iteration": 0}\n'


def test_signals_wait_until_the_block_is_done():
    done = []
    with Interrupt() as interrupt:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert not interrupt.asked
        assert interrupt.asked and interrupt.terminated

        def save():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)  # the second, which otherwise ends all at once
                done.append("saved")

        with pytest.raises(KeyboardInterrupt):
            save()
    assert done == ["saved"]
