"""`--micro-batch-tokens` is a bound: a prompt's answers are split, and nothing else changes."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefloop.data.batches import micro_batches, pack, packed_length
from prefloop.data.tokenize import Example
from prefloop.models import heads
from prefloop.models.heads import answer_log_probs, answer_scores
from prefloop.models.load import load_scorer
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import computed_tokens, in_pieces, split_answers
from prefloop.training.method import LossSums
from prefloop.training.step import evaluate
from tests.training.cases import CASES, run_case
from tests.training.small import CPU, policy

WIDE = Example(
    (9, 40, 41),
    tuple((50 + n,) * (2 + n) + (4,) for n in range(5)),  # of 3 to 7 tokens
    tuple((True,) * (3 + n) for n in range(5)),
    tiers=((4,), (0, 2), (1,), (3,)),
)


def test_answers_are_split_where_they_must_be():
    """Budgets by hand: the prompt takes 3 tokens, the answers 3, 4, 5, 6 and 7."""
    assert split_answers([WIDE], 28) == [WIDE]
    for budget, sizes in ((27, [4, 1]), (15, [3, 1, 1]), (10, [2, 1, 1, 1]), (1, [1] * 5)):
        pieces = split_answers([WIDE], budget)
        assert [len(piece.answers) for piece in pieces] == sizes
        assert all(packed_length(p) <= budget or len(p.answers) == 1 for p in pieces)
        assert all(piece.prompt == WIDE.prompt and piece.tiers == () for piece in pieces)
        assert [a for piece in pieces for a in piece.answers] == list(WIDE.answers)
        assert [m for piece in pieces for m in piece.answer_masks] == list(WIDE.answer_masks)


@pytest.mark.parametrize("budget", [27, 12, 1])
@pytest.mark.parametrize("kind", ["policy", "scorer"])
@pytest.mark.parametrize("packed", [True, False])
def test_pieces_give_the_same_numbers_and_gradients(packed, kind, budget, world):
    """Of a function in which every answer meets every other, so that pieces need each other."""
    model = policy(world) if kind == "policy" else load_scorer(str(world / "rm"), CPU)
    if not packed:  # as it comes, on padded batches
        kind = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
        model = replace(model, module=kind.from_pretrained(model.source).eval(), packed=False)
    compute = answer_scores if model.is_scorer else answer_log_probs
    found = []
    for most in (1000, budget):
        values = in_pieces(compute, model, pack([WIDE]), most)
        torch.logsumexp(values[:, None] * values[None, :], (0, 1)).backward()
        grads = {n: p.grad.clone() for n, p in model.module.named_parameters()}
        model.module.zero_grad()
        found.append((values.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for name, grad in found[0][1].items():
        assert grad.abs().max() > 0, name
        most = 2e-5 * float(grad.abs().max())  # torch 2.11 rounds less well than 2.13
        torch.testing.assert_close(grad, found[1][1][name], rtol=0, atol=most, msg=name)


def test_padded_batches_count_their_rectangle():
    """By hand: sequences of 6 to 10 tokens; two of up to 7 are 14, three of up to 8 are 24."""
    assert computed_tokens([WIDE], padded=True) == 5 * 10
    for budget, sizes in ((50, [5]), (49, [4, 1]), (24, [3, 2]), (23, [2, 2, 1]), (1, [1] * 5)):
        assert [len(piece.answers) for piece in split_answers([WIDE], budget, padded=True)] == sizes
    singles = split_answers([WIDE], 1)
    groups = micro_batches(singles, 24, padded=True)
    assert [len(group) for group in groups] == [3, 2]


@pytest.mark.parametrize("name", CASES)
def test_no_forward_pass_exceeds_the_bound(name, world, tmp_path, monkeypatch):
    """Of any length that one prompt with its longest answer fits; evaluation and rollouts, too."""
    seen = []
    run = heads.hidden_states

    def watched(model, batch, trunk=None):
        if not batch.input_ids.is_meta:  # of a rehearsal, which computes nothing
            seen.append(batch.tokens)
        return run(model, batch, trunk)

    monkeypatch.setattr(heads, "hidden_states", watched)
    run_case(name, world, tmp_path / "run", micro_batch_tokens=45)
    assert seen
    assert max(seen) <= 45


class Noted:
    """A micro-batch, and a method over such, that notes when it is moved and when computed."""

    trained: ClassVar[dict[str, LoadedModel]] = {}

    def __init__(self, number, notes):
        self.number, self.notes = number, notes

    def to(self, device):
        self.notes.append(("moved", self.number))
        return self

    def counts(self, batch):
        return {"term": 1.0}

    def loss(self, batch):
        self.notes.append(("computed", batch.number))
        return LossSums({"term": torch.tensor(1.0)}, {})


def test_a_step_is_put_on_the_device_a_micro_batch_at_a_time():
    notes = []
    evaluate(Noted(0, notes), [Noted(n, notes) for n in (1, 2, 3)], CPU)
    assert notes == [(what, n) for n in (1, 2, 3) for what in ("moved", "computed")]
