"""AdamW with moments of 8 bits on slices of weights, beside whole ones, and through checkpoints."""

from __future__ import annotations

import atexit
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prefloop import distributed
from prefloop.errors import UserError
from prefloop.models.sharding import _let_groups_go, whole
from prefloop.training import optim, slices
from prefloop.training.adamw import AdamW
from tests.training.small import config

SHAPES = {
    "rows of blocks": (8, 512),
    "uneven rows": (9, 512),  # of the last of four ranks none
    "even slices": (64, 96),
    "vector": (8192,),
    "cut blocks": (65, 70),
}
WHOLE_BLOCKS = list(SHAPES)[:-1]
HALVES = (12, 384)  # whose halves are of whole blocks, and whose quarters are not


def tell_eight(world: Path, output: Path, name: str) -> None:
    """Writes NAME-RANK.json: weights with 8 bits (`eight`), those that are a whole one's to the bit
    after three steps, and after three more from a checkpoint: on these ranks, on one, and from one
    on these (`same`); the error for what cannot be read (`told`), and the line about weights whose
    blocks would be cut (`line`). The checkpoint in the folder NAME is made where it is not there.
    """
    device = torch.device("cpu")
    distributed.start(device)
    mesh = init_device_mesh("cpu", (distributed.world(),), mesh_dim_names=("shards",))
    atexit.register(_let_groups_go, mesh)
    alone = {key: nn.Parameter(seeded(shape, 0)) for key, shape in SHAPES.items()}
    there = {key: divided(alone[key], mesh) for key in alone}
    half = {"halves": divided(seeded(HALVES, 0), mesh)}
    one, several, halves = optimizer(alone), optimizer(there), optimizer(half)
    same = set(SHAPES)
    for number in range(6):
        if number == 3:
            if not (output / name).exists():
                step(half, halves, 0)
                keep(output / name, several)
                keep(output / f"{name}/halves", halves)
            there = {key: divided(alone[key], mesh) for key in alone}
            again = {key: nn.Parameter(alone[key].detach().clone()) for key in alone}
            several, back = optimizer(there), optimizer(again)
            several.load_state_dict(kept(output / name))
            back.load_state_dict(kept(output / name))
            parted = {key: divided(alone[key], mesh) for key in WHOLE_BLOCKS}
            further = optimizer(parted)
            further.load_state_dict(first_of(one.state_dict(), len(parted)))
        step(alone, one, number)
        step(there, several, number)
        same &= {key for key in there if torch.equal(whole(there[key].detach()), alone[key])}
        if number >= 3:
            step(again, back, number)
            same &= {key for key in again if torch.equal(again[key], alone[key])}
            step(parted, further, number)
            same &= {key for key in parted if torch.equal(whole(parted[key].detach()), alone[key])}
    told = ""
    try:
        halves.load_state_dict(kept(output / f"{name}/halves"))
    except UserError as error:
        told = str(error)
    eight = [key for key in there if "scale" in several.state[there[key]]]
    with redirect_stderr(io.StringIO()) as line:
        settings = config("sft", world, output, optimizer="adamw8bit")
        optim.build_optimizer({"policy": list(there.values())}, settings, {})
    found = {"eight": eight, "same": [key for key in SHAPES if key in same]}
    found |= {"told": told, "line": line.getvalue()}
    (output / f"{name}-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


def seeded(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def divided(weight: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight.detach().clone(), mesh, [Shard(0)]))


def optimizer(weights: Mapping[str, nn.Parameter]) -> AdamW:
    group = {"params": list(weights.values()), "weight_decay": 0.1}
    return AdamW([group], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, bits=8)


def step(weights: Mapping[str, nn.Parameter], updates: AdamW, number: int) -> None:
    for place, p in enumerate(weights.values()):
        grad = seeded(p.shape, 100 * number + place + 1)
        mesh = getattr(p, "device_mesh", None)
        p.grad = grad if mesh is None else distribute_tensor(grad, mesh, [Shard(0)])
    updates.step()


def first_of(state: dict[str, Any], count: int) -> dict[str, Any]:
    """Of an optimizer's weights the first."""
    (group,) = state["param_groups"]
    moments = {number: state["state"][number] for number in range(count)}
    return state | {"state": moments, "param_groups": [group | {"params": list(range(count))}]}


def keep(folder: Path, updates: AdamW) -> None:
    cut: dict[str, Tensor] = {}
    state = slices.take_out(updates.state_dict(), cut)
    slices.write(folder / slices.FOLDER, cut)
    if distributed.rank() == 0:
        torch.save(state, folder / "state.pt")
    distributed.barrier()


def kept(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "state.pt", weights_only=True)
    return slices.put_in(state, folder / slices.FOLDER)  # type: ignore[no-any-return]
