"""Log-probs, entropies, scores and values from hidden states."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical

from prefloop.data.batches import pack
from prefloop.models import heads
from tests.models.plain import (
    assert_close,
    assert_same_gradients,
    gradients,
    loaded,
    plain_log_probs,
    random_examples,
    tiny_scorer,
    with_plain_twin,
)
from tests.tiny import tiny_model


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@torch.no_grad()
def test_temperature(temperature):
    model, plain = with_plain_twin(tiny_model("gpt2"))
    (example,) = random_examples([(3, (6,))])
    example = type(example)(example.prompt, example.answers, ((True,) * 6,))
    ids = torch.tensor([[*example.prompt, *example.answers[0]]])
    actions = Categorical(logits=plain(input_ids=ids).logits[0, 2:8] / temperature)
    ours = heads.answer_log_probs(model, pack([example]), temperature)
    assert_close(ours, actions.log_prob(ids[0, 3:]), 1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recomputed_chunks_equal_logits_kept(tokens_at_once, temperature):
    """Memory decides how the head runs, never what comes out."""
    model = loaded(tiny_model("gemma3"))
    batch = pack(random_examples())

    def run(**sizes):
        hidden = heads.hidden_states(model, batch)[batch.source_index]
        return heads.head_log_probs(model, hidden, batch.target_ids, temperature, **sizes)

    sizes = {"logit_bytes": 0, "chunk_bytes": 4 * 268 * tokens_at_once}
    kept, chunked = run(), run(**sizes)
    assert_close(chunked, kept, 1e-6)
    ours = gradients(model.hf, chunked)
    assert_same_gradients(ours, gradients(model.hf, kept), 1e-5)
    with torch.no_grad():
        assert_close(run(**sizes), kept, 1e-6)


FORMS = pytest.mark.parametrize("form", [heads._SelectedLogProb, heads._FusedLogProb])


@FORMS
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_the_selected_log_prob(form, rows, temperature):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(5, 11, dtype=torch.float64, generator=generator)
    targets = torch.tensor([0, 10, 3, 3, 7])

    def selected(x):
        return form.apply(x, targets, 1 / temperature, rows)

    expected = (scores / temperature).log_softmax(-1)[torch.arange(5), targets]
    assert_close(selected(scores), expected, 1e-14)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(selected, scores)


@FORMS
def test_bfloat16_logits_are_differentiated_in_float32(form):
    """The gradient is float32's for the same logits, rounded once."""
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(5, 300, generator=generator)).bfloat16()
    targets, given = torch.tensor([0, 299, 3, 3, 7]), torch.randn(5, generator=generator)
    halves, exact = scores.clone().requires_grad_(), scores.float().requires_grad_()
    ours = form.apply(halves, targets, 1.0, 2)
    theirs = exact.log_softmax(-1)[torch.arange(5), targets]
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, 1e-6)
    (by_half,) = torch.autograd.grad(ours, halves, given)
    (by_exact,) = torch.autograd.grad(theirs, exact, given)
    assert_close(by_half.float(), by_exact.bfloat16().float(), 1e-2)


@FORMS
def test_log_probs_of_large_logits(form):
    """log(1/4 * 3), and -log(1 + e) far from zero: an offset must not eat the digits."""
    scores = torch.tensor([[0.0, 1.0986123], [1048576.0, 1048577.0]])
    ours = form.apply(scores, torch.tensor([1, 0]), 1.0, 2)
    assert_close(ours, torch.tensor([-0.28768207, -1.3132617]), 1e-6)


def test_bfloat16_autocast_keeps_the_softmax_in_float32():
    """Off by bf16 logits only: the log-softmax of the very same logits is float32's.

    In bf16 a log-prob near -5.6 (268 tokens) would be a multiple of 2^-5, and off by up to 2^-6.
    """
    model, plain = with_plain_twin(tiny_model("llama"))
    batch, examples = pack(random_examples()), random_examples()
    exact = plain_log_probs(plain, examples).detach()
    model = replace(model, dtype="bfloat16")
    hidden = heads.hidden_states(model, batch)[batch.source_index]
    logits = heads.logits(model, hidden)
    ours = heads.head_log_probs(model, hidden, batch.target_ids)
    with model.computing():
        half = model.hf.lm_head(hidden)
    assert half.dtype == torch.bfloat16
    assert logits.dtype == ours.dtype == torch.float32
    picked = half.double().log_softmax(-1).gather(-1, batch.target_ids[:, None]).squeeze(-1)
    assert float((ours.double() - picked).detach().abs().max()) < 2e-6
    assert float((ours - exact).detach().abs().mean()) < 0.05 * float(exact.abs().mean())


def test_bfloat16_autocast_keeps_scores_in_float32():
    model = replace(loaded(tiny_scorer("llama")), dtype="bfloat16")
    batch = pack(random_examples())
    hidden = heads.hidden_states(model, batch)[batch.last_index]
    scores = heads.scalar_head(model, hidden)
    assert scores.dtype == torch.float32
    expected = hidden.float() @ model.hf.score.weight[0]
    assert_close(scores, expected, 1e-5)


def test_no_loss_tokens_at_all():
    """An example whose whole answer is masked gives no numbers and no gradient."""
    model = loaded(tiny_model("llama"))
    (example,) = random_examples([(3, (2,))])
    example = type(example)(example.prompt, example.answers, ((False, False),))
    ours = heads.answer_log_probs(model, pack([example]))
    assert ours.shape == (0,)
    ours.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.hf.parameters())
