"""From token batches to log-probs of answer tokens, scores of answers and values of states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from prefloop.data.batches import TokenBatch, pack, to_batches
from prefloop.data.tokenize import Example
from prefloop.losses.masked import segment_sum
from prefloop.models.attention.plan import plan_of
from prefloop.models.lean import Linear, Stack, forward_of
from prefloop.models.memory import RECOMPUTED
from prefloop.models.pieces import split_answers
from prefloop.models.precision import autocast
from prefloop.models.sharding import in_step
from prefloop.models.trunk import Trunk

if TYPE_CHECKING:
    from prefloop.models.model import LoadedModel

T = TypeVar("T")
LOGIT_BYTES = 1 << 30  # logits kept for the backward pass; beyond, chunks recompute theirs
CHUNK_BYTES = 1 << 26  # float32 logits held at once otherwise: near a cache's size
GPU_CHUNK_BYTES = 1 << 29  # where each of a chunk's kernels should have much to do


def hidden_states(model: LoadedModel, batch: TokenBatch, trunk: Trunk | None = None) -> Tensor:
    """Last hidden states [T, D] of the stream's rows, the same packed or padded.

    Models that share the batch's `trunk` compute it once.
    """
    model.check_length(max(s.position + s.length for s in batch.segments))
    with model.computing():
        return _packed_states(model, batch, trunk) if model.packed else _padded_states(model, batch)


def _packed_states(model: LoadedModel, batch: TokenBatch, trunk: Trunk | None) -> Tensor:
    forward = forward_of(model.base, model.lean, again=model.computing)
    read = batch.input_ids, batch.position_ids, plan_of(batch, model.varlen)
    if trunk is not None and trunk.base is model.base and isinstance(forward, Stack):
        return forward(*read, trunk)
    return forward(*read)


def _padded_states(model: LoadedModel, batch: TokenBatch) -> Tensor:
    paths = batch.paths()
    width = max(map(len, paths))
    rows = torch.tensor([p + p[-1:] * (width - len(p)) for p in paths], device=model.device)
    lengths = torch.tensor([len(p) for p in paths], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    output = model.base(
        input_ids=batch.input_ids[rows],
        attention_mask=mask.long(),
        use_cache=False,
    )
    where = [0] * batch.tokens  # any answer's copy of a shared prompt is the same: the last wins
    for line, path in enumerate(paths):
        for column, row in enumerate(path):
            where[row] = line * width + column
    flat: Tensor = output.last_hidden_state.flatten(0, 1)
    return flat[torch.tensor(where, device=model.device)]


def answer_log_probs(
    model: LoadedModel, batch: TokenBatch, temperature: float = 1.0, trunk: Trunk | None = None
) -> Tensor:
    """log pi(y_t | x, y_<t) at the sampling temperature for each of the batch's N loss tokens.

    In nats, float32 [N]. The head runs on the rows that predict a loss token only, in chunks.
    """

    def compute() -> Tensor:
        hidden = hidden_states(model, batch, trunk)[batch.source_index]
        return head_log_probs(model, hidden, batch.target_ids, temperature)

    return _pass(model, compute)


def _pass(model: LoadedModel, compute: Callable[[], T]) -> T:
    """A forward pass; with all ranks where the model is divided among them."""
    return compute() if model.sharded is None else model.sharded.run(compute)


def smallest_pass(model: LoadedModel) -> Tensor:
    """One number of a sequence of two tokens, by all weights that training would read."""
    batch = pack([Example((0,), ((0,),), ((True,),))]).to(model.device)
    return answer_scores(model, batch) if model.is_scorer else answer_log_probs(model, batch)


@torch.no_grad()
def sequence_log_probs(
    model: LoadedModel,
    examples: Sequence[Example],
    micro_batch_tokens: int,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(y|x) of all A answers in their order: nats, float32 [A]."""
    sums, most, padded = [torch.zeros(0, device=model.device)], micro_batch_tokens, not model.packed
    pieces = split_answers(examples, most, padded)
    with in_step([model]):
        for batch in to_batches(pieces, most, model.device, padded):
            tokens = answer_log_probs(model, batch, temperature)
            sums.append(segment_sum(tokens, batch.target_answer, batch.answers))
    return torch.cat(sums)


def head_log_probs(
    model: LoadedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    logit_bytes: int = LOGIT_BYTES,
    chunk_bytes: int = 0,
) -> Tensor:
    """Log-probs [N] of `targets` [N] under the model's own head on hidden states [N, D]."""
    row_bytes = 4 * model.hf.get_output_embeddings().weight.shape[0]
    recompute = torch.is_grad_enabled() and len(targets) * row_bytes > logit_bytes
    keep_all = torch.is_grad_enabled() and not recompute
    chunk_bytes = chunk_bytes or (CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES)
    rows = max(1, chunk_bytes // row_bytes)
    size = max(1, len(targets)) if keep_all else rows

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        with model.computing():  # its head may have adapters, too
            args = (_head(model, h), t, 1.0 / temperature, rows)
        form = _SelectedLogProb if h.device.type == "cpu" else _FusedLogProb
        return form.apply(*args)  # type: ignore[no-untyped-call,no-any-return]

    return torch.cat(
        [
            checkpoint(chunk, h, t, **RECOMPUTED) if recompute else chunk(h, t)
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
    )


def logits(model: LoadedModel, hidden: Tensor, head: Linear | None = None) -> Tensor:
    """The model's own logits [N, V] of hidden states [N, D], in float32.

    `head` multiplies in place of the model's own.
    """
    return at_least_float32(_head(model, hidden, head))


def _head(model: LoadedModel, hidden: Tensor, head: Linear | None = None) -> Tensor:
    """Logits as the head gives them, in bfloat16 too; if scaled or capped, then in float32."""
    config = model.hf.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)  # Granite
    scale = getattr(config, "logit_scale", None)  # Cohere
    multiplier = getattr(config, "lm_head_multiplier", None)  # Falcon-H1
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    cap = cap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
    with autocast(model.device, model.dtype):
        output: Tensor = (head or model.hf.get_output_embeddings())(hidden)
    if scaling or scale or multiplier or cap:
        output = at_least_float32(output) / (scaling or 1.0) * (scale or 1.0) * (multiplier or 1.0)
    return torch.tanh(output / cap) * cap if cap else output


def at_least_float32(x: Tensor) -> Tensor:
    """float32 and float64 as they are, anything shorter as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _SelectedLogProb(torch.autograd.Function):
    """log softmax(scores / temperature)[target] in float32, some rows of the scores at a time.

    It keeps the scores as they came, and gives their gradient in their own type.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, factor: float, rows: int) -> Tensor:
        parts = []
        for part, target in zip(scores.split(rows), targets.split(rows), strict=True):
            scaled = at_least_float32(part) * factor
            largest = scaled.amax(-1, keepdim=True)  # apart: a sum with it would lose digits
            scaled.sub_(largest)
            picked = scaled.gather(-1, target.unsqueeze(-1))
            parts.append(
                torch.cat([largest, scaled.exp_().sum(-1, keepdim=True).log_(), picked], -1)
            )
        largest, log_sum, picked = torch.cat(parts).split(1, -1)
        ctx.save_for_backward(scores, targets, largest, log_sum)
        ctx.how = factor, rows
        log_probs: Tensor = (picked - log_sum).squeeze(-1)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        scores, targets, largest, log_sum = ctx.saved_tensors  # type: ignore[attr-defined]
        factor, rows = ctx.how  # type: ignore[attr-defined]
        gradient = torch.empty_like(scores)
        grad = (grads[0] * factor).unsqueeze(-1)
        whole = (scores, targets.unsqueeze(-1), largest, log_sum, grad, gradient)
        for part, target, top, total, weight, out in zip(
            *(x.split(rows) for x in whole), strict=True
        ):
            by_score = (at_least_float32(part) * factor).sub_(top).sub_(total).exp_()
            out.copy_(by_score.mul_(-weight).scatter_add_(-1, target, weight))
        return gradient, None, None, None


class _FusedLogProb(torch.autograd.Function):
    """The same for a GPU, which has softmax from any type to float32 as one kernel."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, factor: float, rows: int) -> Tensor:
        ctx.save_for_backward(scores, targets)
        ctx.how = factor, rows
        picked = [
            torch.log_softmax(*_scaled(part, factor)).gather(-1, target.unsqueeze(-1))
            for part, target in zip(scores.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(picked).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        scores, targets = ctx.saved_tensors  # type: ignore[attr-defined]
        factor, rows = ctx.how  # type: ignore[attr-defined]
        gradient = torch.empty_like(scores)
        whole = (scores, targets.unsqueeze(-1), (grads[0] * factor).unsqueeze(-1), gradient)
        for part, target, weight, out in zip(*(x.split(rows) for x in whole), strict=True):
            probs = torch.softmax(*_scaled(part, factor))
            out.copy_(probs.mul_(-weight).scatter_add_(-1, target, weight))
        return gradient, None, None, None


def _scaled(scores: Tensor, factor: float) -> tuple[Tensor, int, torch.dtype]:
    """A softmax's arguments; scaled in float32, where they are."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return (scores if factor == 1.0 else scores.to(dtype) * factor), -1, dtype


def answer_scores(model: LoadedModel, batch: TokenBatch) -> Tensor:
    """Scores [A] of the answers: the scalar head on each answer's last token, in float32.

    The model's encoder says what that is (see LoadedModel.score_position).
    A trained reward model's scores are around the mean score of its training answers.
    """
    return _scores_at(model, batch, batch.last_index)


def token_values(model: LoadedModel, batch: TokenBatch, trunk: Trunk | None = None) -> Tensor:
    """Values [N] of the states before each answer token, in float32, around the same mean."""
    return _scores_at(model, batch, batch.source_index, trunk)


def _scores_at(
    model: LoadedModel, batch: TokenBatch, rows: Tensor, trunk: Trunk | None = None
) -> Tensor:
    """Scores at some rows of the stream."""

    def compute() -> Tensor:
        return scalar_head(model, hidden_states(model, batch, trunk)[rows]) - score_mean(model)

    return _pass(model, compute)


def values_with_last(
    model: LoadedModel, batch: TokenBatch, trunk: Trunk | None = None
) -> tuple[Tensor, Tensor]:
    """Values [N] as `token_values`, and [B] of the states after each answer's last token."""
    rows = torch.cat([batch.source_index, batch.last_index])
    values = _scores_at(model, batch, rows, trunk)
    return values[: len(batch.source_index)], values[len(batch.source_index) :]


def score_mean(model: LoadedModel) -> float:
    """What is subtracted from the head's output: Transformers' heads have no bias to shift."""
    return float(getattr(model.config, "reward_mean", 0.0))


def scalar_head(model: LoadedModel, hidden: Tensor) -> Tensor:
    """The float32 outputs [N] of a scorer's head on hidden states [N, D]."""
    head = model.score_head
    assert head is not None
    with torch.autocast(model.device.type, enabled=False):
        scores: Tensor = head(at_least_float32(hidden))
    return scores.squeeze(-1)
