"""Rectangles of segments: however they are grouped, each query sees its path within its window."""

import pytest
import torch

from prefloop.data.batches import Segment, pack, rows_of_path
from prefloop.models import heads
from prefloop.models.attention import PackedPlan
from tests.models.plain import (
    CPU,
    assert_close,
    assert_same_gradients,
    gradients,
    plain_log_probs,
    random_examples,
    with_plain_twin,
)
from tests.tiny import tiny_model

LONG = ((260, (250,)), (7, (12, 3)), (300, (1, 200, 40)), (1, (5,)), (64, (64, 64)))
"""Segments above and below the size at which joining two always pays."""


def by_hand(segments, q, k, v, scaling, window):
    """Softmax attention row by row: q [H, T, D], k and v [G, T, D] -> [T, H, D]."""
    repeats = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[2], dtype=q.dtype)
    for index, segment in enumerate(segments):
        path = rows_of_path(segments, index)
        for row in segment.rows:
            seen = path[: path.index(row) + 1]
            seen = seen if window is None else seen[-window:]
            weights = (torch.einsum("hd,hkd->hk", q[:, row], k[:, seen]) * scaling).softmax(-1)
            out[row] = torch.einsum("hk,hkd->hd", weights, v[:, seen])
    return out


def tensors(rows, heads=4, groups=2, width=8, value_width=8):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = ((heads, width), (groups, width), (groups, value_width))
    return [normal(n, rows, size) for n, size in sizes]


SHAPES = {
    "one": ((5, ()),),
    "equal roots": ((4, ()), (4, ()), (4, ())),
    "roots of two lengths": ((4, ()), (9, ()), (4, ())),
    "equal trees": ((3, (2, 2)), (3, (2, 2))),
    "mixed": ((9, (4,)), (1, (1, 6)), (14, (3, 1, 8)), (2, (9, 1, 20))),
    "several rectangles": ((260, (250,)), (7, (12, 3)), (1, (5,))),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_attention_by_hand(shapes, window):
    batch = pack(random_examples(shapes))
    q, k, v = tensors(batch.tokens)
    ours = PackedPlan(batch.segments, CPU).attend(0, q, k, v, 0.3, window)
    assert_close(ours, by_hand(batch.segments, q, k, v, 0.3, window), 1e-12)


def test_a_tree_of_three_levels():
    """Prompt, its continuation, and two continuations of that."""
    segments = (Segment(0, 3, -1, 0), Segment(3, 4, 0, 3), Segment(7, 2, 1, 7), Segment(9, 5, 1, 7))
    q, k, v = tensors(14)
    for window in (None, 4):
        ours = PackedPlan(segments, CPU).attend(0, q, k, v, 1.0, window)
        assert_close(ours, by_hand(segments, q, k, v, 1.0, window), 1e-12)


def test_values_narrower_than_keys():
    """Multi-head latent attention; the fast path and the masked one."""
    batch = pack(random_examples(((4, (2, 3)), (4, (5,)))))
    q, k, v = tensors(batch.tokens, width=12, value_width=5)
    ours = PackedPlan(batch.segments, CPU).attend(0, q, k, v, 0.3, None)
    assert_close(ours, by_hand(batch.segments, q, k, v, 0.3, None), 1e-12)


def test_fast_path_equals_masked_path():
    """A window of the whole length takes the fast path, one token less masks one pair."""
    batch = pack(random_examples(((8, ()), (8, ()))))
    q, k, v = tensors(batch.tokens)
    plan = PackedPlan(batch.segments, CPU)
    (rectangle,) = plan.rectangles
    assert rectangle.causal
    fast = plan.attend(0, q, k, v, 0.3, 8)
    assert rectangle.masks == {}
    rectangle.causal = False
    masked = plan.attend(0, q, k, v, 0.3, 8)
    assert rectangle.masks != {}
    assert_close(fast, masked, 1e-12)
    narrower = plan.attend(0, q, k, v, 0.3, 7)
    moved = [row for row in range(16) if not torch.allclose(narrower[row], fast[row])]
    assert moved == [7, 15]


def test_long_segments_make_several_rectangles():
    plan = PackedPlan(pack(random_examples(LONG)).segments, CPU)
    assert len(plan.rectangles) > 3
    short = PackedPlan(pack(random_examples()).segments, CPU)
    assert len(short.rectangles) == 2  # the prompts and the answers


@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
def test_models_with_several_rectangles(arch):
    model, plain = with_plain_twin(tiny_model(arch))
    examples = random_examples(LONG)
    ours = heads.answer_log_probs(model, pack(examples)).log_probs
    theirs = plain_log_probs(plain, examples)
    assert_close(ours, theirs, 1e-5)
    assert_same_gradients(gradients(model.hf, ours), gradients(plain, theirs), 1e-5)


def test_the_cache_keeps_every_layers_keys():
    batch = pack(random_examples(((4, (2,)),)))
    q, k, v = tensors(batch.tokens)
    plan = PackedPlan(batch.segments, CPU, keep_cache=True)
    plan.attend(5, q, k, v, 1.0, None)
    assert list(plan.cache) == [5]
    assert torch.equal(plan.cache[5][0], k)
    assert torch.equal(plan.cache[5][1], v)
