"""Following memory without having any: the live storages of fake tensors, and where they peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefloop.models.model import LoadedModel

META = torch.device("meta")
GPU = torch.device("xpu")
"""Stands for any GPU: torch speaks of it where there is none, and our code asks for `cpu` alone."""

WEIGHTS, CAST, GRADIENTS = "weights", "weights, cast", "gradients"
OPTIMISER, ACTIVATIONS = "optimiser", "activations"
GATHERED, GATHERED_GRADIENTS = "weights, gathered", "gradients, gathered"
CACHE, TO_GENERATE = "KV cache", "weights to generate"
KINDS = (WEIGHTS, CAST, GATHERED, TO_GENERATE, GRADIENTS, GATHERED_GRADIENTS, OPTIMISER,
         ACTIVATIONS, CACHE)  # fmt: skip
"""What bytes are held for, in the order of tables."""


class Part(NamedTuple):
    """What a byte is held for."""

    model: str
    kind: str


Parts = Mapping[Part, int]
"""Bytes by part."""


class Held(weakref.ref[Any]):
    """Memory that something holds, and its place in a ledger."""

    __slots__ = ("key",)
    key: int


class Ledger(TorchDispatchMode):
    """While it is on, counts the bytes of every storage that an operation makes, until it is freed.

    A new storage belongs to the activations of the model that computed last. Each stage of the work
    keeps the parts as they were at its peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[Part] = Counter()
        self.peaks: dict[str, Parts] = {}
        self.model = ""
        self._stage, self._section = "", 0
        self._total = self._highest = 0
        self._held: dict[int, tuple[Held, Part, int]] = {}
        self._gone: list[Held] = []

    def enter_stage(self, stage: str) -> None:
        """What is held from now on counts for this stage, or for none; one may be entered again."""
        self._free()
        self._stage, self._section = stage, 0
        self._highest = sum(self.peaks.get(stage, {}).values())
        self._mark()

    def enter_section(self) -> None:
        """The next part of the stage, which has a peak of its own, `STAGE/NUMBER`."""
        number = self._section + 1
        self.enter_stage(f"{self._stage.partition('/')[0]}/{number}")
        self._section = number

    def claim(self, tensor: Tensor, part: Part) -> None:
        """This tensor's storage is of that part."""
        self._free()
        memory = _memory(tensor)
        key = id(memory)
        if key in self._held:
            reference, before, size = self._held[key]
            self.now[before] -= size
            self.now[part] += size
            self._held[key] = reference, part, size
            return
        size = memory.nbytes() if isinstance(memory, UntypedStorage) else memory.nbytes
        reference = Held(memory, self._gone.append)
        reference.key = key
        self._held[key] = reference, part, size
        self.now[part] += size
        self._total += size
        self._mark()

    def _free(self) -> None:
        """Strikes out what is gone. Not as it goes: what a signal raises within a weak reference's
        call is lost.
        """
        while self._gone:
            _, part, size = self._held.pop(self._gone.pop().key)
            self.now[part] -= size
            self._total -= size

    def _mark(self) -> None:
        if self._total >= self._highest and self._stage:
            self._highest = self._total
            self.peaks[self._stage] = {part: size for part, size in self.now.items() if size}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See TorchDispatchMode."""
        output = func(*args, **(kwargs or {}))
        self._free()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(_memory(leaf)) not in self._held:
                self.claim(leaf, Part(self.model, ACTIVATIONS))
        return output


def _memory(tensor: Tensor) -> UntypedStorage | Tensor:
    """What holds the tensor's bytes: its storage, or itself where oneDNN laid it out."""
    return tensor if tensor.is_mkldnn else tensor.untyped_storage()


class AsIfOn(TorchFunctionMode):
    """Within it tensors are meta tensors that say they are on `device`, so that code for it runs.

    Any torch plans for a GPU so, without one. Autocast, which does not know meta tensors, is done
    here. What depends on values, of which such tensors have none, is taken at its largest.
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.device = device if device.type == "cpu" else GPU
        self.keeps_casts = False
        self._casts: dict[Tensor, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        if func == DEVICE_OF:  # made anew at each look
            return self.device
        if func is Tensor.__contains__:
            return False
        if func is torch.bincount:
            return torch.zeros(kwargs["minlength"], dtype=torch.long)
        if func is Tensor.__getitem__ and getattr(args[1], "dtype", None) is torch.bool:
            return args[0][torch.arange(len(args[1]))]
        if func in PRODUCTS and torch.is_autocast_enabled(self.device.type):
            args = tuple(map(self._cast, args))
        if func is functional.scaled_dot_product_attention and self._fuses():
            query, _, values = args[:3]
            return query.new_empty(*query.shape[:-1], values.shape[-1])
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(_on_meta, args), **{k: _on_meta(v) for k, v in kwargs.items()})

    def _fuses(self) -> bool:
        """Whether attention is one kernel, which keeps nothing; of meta tensors it is many."""
        return self.device.type != "cpu" and not torch.is_grad_enabled()

    def _cast(self, value: Any) -> Any:
        """As autocast does: a weight that is trained once, anything else each time."""
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if value in self._casts:
            return self._casts[value]
        cast = value.to(torch.bfloat16)
        if isinstance(value, nn.Parameter):
            self.ledger.claim(cast, Part(self.ledger.model, CAST))
            if value.requires_grad:
                self._casts[value] = cast
        return cast

    def forget_casts(self) -> None:
        """Autocast ends: its copies of weights go."""
        if not self.keeps_casts:
            self._casts.clear()

    @contextmanager
    def one_cast(self, model: LoadedModel) -> Iterator[None]:
        """Within it weights are cast once, as the engine has it."""
        self.keeps_casts = True
        with model.computing():
            yield
        self.keeps_casts = False
        self.forget_casts()


DEVICE_OF: Callable[[Tensor], torch.device] = Tensor.device.__get__
PRODUCTS = {
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.matmul,
    torch.mm,
    Tensor.__matmul__,
    Tensor.addmm,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
}
"""Functions whose arguments autocast makes shorter."""


def _on_meta(value: Any) -> Any:
    is_name = isinstance(value, str) and value.partition(":")[0] in ("cpu", GPU.type)
    return META if is_name or isinstance(value, torch.device) else value


def backward(loss: Tensor) -> None:
    """`loss.backward()` with AsIfOn in it, too; torch's own puts such modes aside."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )
