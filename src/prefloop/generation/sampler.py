"""Drawing tokens from logits with each request's own uniforms."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from prefloop.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the k likeliest tokens, and of those from the top-p nucleus."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # smallest set of tokens with at least this probability
    top_k: int = 0  # 0: all tokens
    stop_token_ids: Set[int] = frozenset()  # an answer ends with the first of these it draws

    def __post_init__(self) -> None:
        right = self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0
        if not right or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self}: give max_new_tokens of at least 1, temperature and top_k of at least 0, "
                "top_p above 0 and at most 1"
            )


def request_uniforms(seed: int, prompt_index: int, sample_index: int, count: int) -> Tensor:
    """`count` uniforms in [0, 1) that depend on nothing but the three numbers."""
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{sample_index}".encode(), digest_size=8)
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
    return torch.rand(count, generator=generator)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from float32 logits [B, V] with uniforms [B], and their log-probs [B].

    The token is the first whose cumulative probability exceeds u (inverse CDF). Its log-prob is
    log softmax(logits / temperature) over the whole vocabulary, whatever top-p and top-k leave;
    greedy choices are given theirs at temperature 1.
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    normaliser = logits.logsumexp(-1, keepdim=True)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        probs = (logits - normaliser).exp_()
        if sampling.top_k or sampling.top_p < 1:
            kept, ids = keep_likeliest(probs, sampling.top_p, sampling.top_k)
            tokens = ids.gather(-1, _inverse_cdf(kept, uniforms))
        else:
            tokens = _inverse_cdf(probs, uniforms)
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - normaliser).squeeze(-1)


def keep_likeliest(probs: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K] of the likeliest tokens in falling order, the dropped ones 0; their ids.

    A token stays if the likelier ones together fall short of `top_p` of what top-k left.
    """
    count = min(top_k or probs.shape[-1], probs.shape[-1])
    kept, ids = probs.topk(count, sorted=True)
    if top_p < 1:
        reached = kept.cumsum(-1)
        kept[:, 1:].masked_fill_(reached[:, :-1] >= top_p * reached[:, -1:], 0.0)
    return kept, ids


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """[B, 1]: where u times the last cumulative sum falls; probabilities need not sum to 1."""
    cumulative = probs.cumsum(-1)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)
    return found.clamp_(max=probs.shape[-1] - 1)  # not-a-number finds nothing
