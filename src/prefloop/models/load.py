"""Loading: any Hugging Face causal LM as a policy, its sequence-classification form as a scorer.

How weights are kept is said in models/weights.py; bfloat16 is autocast around the forward pass.
Dropout is off. What does not give the same numbers packed as one by one takes padded batches.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prefloop.config.ranges import ALL_LINEAR
from prefloop.data.tokenize import same_ids
from prefloop.errors import UserError, first_line
from prefloop.models import adapters, selftest, shared, weights
from prefloop.models.export import source_dtype
from prefloop.models.memory import RECOMPUTED, keep_freed_memory
from prefloop.models.model import SCORE_POSITION, LoadedModel, LoraOptions
from prefloop.models.pads import set_distinct_pad
from prefloop.models.precision import speed_up_float32
from prefloop.models.unread import beyond, first_layers, one_of_each
from prefloop.models.weights import Kept, Storage, exact_products, kept, loading_type, settle
from prefloop.runs import model_path

log = logging.getLogger("prefloop")
FLOAT32 = Storage()
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device here; use --device cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not a device here; use auto, cpu or cuda:0") from None


def load_tokenizer(
    path: str, template_args: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; its chat template reads all `template_args`."""
    adapters.require_there(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no tokenizer found ({first_line(error)}); save the tokenizer into the "
            "model's folder with tokenizer.save_pretrained"
        ) from error
    for name in unread_arguments(tokenizer, template_args or {}):
        raise UserError(f"--template-args: {path}'s chat template reads no `{name}`; leave it out")
    return tokenizer


def unread_arguments(
    tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any]
) -> list[str]:
    """Those of the arguments that the chat template does not name."""
    template = str(tokenizer.chat_template or "")
    return [n for n in template_args if not re.search(rf"\b{re.escape(n)}\b", template)]


def embedding_rows(path: str) -> int | None:
    """Embeddings of a model by its config.json alone; None where that does not say."""
    path = model_path(path)
    if adapters.is_adapter_folder(path) or (
        Path(path).is_dir() and not (Path(path) / "config.json").exists()
    ):
        return None
    try:
        return getattr(AutoConfig.from_pretrained(path).get_text_config(), "vocab_size", None)
    except (OSError, ValueError, KeyError):  # a tokenizer alone can be checked, too
        return None


def load_policy(
    path: str,
    device: torch.device,
    storage: Storage = FLOAT32,
    *,
    trained: bool = False,
    gradient_checkpointing: bool = False,
    divided: bool = False,
    template_args: Mapping[str, Any] | None = None,
    **lora: Unpack[LoraOptions],
) -> LoadedModel:
    """A causal LM with its tokenizer; `lora_rank` > 0 adds fresh adapters and freezes the rest."""
    plan = kept(storage, device, trained and not lora.get("lora_rank"))
    path = model_path(path)
    if is_scorer_folder(path):
        raise UserError(f"{path}: a sequence classifier, not a language model; give a policy")
    tokenizer = load_tokenizer(path, template_args)
    start = _stacked(path, plan, **lora)
    module = _from_pretrained(AutoModelForCausalLM, start or path, plan)
    model = make_ready(module, tokenizer, device, path, plan, divided)
    prepare_training(model, start or path, gradient_checkpointing, **lora)
    if start:
        model = shared.begin_from(model, path)
    return replace(model, template_args=template_args, source_dtype=source_dtype(path))


def load_scorer(
    path: str,
    device: torch.device,
    storage: Storage = FLOAT32,
    *,
    seed: int = 0,
    trained: bool = False,
    gradient_checkpointing: bool = False,
    divided: bool = False,
    template_args: Mapping[str, Any] | None = None,
    **lora: Unpack[LoraOptions],
) -> LoadedModel:
    """A reward or value model: the trained head of a scorer's folder, or a new one on a causal LM.

    A new head is drawn with standard deviation 1/sqrt(width + 1) (lm-human-preferences).
    """
    plan = kept(storage, device, trained and not lora.get("lora_rank"))
    path = model_path(path)
    ready = is_scorer_folder(path)
    tokenizer = load_tokenizer(path, template_args)
    start = _stacked(path, plan, **lora)
    module = _from_pretrained(
        AutoModelForSequenceClassification,
        start or path,
        plan,
        new_head=not ready or start is not None,
        num_labels=1,
    )
    if start:
        shared.take_head(module, path)
    if not hasattr(module, "score"):
        raise UserError(f"{path}: {type(module).__name__} has no scalar `score` head")
    if not ready:
        head: Any = module.score
        shared.draw_head(head.weight, seed)
        setattr(module.config, SCORE_POSITION, "rendered")
    if not ready or module.config.get_text_config().pad_token_id is None:
        set_distinct_pad(module, tokenizer)  # else it is read with the padding of its maker
    model = make_ready(module, tokenizer, device, path, plan, divided)
    prepare_training(model, start or path, gradient_checkpointing, **lora)
    if start:
        model = shared.begin_from(model, path)
    return replace(model, template_args=template_args, source_dtype=source_dtype(path))


def _stacked(path: str, plan: Kept, **lora: Unpack[LoraOptions]) -> str | None:
    """The base of an adapter folder whose adapter stays apart from it: where more are trained on
    top of it, or the base is in 4 bits. None where it is merged, and for whole weights.
    """
    if not (adapters.is_adapter_folder(path) and (lora.get("lora_rank", 0) or plan.nf4)):
        return None
    if shared.stackable(path) and not lora.get("modules_to_save", ()):
        return adapters.root_base(path)
    if plan.nf4:
        raise UserError(
            f"{path}: its adapter must be merged, for its kind or for --modules-to-save, which "
            "--weights nf4 cannot; merge it first, with prefloop export --merge"
        )
    return None


def load_reward_model(
    path: str,
    device: torch.device,
    storage: Storage = FLOAT32,
    template_args: Mapping[str, Any] | None = None,
    divided: bool = False,
) -> LoadedModel:
    """A trained reward model to score with; UserError for a language model."""
    if not is_scorer_folder(path):
        raise UserError(
            f"{path}: a language model, not a reward model; train one with prefloop reward"
        )
    return load_scorer(path, device, storage, divided=divided, template_args=template_args)


def require_same_ids(flag: str, model: LoadedModel, policy: LoadedModel) -> None:
    """UserError where `model` reads the policy's tokens as other words."""
    if not same_ids(policy.tokenizer, model.tokenizer):
        raise UserError(
            f"{flag} {model.source}: its tokenizer is not that of {policy.source}; give a model "
            "with the same one"
        )


def is_scorer_folder(path: str) -> bool:
    """Whether the folder or hub id holds a sequence classifier; UserError if it holds no model."""
    path = model_path(path)
    adapters.require_there(path)
    try:
        if adapters.is_adapter_folder(path):
            return adapters.is_scorer_adapter(path)
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f"{path}: not a model folder or hub id that Transformers knows ({first_line(error)})"
        ) from error
    return any("SequenceClassification" in name for name in config.architectures or [])


def _named(kind: Any) -> str:
    return str(kind.__name__.removeprefix("AutoModelFor"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and tables that Transformers prints of a loading that is as it should be."""
    before, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def _from_pretrained(
    kind: Any, path: str, plan: Kept, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """The model as it is stored, an adapter merged in float32; UserError if a weight is missing."""
    merged = adapters.is_adapter_folder(path)
    dtype = torch.float32 if merged else loading_type(path, plan)
    options |= {"dtype": dtype, "output_loading_info": True}
    try:
        with _quiet():
            if merged:
                new_head = True  # to the base; the adapter brings its own
                module, info = adapters.load_merged(kind, path, **options)
            else:
                module, info = kind.from_pretrained(path, **options)
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder makes its readers say
        if "Unrecognized configuration class" in str(error):
            raise UserError(
                f"{path}: Transformers has no {_named(kind)} of this architecture; give a model of "
                "one that it has, such as Llama, Qwen or Gemma"
            ) from error
        raise UserError(
            f"{path}: Transformers cannot load it as {_named(kind)} "
            f"({weights.broken_file(path) or first_line(error)})"
        ) from error
    missing = [k for k in info["missing_keys"] if not (new_head and k.startswith("score."))]
    if missing or info["mismatched_keys"]:
        raise UserError(
            f"{path}: weights missing, such as {[*missing, *info['mismatched_keys']][0]}"
        )
    assert isinstance(module, PreTrainedModel)
    return module


def make_ready(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    source: str,
    plan: Kept,
    divided: bool = False,
) -> LoadedModel:
    """The model on its device, as `plan` keeps it, with what its self-test chose.

    Of one that is to be `divided`, most is left unread.
    """
    if device.type == "cpu":
        speed_up_float32()
        keep_freed_memory()
    rates = disable_dropout(module)
    _mend_generation_config(module)
    first = one_of_each(module) if divided else None
    unread = settle(module, device, plan, beyond(module, first))
    module.eval()
    model = LoadedModel(
        module, tokenizer, device, False, source, max_length=selftest.longest_exact(module)
    )
    model.dropout, model.unread = rates, unread
    with exact_products(module), first_layers(module, first):
        selftest.choose_path(model)
    model.dtype = "bfloat16" if plan.products == torch.bfloat16 else "float32"
    return model


def prepare_training(
    model: LoadedModel, source: str, gradient_checkpointing: bool, **lora: Unpack[LoraOptions]
) -> None:
    """Recomputation and fresh adapters, where asked for."""
    module = model.hf
    if gradient_checkpointing:
        recompute_activations(model)
    if rank := lora.get("lora_rank", 0):
        module.name_or_path = str(Path(source).resolve()) if Path(source).is_dir() else source
        model.module = adapters.add_lora(
            module,
            rank,
            lora.get("lora_alpha") or 2.0 * rank,
            lora.get("lora_targets", (ALL_LINEAR,)),
            lora.get("lora_dropout", 0.0),
            lora.get("modules_to_save", ()),
        )
    model.module.train(gradient_checkpointing)


def recompute_activations(model: LoadedModel) -> None:
    """Recomputes each layer's activations in the backward pass."""
    enable_checkpointing(model.hf)
    model.lean = replace(model.lean, recompute=True) if model.lean else None
    model.module.train()  # Transformers recomputes in training mode only


def enable_checkpointing(module: Any) -> None:
    """The same of the layers that Transformers calls."""
    new_name = "activation_checkpointing_enable"  # since Transformers 5.20 or so
    enable = getattr(module, new_name, None) or module.gradient_checkpointing_enable
    enable(RECOMPUTED | {"context_fn": partial(adapters.now_and_again, module)})


def _mend_generation_config(module: PreTrainedModel) -> None:
    """What Transformers would refuse to save after the training is mended before it.

    Sampling settings without `do_sample`, as Llama 2's, are kept and sampling switched on.
    """
    config = getattr(module, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        log.warning(
            "generation_config.json is broken, its token ids are kept: %s", first_line(error)
        )
        kept = {name: getattr(config, name) for name in TOKEN_IDS}
        module.generation_config = GenerationConfig(**kept)


def disable_dropout(module: nn.Module) -> list[tuple[Any, str, float]]:
    """Turns every dropout off, so that training and sampling see the same model.

    Rates stand in modules, in attributes, and in the configuration, which Falcon's layers read
    while they run. Returns the configuration's (holder, name, rate), which an export puts back.
    """
    rates: list[tuple[Any, str, float]] = []
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for holder in (part, getattr(part, "config", None)):
            for name, value in list(vars(holder).items() if holder is not None else ()):
                if "drop" in name and type(value) in (float, int) and value:
                    setattr(holder, name, 0.0)
                    rates += [(holder, name, value)] if holder is not part else []
    return rates
