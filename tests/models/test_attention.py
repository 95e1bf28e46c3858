"""Packed attention: however segments are grouped, each query sees its path within its window."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prefloop.data.batches import Segment, pack, rows_of_path
from prefloop.models import heads
from prefloop.models.attention import blocks as block_attention
from prefloop.models.attention import plan as attention
from prefloop.models.attention import varlen as varlen_attention
from prefloop.models.attention.blocks import Blocks
from prefloop.models.attention.plan import PackedPlan
from prefloop.models.attention.rectangles import Rectangles
from prefloop.models.attention.varlen import Varlen
from tests.models.plain import (
    CPU,
    assert_close,
    assert_same_gradients,
    gradients,
    loaded,
    plain_log_probs,
    random_examples,
    tiny_scorer,
    varlen_by_hand,
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


@pytest.fixture(params=["blocks", "small blocks", "rectangles", "kernel", "varlen"])
def form(request, monkeypatch):
    """What computes the attention of segments: on the CPU, and on CUDA."""
    if request.param == "small blocks":
        monkeypatch.setattr(block_attention, "QUERIES", 3)
    if request.param in ("rectangles", "kernel"):
        return lambda segments: Rectangles(segments, CPU, request.param == "kernel")
    if request.param == "varlen":  # around what the kernel is documented to do
        monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_by_hand)
        return lambda segments: Varlen(segments, CPU)
    return Blocks


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_attention_by_hand(form, shapes, window):
    batch = pack(random_examples(shapes))
    qkv = tensors(batch.tokens)
    for x in qkv:
        x.requires_grad_()
    ours = form(batch.segments).attend(*qkv, 0.3, window)
    theirs = by_hand(batch.segments, *qkv, 0.3, window)
    assert_close(ours, theirs, 1e-12)
    given = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5), dtype=ours.dtype)
    gradients = [torch.autograd.grad(out, qkv, given) for out in (ours, theirs)]
    for mine, right in zip(*gradients, strict=True):
        assert_close(mine, right, 1e-12)


def test_a_tree_of_three_levels(form):
    """Prompt, its continuation, and two continuations of that."""
    segments = (Segment(0, 3, -1, 0), Segment(3, 4, 0, 3), Segment(7, 2, 1, 7), Segment(9, 5, 1, 7))
    q, k, v = tensors(14)
    for window in (None, 4):
        ours = form(segments).attend(q, k, v, 1.0, window)
        assert_close(ours, by_hand(segments, q, k, v, 1.0, window), 1e-12)


@pytest.mark.parametrize("form", ["blocks", "small blocks", "rectangles"], indirect=True)
def test_values_narrower_than_keys(form):
    """Multi-head latent attention; the fast path and the masked one."""
    batch = pack(random_examples(((4, (2, 3)), (4, (5,)))))
    q, k, v = tensors(batch.tokens, width=12, value_width=5)
    ours = form(batch.segments).attend(q, k, v, 0.3, None)
    assert_close(ours, by_hand(batch.segments, q, k, v, 0.3, None), 1e-12)


@pytest.mark.parametrize("kind", [Blocks, partial(Rectangles, device=CPU)])
def test_bfloat16_products_lose_less_than_torchs_own_attention(kind):
    """Against float64 on the same numbers: they stay within a rounding."""
    batch = pack(random_examples(((40, ()),)))
    exact = [(3 * x).bfloat16().double() for x in tensors(40, width=64, value_width=64)]
    given = tensors(40, heads=4, width=64)[0].transpose(0, 1)

    def results(attend, dtype):
        qkv = [x.to(dtype).requires_grad_() for x in exact]
        output = attend(*qkv)
        return [output.detach(), *torch.autograd.grad(output, qkv, given.to(dtype))]

    def blocks(q, k, v):
        return kind(batch.segments).attend(q, k, v, 0.125, None)

    def sdpa(q, k, v):
        how = {"is_causal": True, "enable_gqa": True, "scale": 0.125}
        return scaled_dot_product_attention(q[None], k[None], v[None], **how)[0].transpose(0, 1)

    right = results(blocks, torch.float64)
    ours, theirs = (results(attend, torch.bfloat16) for attend in (blocks, sdpa))
    for name, x, mine, other in zip(("output", *"qkv"), right, ours, theirs, strict=True):
        errors = [float((y.double() - x).norm() / x.norm()) for y in (mine, other)]
        assert errors[0] < min(2**-8, errors[1]), (name, errors)


def test_autocast_gives_bfloat16_attention():
    batch = pack(random_examples(((4, (2,)),)))
    q, k, v = (x.float() for x in tensors(batch.tokens))
    with torch.autocast("cpu", torch.bfloat16):
        ours = PackedPlan(batch.segments, CPU).attend(0, q, k, v, 1.0, None)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), by_hand(batch.segments, q, k, v, 1.0, None), 0.02)


def test_the_cpu_takes_blocks_unless_segments_are_tiny():
    for shapes, kind in ((LONG, Blocks), (((4, (2, 3)), (5, (1,))), Rectangles)):
        assert isinstance(PackedPlan(pack(random_examples(shapes)).segments, CPU).form, kind)
    segments = pack(random_examples(LONG)).segments
    elsewhere = PackedPlan(segments, torch.device("meta")).form
    assert isinstance(elsewhere, Rectangles)


def test_varlen_serves_bfloat16_alone():
    segments = pack(random_examples(LONG)).segments
    assert isinstance(PackedPlan(segments, CPU, varlen=True).form, Blocks)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(PackedPlan(segments, CPU, varlen=True).form, Varlen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_on_cuda(window):
    """The kernel itself in bfloat16, forward and backward, against float64 by hand."""
    batch, device = pack(random_examples(LONG)), torch.device("cuda")
    exact = [x.bfloat16().double() for x in tensors(batch.tokens, width=64, value_width=64)]
    given = tensors(batch.tokens, width=64)[0].transpose(0, 1)
    results = []
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float64)):
        qkv = [x.to(where, dtype).requires_grad_() for x in exact]
        if where == device:
            output = Varlen(batch.segments, device).attend(*qkv, 0.125, window)
        else:
            output = by_hand(batch.segments, *qkv, 0.125, window)
        found = [output, *torch.autograd.grad(output, qkv, given.to(where, dtype))]
        results.append([x.detach().cpu().double() for x in found])
    for mine, right in zip(*results, strict=True):
        assert float((mine - right).norm() / right.norm()) < 2**-6


def test_fast_path_equals_masked_path():
    """A window of the whole length takes the fast path, one token less masks one pair."""
    batch = pack(random_examples(((8, ()), (8, ()))))
    q, k, v = tensors(batch.tokens)
    rectangles = Rectangles(batch.segments, CPU, kernel=True)
    (rectangle,) = rectangles.groups
    assert rectangle.causal
    fast = rectangles.attend(q, k, v, 0.3, 8)
    assert rectangle.masks == {}
    rectangle.causal = False
    masked = rectangles.attend(q, k, v, 0.3, 8)
    assert rectangle.masks != {}
    assert_close(fast, masked, 1e-12)
    narrower = rectangles.attend(q, k, v, 0.3, 7)
    moved = [row for row in range(16) if not torch.allclose(narrower[row], fast[row])]
    assert moved == [7, 15]


def test_long_segments_make_several_rectangles():
    assert len(Rectangles(pack(random_examples(LONG)).segments, CPU).groups) > 3
    short = Rectangles(pack(random_examples()).segments, CPU)
    assert len(short.groups) == 2  # the prompts and the answers


@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
@pytest.mark.parametrize("cuda", [False, True])
def test_models_with_long_segments(arch, cuda, monkeypatch):
    """Several blocks, or several rectangles."""
    if cuda:
        monkeypatch.setattr(attention, "Blocks", lambda segments: Rectangles(segments, CPU))
    model, plain = with_plain_twin(tiny_model(arch))
    examples = random_examples(LONG)
    ours = heads.answer_log_probs(model, pack(examples))
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
    joined = torch.cat([q, k, v])  # as one product gives them
    plan.attend(6, *joined.split([len(q), len(k), len(v)]), 1.0, None)
    for cut, whole in zip(plan.cache[6], (k, v), strict=True):
        assert torch.equal(cut, whole)
        assert cut.untyped_storage().nbytes() == whole.nbytes


def test_the_plan_of_a_batch_is_made_once():
    """For all models and passes that read it; anew where the batch is moved."""
    policy, critic = loaded(tiny_model("llama")), loaded(tiny_scorer("qwen3"))
    batch = pack(random_examples())
    numbers = [heads.answer_log_probs(policy, batch)]
    (plan,) = batch.plans.values()
    numbers += [heads.token_values(critic, batch), heads.answer_log_probs(policy, batch)]
    assert list(batch.plans.values()) == [plan]
    assert attention.plan_of(batch, varlen=False) is plan
    moved = batch.to("cpu")
    assert moved.plans == {}
    assert torch.equal(heads.token_values(critic, moved), numbers[1])
    assert torch.equal(numbers[0], numbers[2])


def test_each_form_of_attention_has_a_plan():
    """FlashAttention under autocast where the model may take it, and other attention beside it."""
    batch = pack(random_examples())
    plain = attention.plan_of(batch, varlen=True)
    with torch.autocast("cpu", torch.bfloat16):
        flash = attention.plan_of(batch, varlen=True)
        assert attention.plan_of(batch, varlen=False) is plain
        assert attention.plan_of(batch, varlen=True) is flash
    assert isinstance(flash.form, Varlen) and not isinstance(plain.form, Varlen)
