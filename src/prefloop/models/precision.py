"""Precision of the matrix products: bfloat16 autocast, and the fastest float32 that is exact."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

Products = Literal["float32", "bfloat16"]
FLOAT32_ERROR = 1e-5  # of the largest element; float32 sums stay near 1e-6, bfloat16 ones near 1e-2
PROBES = ((8, 576, 1536), (300, 576, 576), (64, 64, 4096))  # rows, inner size, columns


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """bfloat16 compute over float32 weights, or nothing where `dtype` is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def product_type(name: str, device: torch.device) -> torch.dtype:
    """The type that --dtype names; `auto` is bfloat16 where the device multiplies it natively.

    That is CUDA from Ampere on, and processors with AVX-512-BF16 or AMX.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return torch.bfloat16 if native else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@functools.cache
def speed_up_float32() -> bool:
    """Lets oneDNN multiply float32 matrices on the CPU, if what it computes is float32.

    torch's own choice, MKL, keeps to AVX2 on AMD processors; oneDNN's kernels for AVX-512 are twice
    as fast there. torch takes them only where bfloat16 sums are allowed, and on processors with AMX
    they are then bfloat16: so a few products are compared with float64 first. True if taken.
    """
    mkldnn: Any = torch.backends.mkldnn  # whose stubs lack matmul
    backend = mkldnn.matmul
    chosen_already = backend.fp32_precision != "none"
    if chosen_already or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    backend.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    exact = all(_is_float32(*shape, generator) for shape in PROBES)
    if not exact:
        backend.fp32_precision = "none"
    return exact


def _is_float32(rows: int, inner: int, columns: int, generator: torch.Generator) -> bool:
    """A linear layer's output and both of its gradients against float64."""
    x = torch.randn(rows, inner, generator=generator, requires_grad=True)
    w = torch.randn(columns, inner, generator=generator, requires_grad=True)
    g = torch.randn(rows, columns, generator=generator)
    with torch.enable_grad():
        output = torch.nn.functional.linear(x, w)
        by_x, by_w = torch.autograd.grad(output, (x, w), g)

    def near(product: Tensor, left: Tensor, right: Tensor) -> bool:
        exact = left.detach().double() @ right.detach().double()
        return bool((product - exact).abs().max() <= FLOAT32_ERROR * exact.abs().max())

    return near(output, x, w.T) and near(by_x, g, w) and near(by_w, g.T, x)
