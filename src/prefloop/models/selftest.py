"""What a model must show at load: the numbers that its plain one-by-one forwards give.

Training's own code runs on a tiny batch of shared prompts. Attention windows are meanwhile narrower
than its sequences, for a window in the wrong place is right as long as nothing reaches past it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from prefloop.data.batches import TokenBatch, pack
from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.models import heads, lean
from prefloop.models.attention import plan as attention
from prefloop.models.attention import varlen as varlen_attention
from prefloop.models.precision import Products

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from prefloop.models.model import LoadedModel

log = logging.getLogger("prefloop")
HEAD_TOLERANCE = 1e-6  # no other order of sums: a soft cap far above small logits shows too
TOLERANCE = 1e-4  # of the usual size of a channel; float32 rounding stays far below
SCORE_TOLERANCE = 1e-5  # of the largest score of a sequence
VARLEN_TOLERANCE = 2.0  # times the error that bfloat16 has with other attention
WINDOW = 3
WINDOWS = "sliding_window sliding_window_size attention_chunk_size index_topk keep_window_size"
PACKABLE = {"full_attention", "sliding_attention"}  # kinds of layers, as configurations call them
PADDABLE = PACKABLE | {"chunked_attention", "linear_attention", "conv", "moe", "hybrid"}
PADDABLE |= {"hybrid_sliding", "mamba", "attention"}


@torch.no_grad()
def choose_path(model: LoadedModel) -> None:
    """Sets `model.packed` and the model's attention to what is exact; UserError where nothing is.

    Called in evaluation mode, before adapters are added.
    """
    hf = model.hf
    batch = pack(_examples(hf)).to(model.device)
    _check_head(model, batch.input_ids[batch.paths()[0]])
    with _narrow_windows(hf):
        alone = torch.cat([_alone(model, batch.input_ids[rows]) for rows in batch.paths()])
        model.packed = _is_packable(model, batch, alone)
        if not model.packed:
            log.warning(
                "%s takes padded batches: packed attention is not exact for it", model.source
            )
            _check_padded(model, batch, alone)
        else:
            _take_lean(model, batch)
            _take_varlen(model, batch)


def _take_lean(model: LoadedModel, batch: TokenBatch) -> None:
    """Keeps lean layers where the model gives the same bits with them."""
    if model.hf.dtype == torch.float64 or not lean.looks_lean(model.base):
        return
    plain = list(_both_precisions(model, batch))
    for form in (lean.Lean(), lean.Lean(norms=False), lean.Lean(mlp=False, norms=False)):
        model.lean = form
        try:
            if all(map(torch.equal, _both_precisions(model, batch), plain)):
                return
        except Exception as error:  # an architecture may differ in any way
            log.debug("lean layers: %r", error)
    model.lean = None


def _take_varlen(model: LoadedModel, batch: TokenBatch) -> None:
    """Keeps FlashAttention in bfloat16 where it comes as near to float32 as other attention."""
    if not varlen_attention.serves(model.device):
        return
    exact, plain = _both_precisions(model, batch)
    bound = VARLEN_TOLERANCE * (plain - exact).norm()
    model.varlen = True
    try:
        states = _states(model, batch, "bfloat16")
        model.varlen = bool((states - exact).norm() <= bound)
    except Exception as error:  # such as a width of heads that the kernel refuses
        log.debug("varlen attention: %r", error)
        model.varlen = False
    if not model.varlen:
        log.warning("%s: FlashAttention does not serve it; a slower form is used", model.source)


def _both_precisions(model: LoadedModel, batch: TokenBatch) -> Iterator[Tensor]:
    return (_states(model, batch, dtype) for dtype in get_args(Products))


def _states(model: LoadedModel, batch: TokenBatch, dtype: Products) -> Tensor:
    return heads.hidden_states(replace(model, dtype=dtype), batch)


def _check_padded(model: LoadedModel, batch: TokenBatch, alone: Tensor) -> None:
    """Right padding must change nothing, and later tokens no earlier state."""
    name = f"{model.source}: {type(model.hf).__name__}"
    if unknown := _kinds(model.hf) - PADDABLE:
        raise UserError(f"{name} has layers of a kind unknown here ({unknown}); give another model")
    paths = batch.paths()
    early = torch.cat([_alone(model, batch.input_ids[path[:-1]]) for path in paths])
    states = alone.split([len(path) for path in paths])
    if not _equal(early, torch.cat([s[:-1] for s in states])):
        raise UserError(f"{name} sees later tokens; give a causal language model")
    if not _equal(_by_path(model, batch), alone):
        raise UserError(f"{name} is not exact in padded batches; give another model")


def longest_exact(hf: PreTrainedModel) -> int | None:
    """Tokens up to which positions mean the same in every batch; None if there is no such bound.

    Beyond it learned positions end, and dynamic and long RoPE follow a batch's longest sequence.
    """
    config = hf.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    bounds = [] if ropes else [getattr(config, "max_position_embeddings", None)]
    for rope in ropes.values() if "rope_type" not in ropes else [ropes]:
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if kind == "longrope":
            bounds.append(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            bounds.append(config.max_position_embeddings)
    return min((bound for bound in bounds if bound and bound > 0), default=None)


def _is_packable(model: LoadedModel, batch: TokenBatch, alone: Tensor) -> bool:
    """Tries packed attention and leaves it on if it is exact."""
    hf = model.hf
    before = hf.config._attn_implementation
    if not (_kinds(hf) <= PACKABLE and hf._can_set_attn_implementation()):
        return False
    try:
        hf.set_attn_implementation(attention.NAME)
        model.packed = True
        if _equal(_by_path(model, batch), alone):
            return True
    except Exception as error:  # an architecture may refuse in any way
        log.debug("packed self-test: %r", error)
    model.packed = False
    hf.set_attn_implementation(before)
    return False


def may_pack(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration is one to try packed attention on."""
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None)
    return not capped and set(getattr(text, "layer_types", None) or []) <= PACKABLE


def _kinds(hf: PreTrainedModel) -> set[str]:
    return set(getattr(hf.config.get_text_config(), "layer_types", None) or [])


def _check_head(model: LoadedModel, ids: Tensor) -> None:
    """The head on hidden states against the model's own output."""
    hidden = _alone(model, ids)
    own = model.hf(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
    if not bool(own.isfinite().all()):
        raise UserError(f"{model.source}: its output is not finite; look for a broken weight")
    if model.is_scorer:
        scores = heads.scalar_head(model, hidden)  # one alone may be near 0 and all rounding
        same = bool((scores[-1] - own).abs().max() <= SCORE_TOLERANCE * scores.abs().max())
    else:
        same = _equal(heads.logits(model, hidden), own, HEAD_TOLERANCE)
    if not same:
        raise UserError(
            f"{model.source}: {type(model.hf).__name__} computes its output from the hidden states "
            "in a way unknown here; give another model"
        )


def _alone(model: LoadedModel, ids: Tensor) -> Tensor:
    """Hidden states [n, D] of one sequence [n], as plain Transformers computes them."""
    output = model.base(input_ids=ids.unsqueeze(0), use_cache=False)
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _by_path(model: LoadedModel, batch: TokenBatch) -> Tensor:
    """What training computes, in the order of the one-by-one forwards."""
    hidden = heads.hidden_states(model, batch)
    return torch.cat([hidden[rows] for rows in batch.paths()])


def _equal(ours: Tensor, plain: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Root mean square difference of [n, D], each channel in units of its own size."""
    size = plain.square().mean(0).sqrt()
    size = size.clamp_min(1e-6 * size.max())
    return bool(((ours - plain) / size).square().mean().sqrt() <= tolerance)


def _examples(hf: PreTrainedModel) -> list[Example]:
    """Two prompts with two answers each, some sharing tokens at other positions."""
    embeddings: Any = hf.get_input_embeddings()
    limit = min(len(embeddings.weight), 997)
    pad = getattr(hf.config.get_text_config(), "pad_token_id", None)

    def tokens(seed: int, length: int) -> tuple[int, ...]:
        ids = [(seed + 7 * i * i + 3 * i) % limit for i in range(length)]
        return tuple((i + 1) % limit if i == pad else i for i in ids)  # a scorer looks for pads

    examples = []
    for number, answers in enumerate([(3, 6), (7, 2)]):
        parts = tuple(tokens(11 * number + 31 * i + 1, n) for i, n in enumerate(answers))
        masks = tuple((True,) * n for n in answers)
        examples.append(Example(tokens(5 + number, 5), parts, masks, where="the self-test"))
    return examples


@contextmanager
def _narrow_windows(hf: PreTrainedModel) -> Iterator[None]:
    """Within it, attention windows are WINDOW tokens wide, in the settings and in the layers."""
    holders = {id(x): x for part in hf.modules() for x in (part, getattr(part, "config", None))}
    wide = [
        (holder, name, width)
        for holder in holders.values()
        for name in WINDOWS.split()
        if type(width := getattr(holder, name, None)) is int and width > WINDOW
    ]
    try:
        for holder, name, _ in wide:
            setattr(holder, name, WINDOW)
        yield
    finally:
        for holder, name, width in wide:
            setattr(holder, name, width)
