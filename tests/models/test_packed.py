"""Packed and shared-prefix forwards give the numbers and gradients of one-by-one forwards."""

import pytest
import torch

from prefloop.data.batches import pack
from prefloop.models import heads
from tests.models.plain import (
    assert_close,
    assert_same_gradients,
    gradients,
    loaded,
    plain_log_probs,
    plain_scores,
    plain_values,
    random_examples,
    sequences,
    tiny_scorer,
    with_plain_twin,
)
from tests.tiny import ARCHS, tiny_model

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def gradient_tolerance(arch, tolerance):
    """RMS norms compute in float32 in float64 models too, and so round their gradients."""
    return tolerance if arch == "gpt2" else max(tolerance, 1e-6)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])
def test_log_probs_and_gradients(arch, dtype, tolerance):
    model, plain = with_plain_twin(tiny_model(arch, dtype=dtype))
    examples = random_examples()
    assert model.packed
    ours = heads.answer_log_probs(model, pack(examples))
    theirs = plain_log_probs(plain, examples)
    assert ours.dtype == dtype
    assert_close(ours, theirs, tolerance)
    bound = gradient_tolerance(arch, tolerance)
    assert_same_gradients(gradients(model.hf, ours), gradients(plain, theirs), bound)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])
def test_scores_values_and_gradients(arch, dtype, tolerance):
    model, plain = with_plain_twin(tiny_scorer(arch, dtype))
    examples = random_examples(seed=1)
    batch = pack(examples)
    assert model.packed
    scores, plain_score = heads.answer_scores(model, batch), plain_scores(plain, examples)
    assert_close(scores, plain_score, tolerance)
    values, plain_value = heads.token_values(model, batch), plain_values(plain, examples)
    assert_close(values, plain_value, tolerance)
    ours = gradients(model.hf, torch.cat([scores, values]))
    theirs = gradients(plain, torch.cat([plain_score, plain_value]))
    assert_same_gradients(ours, theirs, gradient_tolerance(arch, tolerance))


def padded_log_probs(module, examples, left):
    """One plain forward of all sequences, padded on one side, with a mask and position ids."""
    rows = sequences(examples)
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    starts = [width - len(row) if left else 0 for row, _ in rows]
    for line, ((row, _), start) in enumerate(zip(rows, starts, strict=True)):
        ids[line, start : start + len(row)] = torch.tensor(row)
        mask[line, start : start + len(row)] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = module(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    log_p = logits.log_softmax(-1)
    return torch.stack(
        [
            log_p[line, start + place - 1, row[place]]
            for line, ((row, places), start) in enumerate(zip(rows, starts, strict=True))
            for place in places
        ]
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@torch.no_grad()
def test_plain_padded_forwards_agree(arch, left):
    model, plain = with_plain_twin(tiny_model(arch))
    examples = random_examples()
    ours = heads.answer_log_probs(model, pack(examples))
    assert_close(ours, padded_log_probs(plain, examples, left), 1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_an_answers_tokens_move_no_other_number(arch):
    """Bit for bit, in a forward of the same shape."""
    model = loaded(tiny_model(arch))
    examples = random_examples()
    other = random_examples(seed=5)
    changed = list(examples)
    answers = list(examples[3].answers)
    answers[2] = other[3].answers[2]  # answer 8 of the batch
    changed[3] = type(examples[3])(examples[3].prompt, tuple(answers), examples[3].answer_masks)
    batch = pack(examples)
    before = heads.answer_log_probs(model, batch)
    after = heads.answer_log_probs(model, pack(changed))
    own = batch.target_answer == 8
    assert torch.equal(before[~own], after[~own])
    assert not torch.isclose(before[own], after[own]).any()


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_later_token_moves_no_earlier_number(arch):
    model = loaded(tiny_model(arch))
    (example,) = random_examples([(4, (12,))])
    answer = example.answers[0]
    changed = type(example)(example.prompt, ((*answer[:-1], 6),), ((True,) * 12,))
    whole = type(example)(example.prompt, (answer,), ((True,) * 12,))
    before, after = (heads.answer_log_probs(model, pack([e])) for e in (whole, changed))
    assert torch.equal(before[:-1], after[:-1])


def test_sharing_a_prompt_changes_nothing():
    """Answers of one example, and the same answers as examples of their own."""
    model = loaded(tiny_model("gemma3"))
    examples = random_examples([(7, (3, 9, 1, 4, 6))])
    (shared,) = examples
    alone = [
        type(shared)(shared.prompt, (answer,), (mask,))
        for answer, mask in zip(shared.answers, shared.answer_masks, strict=True)
    ]
    together = heads.answer_log_probs(model, pack(examples))
    apart = heads.answer_log_probs(model, pack(alone))
    assert_close(together, apart, 1e-5)
    assert_same_gradients(gradients(model.hf, together), gradients(model.hf, apart), 1e-5)


def test_no_prompt_at_all():
    """The very first token has nothing that predicts it; the rest equals the plain forward."""
    model, plain = with_plain_twin(tiny_model("gpt2"))
    examples = random_examples([(0, (5,)), (3, (2,)), (0, (8,))])
    ours = heads.answer_log_probs(model, pack(examples))
    assert_close(ours, plain_log_probs(plain, examples), 1e-5)
