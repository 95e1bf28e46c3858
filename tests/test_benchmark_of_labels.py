"""What the benchmark of labels learns, spends and sums up, by hand."""

import math

import numpy as np
import pytest
import torch
from benchmarks import labels, labels_report
from benchmarks.labels_sets import LabelSet, put_together, states

from prefloop.models.load import load_scorer
from prefloop.models.weights import Storage
from tests.tiny import tiny_model, tiny_tokenizer

FIRST, SECOND, TIE = np.array([0, 1]), np.array([1, 0]), np.array([0, 0])


def test_a_head_is_where_loss_and_penalty_balance():
    """One pair, x = 1 and -1, loss log(1 + exp(-2w)) + p/2 w^2: at w = 1/2 its slope is 0 where
    p = 4 / (1 + e). Held near 1 the penalty's slope is p (w - 1).
    """
    features, said = torch.tensor([[1.0], [-1.0]]), [((0, 1), FIRST)]
    penalty = 4 / (1 + math.e)
    assert float(labels.fit(features, said, "pairs", penalty)) == pytest.approx(0.5, abs=1e-4)
    nearby = float(labels.fit(features, said, "pairs", penalty, torch.tensor([1.0])))
    assert 2 / (1 + math.exp(2 * nearby)) == pytest.approx(penalty * (nearby - 1), abs=1e-4)
    assert float(labels.fit(features, [((0, 1), TIE)], "pairs", penalty)) == 0.0


def test_each_loss_of_one_ranking():
    """Of three in order, x = 2, 1, 0: the slopes of the losses at w are 0 with p w as said."""
    features, said = torch.tensor([[2.0], [1.0], [0.0]]), [((0, 1, 2), np.array([0, 1, 2]))]

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    def pull(name, w):
        one, two = sigma(-w), sigma(-2 * w)
        if name == "rankings":
            total = math.exp(2 * w) + math.exp(w) + 1
            return 2 - (2 * math.exp(2 * w) + math.exp(w)) / total + one
        return (2 * one + 2 * two) / (3 if name == "pairs" else 1)

    for name in labels.LOSSES:
        w = float(labels.fit(features, said, name, 0.7))
        assert pull(name, w) == pytest.approx(0.7 * w, abs=1e-4), name


def test_accuracy_by_hand():
    scores = np.array([3.0, 1.0, 1.0])
    held_out = {4: [(0, 1), (1, 2)], 9: [(2, 0)]}
    assert labels.accuracy(scores, held_out) == {4: 0.75, 9: 0.0}


def test_what_a_ranking_costs():
    """Four answers: three comparisons at least; binary insertion 1 + 2 + 2."""
    ranking = ((0, 1, 2, 3), np.arange(4))
    assert labels.cost([ranking, ranking], 2) == (2.0, 6.0, 10.0)
    assert labels.cost([((0, 1), FIRST)] * 3, 9) == (9.0, 9.0, 9.0)
    assert labels.sizes(100) == [16, 32, 64, 100]
    assert labels.sizes(10) == [10]


def a_set(pairs, features):
    return LabelSet("x", features, pairs, [], list(range(len(features))), {})


def test_those_who_are_often_wrong_weigh_less():
    """Of five labellers two are right and three guess; three judge a pair."""
    draw = np.random.default_rng(0)
    guesses = np.stack([FIRST, SECOND])
    pairs = [
        ((0, 1), np.concatenate([[FIRST, FIRST], guesses[draw.integers(2, size=3)]]))
        for _ in range(400)
    ]
    of = a_set(pairs, torch.zeros(2, 1))
    right = {}
    for weighed in (False, True):
        bought = list(labels.by_several(of, np.random.default_rng(1), weighed))
        assert [judgements for judgements, _ in bought][:2] == [15, 30]  # 16 and 32, by threes
        judgements, said = bought[-1]
        assert (judgements, len(said)) == (1200, 400)
        right[weighed] = np.mean([ranks.tolist() == [0, 1] for _, ranks in said])
    # majority: 1/2 where three guess (1 of 10), 3/4 beside one who knows (6 of 10), else 1
    assert right[False] == pytest.approx(0.8, abs=0.05)
    # weighed: who knows decides
    assert right[True] == pytest.approx(0.95, abs=0.03)


def test_penalties_are_told_by_prompts_that_were_not_learned():
    """Of ten prompts: a better answer has more of the first feature, and noise in others."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 30, generator=draw)
    features[::2, 0] += 1.0
    pairs = [((2 * n, 2 * n + 1), FIRST[None]) for n in range(20)]
    of = LabelSet("x", features, pairs, [], [n // 4 for n in range(40)], {})
    said = [(items, ranks[0]) for items, ranks in pairs]
    order = np.random.default_rng(0).permutation(10)[:2]
    rest = [one for one in said if one[0][0] // 4 not in order]
    kept = {n: [(2 * n, 2 * n + 1)] for n in range(20) if n // 2 in order}
    right = {}
    for penalty in labels.PENALTIES:
        head = labels.fit(features, rest, "pairs", penalty)
        right[penalty] = sum(labels.accuracy((features @ head).numpy(), kept).values())
    assert len(rest) == 16 and len(kept) == 4
    assert right[labels.best_penalty(of, "pairs", said)] == max(right.values())


def test_the_spread_of_heads_chooses_what_they_do_not_know():
    """The pairs drawn first differ in one feature; half of those left in the other."""
    known, new = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    features = torch.stack([known, -known, new, -new])
    pairs = [((0, 1), FIRST[None])] * 160 + [((2, 3), FIRST[None])] * 16
    bought = labels.by_spread(a_set(pairs, features), np.random.default_rng(0), penalty=0.1)
    first, second = next(bought), next(bought)
    drawn, chosen = first[1], second[1][16:]
    assert sum(items == (2, 3) for items, _ in drawn) < 4
    assert sum(items == (2, 3) for items, _ in chosen) >= 12  # 13 of 16 go by the spread
    assert second[0] == len(second[1]) == 32


def test_rankings_are_put_together_by_labeller():
    """One says a > b > c, the other b > a and nothing else."""
    pairs = [
        ((5, 7), np.array([[0, 1], [1, 0]])),
        ((9, 7), np.array([[1, 0], [0, 0]])),
        ((5, 9), np.array([[0, 1], [0, 0]])),
        ((1, 2), np.array([[0, 1], [0, 1]])),  # another prompt's only pair
    ]
    [(items, ranks)] = put_together([0, 0, 0, 1], pairs)
    assert items == (5, 7, 9)
    assert ranks.tolist() == [[0, 1, 2], [2, 0, 1]]


def test_beside_people_by_hand():
    """Scores say a > b. Of three people two say so and one has no preference."""
    said = np.array([[0, 1], [0, 1], [0, 0]])
    of = LabelSet(
        "x",
        torch.tensor([[1.0], [-1.0]]),
        [((0, 1), said)],
        [],
        [0, 0],
        {},
        {3: [((0, 1), said)]},
    )
    # each of the two: the model 1; the others 1 and 1/2
    assert labels.beside_people(of, 0, 1.0) == {"model": {3: 1.0}, "person": {3: 0.75}}


def test_a_state_is_the_same_beside_other_answers(tmp_path):
    """As Transformers gives it for each answer alone: the last, and the mean of the answer's."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_scorer(str(tmp_path), torch.device("cpu"), Storage("float32"))
    asked = [("the boat", " in"), ("the boat", " an oath"), ("a", " that")]
    found = states(model, asked)
    for row, (prompt, answer) in zip(found, asked, strict=True):
        head = model.encoder.prompt(prompt)
        ids = [*head, *model.encoder.answer(prompt, answer)]
        output = plain.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        expected = torch.cat([output[-1], output[len(head) :].mean(0)])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_a_summary_by_hand():
    """Two seeds, two prompts in folds of their own; rankings of four need half the judgements."""

    def part(accuracies, prompt):
        def points(costs):
            each = zip(costs, accuracies, strict=True)
            return [{"cost": cost, "accuracy": {prompt: a}} for cost, a in each]

        losses = {"pairs": {"accuracy": {prompt: accuracies[-1]}, "cpu_seconds": 1.0}}
        curves = {
            labels_report.PAIRS: points([(16, 16, 16), (64, 64, 64)]),
            labels_report.RANKINGS: points([(8, 24, 40), (32, 96, 160)]),
        }
        return {"curves": curves, "losses": losses, "cpu_seconds": 2.0}

    parts = [(seed, part((0.5, last), p)) for seed, last in ((0, 0.7), (1, 0.9)) for p in "ab"]
    found = labels_report.summary(parts)
    assert found["target"]["mean"] == pytest.approx(0.8)
    ways = found["ways"]
    assert ways[labels_report.PAIRS]["reached"]["judgements"] == pytest.approx(64)
    reached = ways[labels_report.RANKINGS]["reached"]
    assert [reached[c] for c in labels_report.COUNTS] == pytest.approx([32, 96, 160])
    # seed 1: 0.5 to 0.9 in 16 to 64, so 0.8 at 16 x 4^(3/4)
    never, at = ways[labels_report.PAIRS]["reached by seed"]["judgements"]
    assert never is None and at == pytest.approx(16 * 4**0.75)
    assert ways[labels_report.PAIRS]["points"][0]["less target"]["mean"] == pytest.approx(-0.3)
    assert ways[labels_report.PAIRS]["points"][1]["less target"] is None
    # of other numbers of judgements there is no difference to as many
    assert ways[labels_report.RANKINGS]["points"][1]["less random"] is None
    assert found["cpu_seconds"] == 8
    assert any("never, 45" in line for line in labels_report.tables({"x": found}))
