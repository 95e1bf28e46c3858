"""What the machine can do at most, and how much work a turn is: for MFU and the bandwidth bound.

`python -m benchmarks.ceilings MODELS` is a side whose turn measures GFLOP/s and GB/s, with
torch set as `load_policy` sets it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.meter import serve
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel

ROWS = (512, 4096)  # tokens of the matrix products
BYTES = 1 << 29
REPEATS = 5


def model_flops(model: LoadedModel, positions: Tensor, head_rows: int, trains: bool) -> float:
    """FLOPs that a model needs for tokens at these positions [T] of their sequences.

    A matrix of P weights takes 2 P a token forward, and backward 2 P for the gradient of its input
    and 2 P for its own, where it is trained. Attention takes 4 x width x keys seen a token and
    layer forward, and twice that backward. The head counts on the rows that need it. Element-wise
    work, the embedding and whatever is computed twice do not count.
    """
    config = model.hf.config
    width = config.num_attention_heads * config.head_dim
    seen = float((positions + 1).sum())
    total = float((12 if trains else 4) * config.num_hidden_layers * width * seen)
    weights = [(m.weight, len(positions)) for m in _linear(model.base)]
    if not model.is_scorer:
        weights.append((_linear(model.hf.get_output_embeddings())[0].weight, head_rows))
    for weight, rows in weights:
        passes = (6 if weight.requires_grad else 4) if trains else 2
        total += passes * float(weight.numel()) * rows
    return total


def weight_bytes(model: LoadedModel, dtype: torch.dtype) -> float:
    """Bytes of all matrices that a decode step reads, the head's too."""
    modules = [*_linear(model.base), *_linear(model.hf.get_output_embeddings())]
    return float(sum(_bytes(m.weight, dtype) for m in modules))


def _bytes(weight: Tensor, dtype: torch.dtype) -> int:
    """Of a matrix in `dtype`, or in 4 bits with the scales of its blocks."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return weight.numel() * dtype.itemsize
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return weight.nbytes + int(scales)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the best of a few calls after a first one."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def matmul_gflops(model: LoadedModel, dtype: torch.dtype) -> float:
    """The best rate over the shapes of the model's own matrices."""
    shapes = {tuple(m.weight.shape) for m in _linear(model.hf)}
    best = 0.0
    for rows in ROWS:
        for out, inner in shapes:
            if out * rows > 1 << 26:  # the head's output would fill the memory
                continue
            x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)
            seconds = fastest(lambda x=x, w=w: linear(x, w))  # type: ignore[misc]
            best = max(best, 2 * rows * out * inner / seconds / 1e9)
    return best


def bandwidth() -> float:
    """GB/s of reading (a sum, a dot product) or of reading and writing (a copy): the best."""
    x = torch.ones(BYTES // 4)
    y = torch.zeros_like(x)
    seconds = [fastest(x.sum), fastest(lambda: x.dot(y)) / 2, fastest(lambda: y.copy_(x)) / 2]
    return BYTES / min(seconds) / 1e9


def main(models: str) -> None:
    """Take turns at measuring."""
    model = load_policy(str(Path(models) / "policy"), torch.device("cpu"))

    def turn() -> dict[str, Any]:
        return {
            "float32": matmul_gflops(model, torch.float32),
            "bfloat16": matmul_gflops(model, torch.bfloat16),
            "bandwidth": bandwidth(),
        }

    serve(turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
