"""What a checkpoint holds, and by what it knows the weights that stay fixed."""

import shutil

import pytest
import torch

from prefloop import resume
from prefloop.errors import UserError
from prefloop.training import checkpoint
from tests.training.small import lines, only_checkpoint, policy, train


def digest(model):
    return checkpoint.weights_digest(model, list(model.hf.state_dict().values()))


@pytest.fixture
def copied(world, tmp_path):
    """A world of its own."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def test_weights_that_were_moved_in_memory_are_seen(world):
    """A single element past its data's version count, or two that changed places."""
    start = digest(policy(world))
    assert digest(policy(world)) == start
    one = policy(world)
    one.hf.get_input_embeddings().weight.data[123, 7] += 1e-3
    swapped = policy(world)
    vector = next(p for p in swapped.module.parameters() if p.ndim == 1)
    vector.data[:2] = torch.tensor([2.0, 3.0])
    turned = policy(world)
    next(p for p in turned.module.parameters() if p.ndim == 1).data[:2] = torch.tensor([3.0, 2.0])
    assert len({start, *map(digest, (one, swapped, turned))}) == 4


def test_weights_without_files_are_hashed_themselves(world, tmp_path):
    model = policy(world)
    model.source = "made in memory"
    start = digest(model)
    weight = model.hf.get_input_embeddings().weight.data
    low, high = weight[100, 3].clone(), weight[200, 4].clone()
    weight[100, 3], weight[200, 4] = high, low  # which no sum sees
    assert digest(model) != start
    weight[100, 3], weight[200, 4] = low, high
    assert digest(model) == start


def test_another_type_of_a_tensor_is_another_digest(world):
    model = policy(world)
    start = digest(model)
    model.module.bfloat16()
    assert digest(model) != start


def test_a_base_that_changed_meanwhile_is_told(copied, tmp_path):
    """LoRA's, when its file is another one: by its bytes, not by its time."""
    changes = {"batch_size": 3, "lora_rank": 2, "save_every": 1, "keep_checkpoints": 9}
    train("sft", copied, tmp_path / "whole", **changes)
    for name in ("same", "again"):
        only_checkpoint(tmp_path / "whole", tmp_path / name, 1)
    weights = copied / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data)
    train("sft", copied, tmp_path / "same", **changes)
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="not those that the run began with"):
        train("sft", copied, tmp_path / "again", **changes)


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
def test_lora_checkpoints_hold_adapters_alone(command, world, tmp_path):
    """Weights and two moments of what is trained, and less than 40 KB of all else."""
    run = tmp_path / "run"
    changes = {"batch_size": 3, "lora_rank": 1, "save_every": 1, "max_steps": 1}
    train(command, world, run, **changes)
    assert lines(run)
    state = run / "checkpoints" / "step-1" / "state.pt"
    trained = torch.load(state, weights_only=True)["models"]
    count = sum(t.numel() for tensors in trained.values() for t in tensors.values())
    whole = sum(p.numel() for p in policy(world).module.parameters())
    assert 0 < count < whole * len(trained) / 4
    assert state.stat().st_size < 12 * count + 40_000 + 1000 * sum(map(len, trained.values()))


def test_an_old_checkpoint_that_a_kill_left_half_removed_is_none(tmp_path, monkeypatch):
    """It has no name of a checkpoint by then; the next time its step goes, all of it goes."""

    class Killed(BaseException):
        pass

    def kill(path, **_):
        if path.exists():
            (path / checkpoint.FILE).unlink()
            raise Killed

    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, {"a": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(resume.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            checkpoint.save(folder, 2, {"a": 2}, keep=1)
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["step-2"]
    assert sorted(path.name for path in folder.iterdir()) == [".step-1.old.tmp", "step-2"]
    checkpoint.remove_all(folder)
    assert not folder.exists()
