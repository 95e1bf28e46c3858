"""Drawing tokens from logits with each request's own uniforms."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefloop.errors import UserError

BLOCK = 256  # tokens; about the root of a vocabulary's size


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
    probs = logits.softmax(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1:
        kept, ids = keep_likeliest(probs, sampling.top_p, sampling.top_k)
        tokens = ids.gather(-1, _inverse_cdf(kept, uniforms))
    else:
        tokens = _inverse_cdf(probs, uniforms)
    return tokens.squeeze(-1), probs.gather(-1, tokens).log().squeeze(-1)


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
    """[B, 1]: the token in whose share of the cumulative sum u falls; the sum need not be 1.

    Sought among blocks of tokens and then in one block: running sums of all tokens are slow.
    """
    count = probs.shape[-1]
    if missing := -count % BLOCK:
        probs = pad(probs, (0, missing))
    blocks = probs.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1)
    ends = sums.cumsum(-1)
    target = uniforms.unsqueeze(-1) * ends[:, -1:]
    block = _first_beyond(ends, target)
    within = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
    target = (target - (ends - sums).gather(-1, block)).clamp_(min=0)
    indices = block * BLOCK + _first_beyond(within.cumsum(-1), target)
    return indices.clamp_(max=count - 1)  # not-a-number is past the end


def _first_beyond(cumulative: Tensor, target: Tensor) -> Tensor:
    """[B, 1]: where sums [B, N] first exceed targets [B, 1], which may have been rounded up."""
    most = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    indices = torch.searchsorted(cumulative, torch.minimum(target, most), right=True)
    return indices.clamp_(max=cumulative.shape[-1] - 1)
