"""AdamW (arXiv 1711.05101) with moments of 32 or 8 bits, on float32 or bfloat16 parameters.

bfloat16 has 8 bits of mantissa: an update below 1/512 of a weight would be lost to rounding, step
after step. So such weights are updated in float32 and rounded stochastically, up or down with the
probabilities that make the mean exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as divided_zeros
from torch.optim.adamw import adamw

from prefloop.errors import UserError
from prefloop.models.four_bits import bitsandbytes
from prefloop.models.sharding import local
from prefloop.training.slices import Stored, read

CHUNK = 2**22
"""Elements that are updated at once where an update needs float32 copies."""
BLOCK = 256
"""Elements that share one scale of 8-bit moments: bitsandbytes' block, which divides CHUNK."""
FEWEST = 4096
"""Smaller tensors keep moments of 32 bits, as bitsandbytes has it by default."""
ASKED = "--optimizer adamw8bit"
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "scale"


def round_stochastically(
    x: Float32[Tensor, " n"], generator: torch.Generator
) -> BFloat16[Tensor, " n"]:
    """x in bfloat16, up or down at random such that E[result] = x; infinities and NaN stay.

    What lies beyond bfloat16's largest number may become infinite, as in any rounding.
    """
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    drawn.random_(-(2**63), None, generator=generator)  # all 64 bits: four times 16
    noise = drawn.view(torch.int16)[: x.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    # The upper 16 bits are the bfloat16 towards zero; the carry of the lower ones moves it away.
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(x.isnan(), x, bits.view(torch.float32)).bfloat16()


def require_bitsandbytes(optimizer: str) -> None:
    """UserError where `optimizer` needs a package that is not there."""
    if optimizer == "adamw8bit":
        bitsandbytes(ASKED)


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; torch's fused step wherever all of it is float32.

    `bits` 8 keeps both moments in 8 bits, a scale for each BLOCK elements (arXiv 2110.02861), on
    tensors of FEWEST elements and more whose blocks are not cut among ranks (see `scale_shape`);
    else they are float32, bfloat16 parameters' too. The bits that round are drawn anew for each
    step from `seed` and the number of steps: a checkpoint holds that number, and all ranks round
    alike.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bits: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.bits, self.seed, self.steps = bits, seed, 0
        self._functional: Any = bitsandbytes(ASKED).functional if bits == 8 else None
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            whole = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.start(p)
                if p.dtype == torch.bfloat16 or SCALE in self.state[p]:
                    if p.device not in generators:
                        generators[p.device] = torch.Generator(p.device)
                        generators[p.device].manual_seed(self.seed * 1_000_003 + self.steps)
                    self._step_in_chunks(p, group, generators[p.device])
                else:
                    whole.append(p)
            if whole:
                states = [self.state[p] for p in whole]
                steps = [state["step"] for state in states]
                first, second = ([local(state[name]) for state in states] for name in MOMENTS)
                grads = [local(p.grad) for p in whole]
                _adamw([local(p) for p in whole], grads, first, second, steps, group)
        self.steps += 1

    def start(self, p: Tensor) -> None:
        """Moments of zero."""
        if not isinstance(p, DTensor):
            p.data = p.data.contiguous()  # for what goes through it in chunks
        shape = scale_shape(p) if self.bits == 8 and p.numel() >= FEWEST else None
        eight = shape is not None
        kind = torch.uint8 if eight else torch.promote_types(p.dtype, torch.float32)
        state = self.state[p]
        for name in MOMENTS:
            state[name] = torch.zeros_like(p, dtype=kind)
        if shape is not None:
            state[SCALE] = _zeros_beside(p, shape)
        state["step"] = 0 if eight else torch.zeros((), device=p.device)

    def _step_in_chunks(
        self, p: Tensor, group: Mapping[str, Any], generator: torch.Generator
    ) -> None:
        """The same in float32 copies of CHUNK elements, so that no more of them stand at once."""
        state = self.state[p]
        assert p.grad is not None
        weights, grad = local(p.detach()).view(-1), local(p.grad).reshape(-1)
        moments = [local(state[name]).view(-1) for name in MOMENTS]
        for part in _parts(len(weights)):
            exact, first, second = weights[part].float(), *(m[part] for m in moments)
            slope = grad[part].to(exact.dtype)
            if SCALE in state:
                blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
                scales = local(state[SCALE]).flatten(1)[:, blocks]
                self._step_8bit(exact, slope, (first, second), scales, state["step"] + 1, group)
            else:
                steps = [state["step"].clone()]  # which torch counts up
                _adamw([exact], [slope], [first], [second], steps, group)
            if p.dtype == torch.bfloat16:
                weights[part].copy_(round_stochastically(exact, generator))
        state["step"] += 1

    def _step_8bit(
        self,
        weights: Tensor,
        grad: Tensor,
        moments: tuple[Tensor, Tensor],
        scales: Tensor,
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        """bitsandbytes' own; `scales` [2, blocks] are those of both moments."""
        if weights.device not in self._maps:
            made = (self._functional.create_dynamic_map(signed=signed) for signed in (True, False))
            first, second = (values.to(weights.device) for values in made)
            self._maps[weights.device] = first, second
        (beta1, beta2), nothing = group["betas"], 0.0
        self._functional.optimizer_update_8bit_blockwise(
            "adam", grad, weights, *moments, beta1, beta2, nothing, nothing, group["eps"], step,
            group["lr"], *self._maps[weights.device], *scales, group["weight_decay"],
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the number of steps."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts it back; unlike torch's, moments keep their type whatever the parameter's is."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        divided = []
        for number, kept in state_dict["state"].items():
            p = parameters[number]
            for name, value in kept.items():
                if name == SCALE and (isinstance(p, DTensor) or isinstance(value, Stored)):
                    target, value = _scale_to_read(p, value)
                    self.state[p][name] = target if isinstance(p, DTensor) else target.flatten(1)
                    divided.append((target, value))
                elif name in MOMENTS and (isinstance(p, DTensor) or isinstance(value, Stored)):
                    self.state[p][name] = torch.zeros_like(p, dtype=value.dtype)
                    divided.append((self.state[p][name], value))
                else:
                    whole = isinstance(value, Tensor)
                    self.state[p][name] = value.to(p.device) if whole else value
        read(divided)
        self.steps = int(state_dict["steps"])


def scale_shape(p: Tensor) -> tuple[int, ...] | None:
    """That of the scales of both moments: [2, blocks]; where rows are divided among ranks and each
    is of whole blocks, [2, rows, blocks of a row]. None where a block would be cut.

    So a rank's blocks are those that one rank would have, and any number of ranks reads them.
    """
    blocks = -(-p.numel() // BLOCK)
    if not isinstance(p, DTensor):
        return 2, blocks
    rows, ranks = p.shape[0], p.device_mesh.shape[-1]
    if (p.numel() // rows) % BLOCK == 0:
        return 2, rows, p.numel() // rows // BLOCK
    return None if rows % ranks or p.numel() // ranks % BLOCK else (2, blocks)


def _zeros_beside(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32, on the ranks that hold p as p is."""
    if not isinstance(p, DTensor):
        return torch.zeros(shape, device=p.device)
    placements = [Shard(1) if isinstance(each, Shard) else each for each in p.placements]
    return divided_zeros(shape, device_mesh=p.device_mesh, placements=placements)


def _scale_to_read(p: Tensor, value: Tensor | Stored) -> tuple[Tensor, Tensor | Stored]:
    """Where a checkpoint's scales go, and they themselves, in one shape."""
    shape = scale_shape(p) if isinstance(p, DTensor) else tuple(value.shape)
    if shape is None:
        raise UserError(
            f"{ASKED}: the checkpoint's blocks of {BLOCK} elements, in a weight of "
            f"{' x '.join(map(str, p.shape))}, would be cut among {p.device_mesh.shape[-1]} "  # type: ignore[attr-defined]
            "processes; go on with as many as before"
        )
    return _zeros_beside(p, shape), value.view(shape) if isinstance(value, Tensor) else value


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    """torch's fused step of some tensors."""
    beta1, beta2 = group["betas"]
    adamw(
        weights, grads, first, second, [], steps, fused=True, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"],
    )  # fmt: skip
