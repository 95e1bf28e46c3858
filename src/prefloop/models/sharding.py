"""Models divided among ranks: FSDP2 (`fully_shard`, arXiv 2304.11277) per decoder layer.

Each rank keeps a slice of every weight, of its gradient and of its moments. A layer is whole while
it computes and no longer; embeddings, last norm and head are whole from a forward pass to the end
of its backward pass. Gradients are summed over ranks, never averaged: the loss was divided by the
count of the whole step.

A layer is gathered from all ranks at once, so all ranks must make the same forward passes in the
same order. They need not have the same number of micro-batches or pieces of them: within
`in_step`, ranks agree on each pass before they make it, and one that has none left takes part
with a sequence of two tokens that weighs nothing.
"""

from __future__ import annotations

import atexit
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from prefloop import distributed
from prefloop.errors import UserError
from prefloop.models.four_bits import put_in_bytes, read_in_bytes
from prefloop.models.model import LoadedModel
from prefloop.models.unread import decoder_layers, read

REPLICAS, SHARDS = "replicas", "shards"
DONE = 1 << 30
FEW = 0.02
"""Of a layer's weights, that every rank may keep."""


# --- Which ranks hold what ------------------------------------------------------------------------


def mesh_shape(config: Any) -> tuple[int, ...] | None:
    """[replicas,] shards as the settings ask; None where each rank keeps its models whole."""
    world = distributed.world()
    for name in ("mesh", "shard"):
        value = getattr(config, name)
        if world == 1 and value not in ("auto", "none"):
            raise UserError(
                f"--{name} {value}: there is one process; start several with torchrun "
                "--nproc-per-node N -m prefloop, or leave it out"
            )
    if world == 1 or config.shard == "none":
        return None
    replicas, shards = (1, world) if config.mesh == "auto" else map(int, config.mesh.split("x"))
    if replicas * shards != world:
        raise UserError(
            f"--mesh {config.mesh} is of {replicas * shards} processes, and there are {world}; "
            "give another, or start as many"
        )
    return (replicas, shards) if replicas > 1 else (shards,)


def shard(
    models: Sequence[LoadedModel],
    shape: Sequence[int],
    smallest_pass: Callable[[LoadedModel], Tensor],
) -> None:
    """Divides the models among the ranks, in place; roles of one module once for all of them.

    `smallest_pass` reads all weights of a model that a training's pass does.
    """
    names = (REPLICAS, SHARDS)[-len(shape) :]
    mesh = init_device_mesh(models[0].device.type, tuple(shape), mesh_dim_names=names)
    atexit.register(_let_groups_go, mesh)  # before distributed.py destroys them
    meeting = Meeting(smallest_pass)
    divided: dict[int, Sharded] = {}
    for model in models:
        if model.sharded is not None:
            continue
        key = id(model.hf)
        if key not in divided:
            divided[key] = _divided(model, mesh, meeting)
        model.sharded = replace(divided[key], number=len(meeting.models))
        meeting.models.append(model)
        assert not model.unread, f"{model.source}: weights that no rank has read"


def _let_groups_go(mesh: DeviceMesh) -> None:
    """A mesh keeps its groups, and caches of torch 2.11 keep the mesh; a group's threads that
    outlive Python then end some processes with SIGABRT.
    """
    getattr(mesh, "_pg_registry", {}).clear()


class Root(nn.Module):
    """What FSDP takes for a whole model: it computes whatever it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, in tensors of their own, which FSDP hooks itself to."""
        given = compute()
        return given.clone() if isinstance(given, Tensor) else tuple(x.clone() for x in given)


def _divided(model: LoadedModel, mesh: DeviceMesh, meeting: Meeting) -> Sharded:
    put_in_bytes(model.module)
    bare = _bare_copy(model.module)
    root = Root(model.hf)
    apart = _kept_whole(model)
    for part in (*decoder_layers(model.base), root):
        read_in_bytes(part, model.unread)
        read(part, model.unread)
        others = None if part is root else beside_rounded(model, part)
        kind = None if others is None else torch.bfloat16
        policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=apart | (others or set()))
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)  # sums, on which no more is divided
        part.set_force_sum_reduction_for_comms(True)
    return Sharded(root, model.module, bare, meeting)


def _kept_whole(model: LoadedModel) -> set[nn.Parameter]:
    """Trained weights of another type than most (norms beside bfloat16 matrices): FSDP sums
    gradients of one type together, and these are few.
    """
    trained = [p for p in model.hf.parameters() if p.requires_grad]
    sizes: dict[torch.dtype, int] = {}
    for p in trained:
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    most = max(sizes, key=sizes.__getitem__, default=None)
    return {p for p in trained if p.dtype != most}


def matrices(module: nn.Module) -> set[nn.Parameter]:
    """Those of linear layers, which autocast rounds before each product."""
    linear = (part for part in module.modules() if isinstance(part, nn.Linear | Conv1D))
    return {part.get_parameter("weight") for part in linear}


def beside_rounded(model: LoadedModel, layer: nn.Module) -> set[nn.Parameter] | None:
    """What stays whole of a layer whose matrices travel in bfloat16: all that is not a matrix.

    Autocast would round these anyway: the bits are the same, and its copies go with the gathered
    ones. Gradients are rounded in each backward pass, as under autocast, and summed over passes and
    ranks in float32. None where nothing is to be rounded; where so much would stay whole that
    memory would tell, as of a mixture's experts; and with adapters, whose frozen base is narrow by
    itself and whose dropout is computed in the adapters' type.
    """
    if model.dtype != "bfloat16" or isinstance(model.module, PeftModel):
        return None
    weights, rounded = set(layer.parameters()), matrices(layer)
    count, whole = (sum(p.numel() for p in some) for some in (weights, weights - rounded))
    wide = any(p.dtype == torch.float32 for p in rounded)
    return weights - rounded if wide and whole <= FEW * count else None


def _bare_copy(module: nn.Module) -> nn.Module:
    """The modules without weights, on which gathered ones can stand; settings and tables are
    shared.
    """
    known: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    for part in module.modules():
        held = [vars(part).get(name) for name in ("config", "form")]
        known |= {id(each): each for each in held if each is not None}
    return copy.deepcopy(module, known)


# --- Passes that all ranks make -------------------------------------------------------------------


@dataclass(eq=False)
class Meeting:
    """How ranks agree on the next forward pass, of several models."""

    smallest_pass: Callable[[LoadedModel], Tensor]
    models: list[LoadedModel] = field(default_factory=list)
    is_open: bool = False
    agreed: bool = False  # on the pass under way
    others: list[Tensor] = field(default_factory=list)  # outputs of passes for other ranks' sake

    def come_to(self, wanted: int) -> None:
        """Returns when all ranks that have a pass left make this one; until then makes theirs."""
        assert self.is_open, "a forward pass of a divided model outside of `in_step`"
        while (number := self._next(wanted)) != wanted:
            self._join(number)

    def _next(self, wanted: int) -> int:
        proposed = torch.tensor(wanted)
        dist.all_reduce(proposed, dist.ReduceOp.MIN)
        return int(proposed)

    def _join(self, number: int) -> None:
        """Takes part in another rank's pass."""
        index, recomputed = divmod(number, 2)
        model = self.models[index]
        sharded = model.sharded
        assert sharded is not None
        with self.on_the_way():
            if recomputed:
                output = sharded.recomputed(self.smallest_pass, model)
            else:
                output = self.smallest_pass(model)
        if output.requires_grad:
            self.others.append(output)

    @contextmanager
    def on_the_way(self) -> Iterator[None]:
        """Within it, ranks have agreed already."""
        before, self.agreed = self.agreed, True
        try:
            yield
        finally:
            self.agreed = before

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `in_step`."""
        assert not self.is_open
        self.is_open = True
        self.others.clear()
        try:
            yield
            self.come_to(DONE)
        finally:
            self.is_open = False


@dataclass(frozen=True, eq=False)
class Sharded:
    """A model's place among the divided ones."""

    root: nn.Module
    module: nn.Module  # the model's own, with slices for weights
    bare: nn.Module  # the same without any
    meeting: Meeting
    number: int = 0

    def run(self, compute: Callable[[], Any]) -> Any:
        """One forward pass, with the other ranks'."""
        if not self.meeting.agreed:
            self.meeting.come_to(2 * self.number)
        return self.root(compute)

    def recomputed(self, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """One forward pass (`compute` makes it) that keeps no activations, and is made again when
        its gradient is due.

        As a backward pass of its own: FSDP then puts its state in order after each.
        """
        if not self.meeting.agreed:
            self.meeting.come_to(2 * self.number + 1)

        def again(_: Tensor) -> Tensor:
            with self.meeting.on_the_way():
                return compute(*args)

        trigger = torch.zeros((), requires_grad=True)
        return checkpoint(again, trigger, use_reentrant=True)  # type: ignore[no-any-return]

    def reshard(self) -> None:
        """Frees what a pass without a backward pass has left gathered."""
        assert isinstance(self.root, FSDPModule)
        self.root.reshard()


@contextmanager
def in_step(models: Iterable[LoadedModel]) -> Iterator[list[Tensor]]:
    """Within it, ranks may make different numbers of forward passes of these models.

    Yields what will be, after it, the outputs of passes that were made for other ranks' sake: each
    is to be in the loss with weight 0. All of a backward pass's forward passes stand in one. For
    models that are whole on each rank it does nothing.
    """
    held = [model.sharded for model in models if model.sharded is not None]
    if not held:
        yield []
        return
    meeting = held[0].meeting
    assert all(each.meeting is meeting for each in held)
    with meeting.held():
        yield meeting.others
    if not torch.is_grad_enabled():
        for each in held:
            each.reshard()


def only_multiplied(model: LoadedModel, module: nn.Module) -> set[nn.Parameter]:
    """Of its `module`: matrices that only products read, for which autocast rounds them."""
    if model.dtype != "bfloat16" or isinstance(model.module, PeftModel):
        return set()
    embeddings = (part for part in module.modules() if isinstance(part, nn.Embedding))
    return matrices(module) - {part.get_parameter("weight") for part in embeddings}


@contextmanager
def gathered(
    model: LoadedModel, chosen: Callable[[str], bool] = lambda name: True, rounded: bool = False
) -> Iterator[LoadedModel]:
    """Within it, a copy of the model with whole weights (those of the `chosen` names): for many
    passes on weights that stand still, in which ranks need not agree. All ranks enter it.

    `rounded`: to pass forward only, with what autocast would round in bfloat16.
    """
    sharded = model.sharded
    if sharded is None:
        yield model
        return
    own = dict(sharded.module.named_parameters())
    narrow = only_multiplied(model, sharded.bare) if rounded else set[nn.Parameter]()
    filled = {}
    for name, place in sharded.bare.named_parameters():
        if chosen(name):
            kept = own[name].detach()
            there = whole(kept.to(torch.bfloat16) if place in narrow else kept)
            filled[id(place)] = nn.Parameter(there, own[name].requires_grad)
    with ExitStack() as places:
        for part in sharded.bare.modules():
            for name, p in list(part._parameters.items()):
                if id(p) in filled:
                    part._parameters[name] = filled[id(p)]
                    places.callback(part._parameters.__setitem__, name, p)
        filled.clear()
        yield replace(model, module=sharded.bare, sharded=None)


# --- Slices ---------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all ranks' slices, on each of them; all ranks ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first rank, divided ones one by one in main memory; none on others."""
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if distributed.rank() == 0:
            found[name] = one.cpu() if isinstance(tensor, DTensor) else one
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, in the memory that it has; a whole tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor, or slices like the target's, into the target."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        mesh, placements = target.device_mesh, target.placements
        value = distribute_tensor(
            value.to(target.device, target.dtype), mesh, placements, src_data_rank=None
        )
    local(target).copy_(local(value))


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements, each counted once, in float32; all ranks ask for it."""
    device = tensors[0].device
    norms = {True: [torch.zeros((), device=device)], False: [torch.zeros((), device=device)]}
    for tensor in tensors:
        norm = torch.linalg.vector_norm(local(tensor), dtype=torch.float32)
        norms[isinstance(tensor, DTensor)].append(norm)
    sliced, alike = (torch.stack(norms[kind]).square().sum() for kind in (True, False))
    divided = next((t for t in tensors if isinstance(t, DTensor)), None)
    if divided is not None:
        dist.all_reduce(sliced, group=divided.device_mesh.get_group(SHARDS))
    return sliced + alike
