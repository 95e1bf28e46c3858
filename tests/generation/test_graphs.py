"""Decode steps as graphs: on the CPU a recorder stands for CUDA's, which knows tensors alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from prefloop.generation import engine, graphs
from prefloop.generation.cache import SlotCache
from prefloop.generation.engine import Engine
from prefloop.generation.graphs import Graphs
from prefloop.generation.sampler import Sampling
from tests.generation.naive import PROMPTS, policy
from tests.tiny import ARCHS, Arch

ROWS_ALIKE = torch.__version__ >= "2.13"
"""Before, a product in bfloat16 on the CPU rounds a row otherwise in other company."""
WARM = Sampling(max_new_tokens=70, temperature=0.9, stop_token_ids={9, 60, 61})


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors it ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func == torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read while a graph is recorded")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(found)))
        return found

    def replay(self) -> None:
        """The same operations on the same tensors: no Python of the model's runs."""
        for func, args, kwargs, outputs in self.calls:
            for held, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                held.copy_(new)


def tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    with Recorder() as recorder:
        output = step()
    for _, _, _, outputs in recorder.calls:
        for x in outputs:
            if x.is_floating_point() and x._base is None and x.data_ptr() == output.data_ptr():
                x.fill_(float("nan"))  # a graph that is recorded has not run yet
    return recorder.replay, output


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Engines on the CPU take graphs; those they took."""
    made: list[Graphs] = []

    def as_graphs(step: graphs.Step, cache: SlotCache, device: torch.device) -> Graphs:
        made.append(Graphs(step, cache))
        return made[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(engine, "as_graphs", as_graphs)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_answers_are_the_same(
    arch: Arch, dtype: Any, used: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While slots empty and fill, answers move, and the room grows; windows are 6 tokens wide.

    Transformers' GPT-2 looks for pads among its tokens, which no graph can.
    """
    model = policy(arch)
    ours = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
    (graph,) = used
    assert graph.works == (arch != "gpt2")
    assert graph.room > 64
    assert graph.recorded.keys() <= {1, 2, 4, 6}
    monkeypatch.undo()
    plain = Engine(replace(model, dtype=dtype), 6).generate(PROMPTS, 4, WARM, seed=3)
    flat = [[sample for row in rows for sample in row] for rows in (ours, plain)]
    exact = dtype == "float32" or ROWS_ALIKE
    for mine, other in zip(*flat, strict=True):
        same = [a == b for a, b in zip(mine.tokens, other.tokens, strict=False)]
        agreed = len(same) if all(same) else same.index(False)
        assert agreed >= (max(len(mine.tokens), len(other.tokens)) if exact else 1)
        probs = [torch.tensor(side.log_probs[:agreed]) for side in (mine, other)]
        torch.testing.assert_close(probs[0], probs[1], atol=1e-5 if exact else 0.1, rtol=0)


def test_steps_are_replayed(used: list[Graphs]) -> None:
    """A graph for 4 slots and one more when the room has grown serve all steps but those two."""
    model = policy()
    runs: list[int] = []
    model.base.embed_tokens.register_forward_pre_hook(lambda *_: runs.append(1))
    Engine(model, 4).generate([PROMPTS[0]], 4, Sampling(max_new_tokens=60), seed=0)
    assert len(runs) == 1 + 2 * 2  # a prefill; each graph's first step, plain and recorded


@pytest.mark.parametrize("why", ["reads a number", "gives other numbers"])
def test_what_cannot_be_recorded_is_not(
    why: str, used: list[Graphs], caplog: pytest.LogCaptureFixture
) -> None:
    """The steps are then taken one by one, and the answers are the same."""
    model = policy()
    expected = Engine(model, 4).generate(PROMPTS, 2, WARM, seed=3)
    used.clear()
    runs: list[int] = []

    def others(part: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        runs.append(1)  # the prefill, a step, and that step recorded
        return (args[0] + 1,) if len(runs) == 3 else None

    def reads(part: Any, args: Any, output: Tensor) -> None:
        assert bool(output.isfinite().all())

    if why == "reads a number":
        model.base.norm.register_forward_hook(reads)
    else:
        model.base.embed_tokens.register_forward_pre_hook(others)
    assert Engine(model, 4).generate(PROMPTS, 2, WARM, seed=3) == expected
    assert not used[0].works
    assert not used[0].recorded
    message = "decode steps are not taken as CUDA graphs: the model does not suit them"
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [message]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_numbers_of_slots_are_rounded(count: int, size: int) -> None:
    assert graphs._rounded(count) == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    model = policy()
    expected = Engine(model, 6).generate(PROMPTS, 4, WARM, seed=3)
    model.module.to("cuda")
    ours = Engine(replace(model, device=torch.device("cuda")), 6).generate(PROMPTS, 4, WARM, seed=3)
    assert [s.tokens for row in ours for s in row] == [s.tokens for row in expected for s in row]
