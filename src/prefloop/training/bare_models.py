"""A run's models as they are before any weight is read: shapes and types, on no device."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from prefloop.config import PPOConfig, TrainingConfig
from prefloop.config.ranges import ALL_LINEAR
from prefloop.errors import UserError, first_line
from prefloop.models import adapters, four_bits, lean, shared, weights
from prefloop.models.attention import varlen
from prefloop.models.attention.plan import NAME
from prefloop.models.load import enable_checkpointing
from prefloop.models.model import LoadedModel
from prefloop.models.selftest import may_pack

META = torch.device("meta")
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
QUANTISED, BLOCK, SCALES = (
    2,
    four_bits.BLOCK,
    256,
)  # weights a byte, a block's, and a block's of scales


class Role(NamedTuple):
    """A model that a run holds."""

    name: str
    config: PretrainedConfig
    kept: weights.Kept
    stored: torch.dtype = torch.float32  # as the weights are read
    scorer: bool = False
    trained: bool = False
    packed: bool = True
    varlen: bool = False  # in bfloat16, on a GPU
    regular: bool = True  # all layers are alike
    numel: int = 0  # of its weights
    on: str | None = None  # the role whose base it shares
    adapter: LoraConfig | None = None  # of a reward model that does

    def recomputes(self, config: TrainingConfig) -> bool:
        """Whether its backward pass computes activations again."""
        return self.trained and config.gradient_checkpointing


@dataclass(eq=False)
class WatchedModel(LoadedModel):
    """A model that tells when it begins to compute and when it is done."""

    begins: Callable[[], None] = lambda: None
    ends: Callable[[], None] = lambda: None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See LoadedModel."""
        self.begins()
        with super().computing():
            yield
        self.ends()


def make_role(
    name: str,
    path: str,
    model: PretrainedConfig,
    config: TrainingConfig,
    device: torch.device,
    *,
    scorer: bool = False,
    trained: bool = False,
) -> Role:
    """A model of this architecture; that it passes the self-test where it may is taken for granted.

    So is a GPU of today, where there is none to ask.
    """
    dtype = config.dtype
    asked = device.type != "cuda" or torch.cuda.is_available()
    if dtype == "auto" and not asked:
        dtype = "bfloat16"
    storage = weights.Storage(dtype, config.weights)
    plan = weights.kept(storage, device, trained and not config.lora_rank)
    packed = may_pack(model)
    flash = device.type == "cuda" and plan.products == torch.bfloat16
    flash = flash and (varlen.serves(device) if asked else True)
    stored = _stored_type(path, plan) or getattr(model, "dtype", None) or torch.float32
    role = Role(name, model, plan, stored, scorer, trained, packed, packed and flash)
    regular, numel = _layout(role)
    return role._replace(regular=regular, numel=numel)


def read_config(path: str) -> PretrainedConfig:
    """A model's configuration, an adapter's base's; no weights are read."""
    adapters.require_there(path)
    path = adapters.root_base(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a model folder or hub id that Transformers knows ({first_line(error)})"
        ) from error
    return config


def _stored_type(path: str, plan: weights.Kept) -> torch.dtype | None:
    """The type that a local folder's weights are read in; None where its files do not say."""
    if adapters.is_adapter_folder(path):
        return torch.float32  # it is merged so
    kind = weights.loading_type(path, plan)
    return kind if isinstance(kind, torch.dtype) else None


def load_bare(
    role: Role, config: TrainingConfig, layers: int, device: torch.device
) -> WatchedModel:
    """As models/load.py loads it, with this many layers; `device` is where it says it is."""
    module = _bare(role, _shallow(role.config, layers)).eval()
    weights.settle(module, META, role.kept)
    for part in module.modules():
        if hasattr(part, "compute_dtype"):
            _take_4_bits(part, role.kept.products)
    if role.recomputes(config):
        enable_checkpointing(module)
    model = WatchedModel(
        module,
        None,  # type: ignore[arg-type]  # nothing is read or written
        device,
        role.packed,
        role.name,
        "bfloat16" if role.kept.products == torch.bfloat16 else "float32",
        varlen=role.varlen,
    )
    if role.packed and lean.looks_lean(model.base):
        ours = not role.kept.nf4  # the self-test lets these go in 4 bits
        model.lean = lean.Lean(ours, ours, recompute=role.recomputes(config))
    if role.trained and config.lora_rank:
        rank, alpha = config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank
        targets, saved = config.lora_targets, config.modules_to_save
        if role.scorer and isinstance(config, PPOConfig):  # a critic has no head that is named
            targets, saved = (ALL_LINEAR,), ()
        model.module = adapters.add_lora(module, rank, alpha, targets, 0.0, saved)
    model.module.train(role.recomputes(config))
    if not role.trained:
        model.module.requires_grad_(False)
    return model


def put_on(role: Role, host: WatchedModel, lora: LoraConfig) -> WatchedModel:
    """As models/shared.py puts a role on another's base; `lora`: the adapters of a critic."""
    if host.adapters is None:
        host.adapters = (shared.POLICY,) if isinstance(host.module, PeftModel) else ()
    width = host.hf.config.get_text_config().hidden_size
    head, name = nn.Linear(width, 1, bias=False, device=META), role.name.replace(" ", "_")
    if role.adapter is not None:
        shared.add_adapter(host, name, copy.copy(role.adapter))
        return replace(host, adapters=(name,), own_head=head.requires_grad_(False))
    start = replace(host, adapters=shared.reference_of(host).adapters, own_head=head)
    critic = shared.critic_role(start, name, lora)
    host.module = critic.module
    assert isinstance(critic, WatchedModel)
    return critic


def own_weights(role: Role, model: WatchedModel) -> Iterator[Tensor]:
    """The weights that a role holds beside those of a base that it shares."""
    if role.on is None:
        yield from weights_of(model.module)
        return
    assert model.adapters and model.own_head is not None
    yield from shared.adapter_weights(model, model.adapters[-1]).values()
    yield from model.own_head.parameters()


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and the scales of weights in 4 bits."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset)
            yield from (state.state2.absmax, state.state2.code)


def _layout(role: Role) -> tuple[bool, int]:
    """Whether all decoder layers have parameters of the same shapes, and all weights' number."""
    layers = role.config.get_text_config().num_hidden_layers
    with META:
        module = _bare(role, role.config)
    shapes: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in module.named_parameters():
        if place := LAYER.search(f".{name}"):
            shapes.setdefault(place[1], []).append((LAYER.sub(".", f".{name}"), parameter.shape))
    regular = len(shapes) == layers and all(each == shapes["0"] for each in shapes.values())
    return regular, sum(parameter.numel() for parameter in module.parameters())


def _bare(role: Role, config: PretrainedConfig) -> Any:
    kind: Any = AutoModelForSequenceClassification if role.scorer else AutoModelForCausalLM
    own = {"attn_implementation": NAME} if role.packed else {}
    if role.scorer:
        config.num_labels = 1
    return kind.from_config(config, dtype=role.stored, **own)


def _shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with this many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _take_4_bits(layer: Any, products: torch.dtype) -> None:
    """Gives a layer that could not be quantised, for want of numbers, what quantising gives it."""
    bnb = four_bits.bitsandbytes(four_bits.ASKED)
    count = layer.in_features * layer.out_features
    blocks = -(-count // BLOCK)
    state = bnb.functional.QuantState
    scales = state(
        absmax=torch.empty(-(-blocks // SCALES), device=META),
        code=torch.empty(256, device=META),
        blocksize=SCALES,
        dtype=torch.float32,
    )
    layer.quant_state = state(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=META),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16, device=META),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=products,
        offset=torch.empty((), device=META),
        state2=scales,
    )
    layer.weight = bnb.nn.Params4bit(
        torch.empty(-(-count // QUANTISED), 1, dtype=torch.uint8, device=META),
        requires_grad=False,
        quant_state=layer.quant_state,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
