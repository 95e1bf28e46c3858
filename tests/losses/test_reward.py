import math
from collections.abc import Callable

import pytest
import torch

from prefloop.losses import (
    Total,
    bradley_terry_loss,
    centering_loss,
    davidson_loss,
    plackett_luce_loss,
    ranking_accuracy,
    rao_kupper_loss,
)

NAN = float("nan")


def neg_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


# Prompt 0: b > a = d > c. Prompt 1: b > a, the others absent.
SCORES = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, 3.0, NAN, NAN]])
TIERS = torch.tensor([[1, 0, 2, 1], [1, 0, -1, -1]])
FIRST = [1.0, 1.5, 3.0, 2.0, 1.5]  # r_w - r_l of b>a, b>d, b>c, a>c, d>c
SECOND = 3.0


def test_bradley_terry_means_over_a_prompts_pairs_and_sums_over_prompts() -> None:
    loss, count = bradley_terry_loss(SCORES, TIERS)
    expected = sum(map(neg_log_sigmoid, FIRST)) / 5 + neg_log_sigmoid(SECOND)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == 2


def test_bradley_terry_over_pairs() -> None:
    loss, count = bradley_terry_loss(SCORES, TIERS, normalize="pair")
    expected = sum(map(neg_log_sigmoid, FIRST)) + neg_log_sigmoid(SECOND)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == 6


def test_bradley_terry_at_equal_scores_is_log_2() -> None:
    assert bradley_terry_loss(torch.zeros(1, 2), torch.tensor([[0, 1]])).sum.item() == (
        pytest.approx(math.log(2))
    )


def test_margin_is_taken_off_the_lead() -> None:
    scores, tiers = torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 0]])
    expected = pytest.approx(neg_log_sigmoid(2.0 - 0.5))
    assert bradley_terry_loss(scores, tiers, 0.5).sum.item() == expected
    assert bradley_terry_loss(scores, tiers, torch.full((1, 1, 1), 0.5)).sum.item() == expected
    per_pair = torch.zeros(1, 2, 2)
    per_pair[0, 1, 0] = 0.5  # [winner, loser]
    assert bradley_terry_loss(scores, tiers, per_pair).sum.item() == expected


def test_plackett_luce_by_hand() -> None:
    # c > a > b: -[3 - lse(3, 1, 0)] - [1 - lse(1, 0)] - [0 - lse(0)]
    loss, count = plackett_luce_loss(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1, 2, 0]]))
    e = math.exp
    expected = -(3 - math.log(e(3) + e(1) + 1)) - (1 - math.log(e(1) + 1))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == 1


def test_plackett_luce_at_two_answers_is_bradley_terry() -> None:
    scores, tiers = torch.randn(5, 2), torch.tensor([[0, 1], [1, 0], [0, 1], [0, 0], [1, 0]])
    mine, pairs = plackett_luce_loss(scores, tiers), bradley_terry_loss(scores, tiers)
    assert mine.sum.item() == pytest.approx(pairs.sum.item(), rel=1e-6)
    assert mine.count == pairs.count == 4  # the tie is left out of both


def test_plackett_luce_leaves_ties_uncompared() -> None:
    # b > a = d: b against all; neither a nor d beats any.
    loss, _ = plackett_luce_loss(torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[1, 0, 1]]))
    e = math.exp
    assert loss.item() == pytest.approx(-(2 - math.log(e(2) + e(1) + e(0.5))), rel=1e-6)


def test_plackett_luce_with_a_tie_above_compares_it_with_what_lies_below_alone() -> None:
    # a = c > b, p = e^r = 3, 1, 2: each of a and c is chosen out of itself and b.
    scores = torch.tensor([[math.log(3.0), 0.0, math.log(2.0)]])
    loss, count = plackett_luce_loss(scores, torch.tensor([[0, 1, 0]]))
    assert loss.item() == pytest.approx(-math.log(3 / (3 + 1)) - math.log(2 / (2 + 1)), rel=1e-6)
    assert count.item() == 1


def test_plackett_luce_with_a_tie_in_the_middle_by_hand() -> None:
    # b > a = d > c, p = e^r = 2, 4, 1, 3: b out of all; a and d each out of itself and c.
    scores = torch.tensor([[2.0, 4.0, 1.0, 3.0]]).log()
    loss, count = plackett_luce_loss(scores, torch.tensor([[1, 0, 2, 1]]))
    expected = math.log(4 / 10) + math.log(2 / (2 + 1)) + math.log(3 / (3 + 1))
    assert loss.item() == pytest.approx(-expected, rel=1e-6)
    assert count.item() == 1


def test_rao_kupper_by_hand() -> None:
    # p = e^r = 3, 1, 1; theta = 2; a > b, a > c, b = c.
    scores = torch.tensor([[math.log(3.0), 0.0, 0.0]])
    loss, count = rao_kupper_loss(scores, torch.tensor([[0, 1, 1]]), 2.0, normalize="pair")
    win = 3 / (3 + 2 * 1)
    tie = (2**2 - 1) * 1 * 1 / ((1 + 2 * 1) * (2 * 1 + 1))
    assert loss.item() == pytest.approx(-2 * math.log(win) - math.log(tie), rel=1e-6)
    assert count.item() == 3


def test_davidson_by_hand() -> None:
    # p = 4, 1, 1; nu = 0.5; a > b, a > c, b = c.
    scores = torch.tensor([[math.log(4.0), 0.0, 0.0]])
    loss, count = davidson_loss(scores, torch.tensor([[0, 1, 1]]), 0.5)
    win = 4 / (4 + 1 + 0.5 * 2)
    tie = 0.5 / (1 + 1 + 0.5)
    assert loss.item() == pytest.approx((-2 * math.log(win) - math.log(tie)) / 3, rel=1e-6)
    assert count.item() == 1


@pytest.mark.parametrize("loss", [rao_kupper_loss, davidson_loss])
@pytest.mark.parametrize("gap", [-2.0, 0.0, 0.7])
def test_win_tie_and_loss_chances_sum_to_one(loss: Callable[..., Total], gap: float) -> None:
    scores = torch.tensor([[gap, 0.0]])
    outcomes = ([[0, 1]], [[1, 0]], [[0, 0]])
    chances = [math.exp(-loss(scores, torch.tensor(t), 1.7).sum.item()) for t in outcomes]
    assert sum(chances) == pytest.approx(1.0, rel=1e-6)


def test_centering_counts_scored_answers() -> None:
    loss, count = centering_loss(SCORES, TIERS)
    assert loss.item() == 1 + 4 + 1 + 0.25 + 0 + 9
    assert count.item() == 6


def test_accuracy_counts_equal_scores_half() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0], [0.0, 5.0, NAN]])
    tiers = torch.tensor([[0, 1, 2], [0, 1, -1]])  # right, right, equal; wrong
    correct, count = ranking_accuracy(scores, tiers)
    assert (correct.item(), count.item()) == (2.5, 4)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], Total]] = {
    "bradley-terry": bradley_terry_loss,
    "pairs": lambda s, t: bradley_terry_loss(s, t, normalize="pair"),
    "plackett-luce": plackett_luce_loss,
    "rao-kupper": lambda s, t: rao_kupper_loss(s, t, 1.5),
    "davidson": lambda s, t: davidson_loss(s, t, 1.5),
    "centering": centering_loss,
    "accuracy": ranking_accuracy,
}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up_and_absent_answers_change_nothing(name: str) -> None:
    loss = LOSSES[name]
    scores, tiers = torch.randn(7, 4), torch.randint(0, 3, (7, 4))
    whole = loss(scores, tiers)
    padded = torch.cat([scores, torch.full((7, 2), NAN)], 1).requires_grad_()
    absent = torch.full((7, 2), -1)
    for cut in (0, 1, 4, 7):
        parts = [
            loss(padded[rows], torch.cat([tiers, absent], 1)[rows])
            for rows in (slice(cut), slice(cut, None))
        ]
        assert sum(p.sum.item() for p in parts) == pytest.approx(whole.sum.item(), rel=1e-5)
        assert sum(p.count.item() for p in parts) == whole.count
    if name != "accuracy":
        sum((p.sum for p in parts), torch.tensor(0.0)).backward()
        assert padded.grad is not None
        assert padded.grad.isfinite().all()
