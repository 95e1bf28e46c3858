"""On a GPU: weights in 4 bits and in bfloat16, moments in 8 bits, and weights that NCCL gathers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prefloop.training import start
from tests.training import small
from tests.training.cases import run_case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
STORED: dict[str, dict[str, Any]] = {
    "nf4": {"weights": "nf4", "lora_rank": 2},
    "nf4-recomputed": {"weights": "nf4", "lora_rank": 2, "gradient_checkpointing": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "bfloat16": {"weights": "bfloat16", "dtype": "bfloat16"},
    "all": {"weights": "bfloat16", "dtype": "bfloat16", "optimizer": "adamw8bit"},
}
DIVIDED = ("sft", "bradley-terry", "dpo-sigmoid", "dpo-kto", "ppo-gae", "ppo-one-base")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, with the backends that torchrun's would have."""
    file = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=file, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", ["sft", "bradley-terry", "dpo-sigmoid"])
def test_a_first_step_is_the_cpu_s(how: str, name: str, world: Path, tmp_path: Path) -> None:
    """Of weights that were stored by the CPU's kernels there and by CUDA's here."""
    pytest.importorskip("bitsandbytes")
    more = STORED[how] | {"max_steps": 1}
    run_case(name, world, tmp_path / "cpu", **more)
    run_case(name, world, tmp_path / "cuda", device="cuda", **more)
    cpu, cuda = (small.lines(tmp_path / kind)[0] for kind in ("cpu", "cuda"))
    close = 1e-3 if "dtype" not in more else 0.05
    assert cuda["loss"] == pytest.approx(cpu["loss"], rel=close, abs=close)
    assert cuda["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=10 * close)


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_resumed_runs_go_on(how: str, command: str, world: Path, tmp_path: Path) -> None:
    """Moments and the draws of rounding are where they were."""
    pytest.importorskip("bitsandbytes")
    more = STORED[how] | {"device": "cuda", "save_every": 2, "max_steps": 4}
    small.train(command, world, tmp_path / "whole", **more)
    small.only_checkpoint(tmp_path / "whole", tmp_path / "half", 2)
    small.train(command, world, tmp_path / "half", **more)
    whole, half = (small.lines(tmp_path / kind) for kind in ("whole", "half"))
    assert [line["step"] for line in half] == [line["step"] for line in whole]
    close = 1e-4 if "dtype" not in more else 0.02
    assert half[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=close, abs=close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DIVIDED)
def test_weights_that_are_gathered_train_as_whole_ones(
    name: str,
    dtype: str,
    world: Path,
    tmp_path: Path,
    one_rank: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP's streams, hooks and reductions by NCCL, though of a single rank."""
    run_case(name, world, tmp_path / "whole", device="cuda", dtype=dtype)
    monkeypatch.setattr(start, "mesh_shape", lambda config: (1,))
    run_case(name, world, tmp_path / "gathered", device="cuda", dtype=dtype)
    if dtype == "float32":
        skip = ("grad_norm",)
        small.assert_close_runs(tmp_path / "whole", tmp_path / "gathered", 2e-4, skip=skip)
        return
    whole, gathered = (small.lines(tmp_path / kind)[0] for kind in ("whole", "gathered"))
    assert gathered["loss"] == pytest.approx(whole["loss"], rel=0.05, abs=0.05)
