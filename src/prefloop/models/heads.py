"""From token batches to log-probs of answer tokens, scores of answers and values of states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from prefloop.data.batches import TokenBatch
from prefloop.models.attention import PackedPlan

if TYPE_CHECKING:
    from prefloop.models.load import LoadedModel

LOGIT_BYTES = 1 << 30  # logits kept for the backward pass; beyond, chunks recompute theirs
CHUNK_BYTES = 1 << 28  # logits held at once otherwise


class TokenLogProbs(NamedTuple):
    """Of each of the N loss tokens, in float32."""

    log_probs: Tensor  # [N] nats
    entropy: Tensor | None  # [N] nats, without gradient


def hidden_states(model: LoadedModel, batch: TokenBatch) -> Tensor:
    """Last hidden states [T, D] of the stream's rows, the same packed or padded."""
    model.check_length(max(s.position + s.length for s in batch.segments))
    if model.packed:
        plan = PackedPlan(batch.segments, model.device)
        output = model.base(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_plan=plan,
            use_cache=False,
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]
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
    model: LoadedModel, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False
) -> TokenLogProbs:
    """log pi(y_t | x, y_<t) at the sampling temperature for each of the batch's N loss tokens.

    The head runs on the rows that predict a loss token only, in chunks; logits are float32.
    """
    hidden = hidden_states(model, batch)[batch.source_index]
    return head_log_probs(model, hidden, batch.target_ids, temperature, entropy)


def head_log_probs(
    model: LoadedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    logit_bytes: int = LOGIT_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenLogProbs:
    """Log-probs of `targets` [N] under the model's own head on hidden states [N, D]."""
    row_bytes = 4 * model.hf.get_output_embeddings().weight.shape[0]
    recompute = torch.is_grad_enabled() and len(targets) * row_bytes > logit_bytes
    keep_all = torch.is_grad_enabled() and not recompute
    size = max(1, len(targets) if keep_all else chunk_bytes // row_bytes)
    log_probs: list[Tensor] = []
    entropies: list[Tensor] = []
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        if recompute:
            pair = checkpoint(_chunk, model, h, t, temperature, entropy, use_reentrant=False)
        else:
            pair = _chunk(model, h, t, temperature, entropy)
        log_probs.append(pair[0])
        entropies.append(pair[1])
    return TokenLogProbs(torch.cat(log_probs), torch.cat(entropies) if entropy else None)


def _chunk(
    model: LoadedModel, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    scaled = logits(model, hidden) / temperature if temperature != 1.0 else logits(model, hidden)
    log_probs: Tensor = _SelectedLogProb.apply(scaled, targets)  # type: ignore[no-untyped-call]
    if not entropy:
        return log_probs, targets
    with torch.no_grad():
        log_p = scaled.log_softmax(-1)
        return log_probs, -(log_p.exp() * log_p).sum(-1)


def logits(model: LoadedModel, hidden: Tensor) -> Tensor:
    """The model's own float32 logits [N, V] of hidden states [N, D], its scalings included."""
    hf = model.hf
    output = at_least_float32(hf.get_output_embeddings()(hidden))
    config = hf.config.get_text_config()
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        output = output / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        output = output * scale
    if multiplier := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        output = output * multiplier
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if cap := cap or getattr(config, "logits_soft_cap", None):  # RecurrentGemma
        output = torch.tanh(output / cap) * cap
    return output


def at_least_float32(x: Tensor) -> Tensor:
    """float32 and float64 as they are, anything shorter as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _SelectedLogProb(torch.autograd.Function):
    """log_softmax(scores)[target] that keeps one matrix and makes one more going back."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        ctx.save_for_backward(log_p, targets)
        return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        log_p, targets = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = log_p.exp().mul_(-grads[0].unsqueeze(-1))
        grad.scatter_add_(-1, targets.unsqueeze(-1), grads[0].unsqueeze(-1))
        return grad, None


def answer_scores(model: LoadedModel, batch: TokenBatch) -> Tensor:
    """Scores [A] of the answers: the scalar head on each answer's last token, in float32.

    A trained reward model's scores are around the mean score of its training answers.
    """
    return scalar_head(model, hidden_states(model, batch)[batch.last_index]) - score_mean(model)


def token_values(model: LoadedModel, batch: TokenBatch) -> Tensor:
    """Values [N] of the states before each answer token, in float32, around the same mean."""
    return scalar_head(model, hidden_states(model, batch)[batch.source_index]) - score_mean(model)


def score_mean(model: LoadedModel) -> float:
    """What is subtracted from the head's output: Transformers' heads have no bias to shift."""
    return float(getattr(model.hf.config, "reward_mean", 0.0))


def scalar_head(model: LoadedModel, hidden: Tensor) -> Tensor:
    """The float32 outputs [N] of a scorer's head on hidden states [N, D]."""
    head: nn.Module = model.hf.score  # type: ignore[assignment]
    with torch.autocast(model.device.type, enabled=False):
        scores: Tensor = head(at_least_float32(hidden))
    return scores.squeeze(-1)
