import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefloop.losses import (
    Total,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# c = -8 + 10 = 2, l = -9 + 6 = -3, so d = 5; with beta = 0.2, beta d = 1.
PAIR = tuple(torch.tensor([v]) for v in (-8.0, -9.0, -10.0, -6.0))
LENGTHS = (torch.tensor([4]), torch.tensor([2]))


def value(loss: Total) -> float:
    assert loss.count.item() == 1
    return loss.sum.item()


def test_sigmoid_by_hand() -> None:
    assert value(sigmoid_loss(*PAIR, beta=0.2)) == pytest.approx(-log_sigmoid(1.0))


def test_sigmoid_is_exactly_log_2_where_policy_is_the_reference() -> None:
    chosen, rejected = torch.tensor([-12.3]), torch.tensor([-7.7])
    loss = value(sigmoid_loss(chosen, rejected, chosen, rejected, beta=0.1))
    assert loss == torch.tensor(2.0).log().item()


def test_label_smoothing_is_conservative_dpo() -> None:
    expected = -0.9 * log_sigmoid(1.0) - 0.1 * log_sigmoid(-1.0)
    assert value(sigmoid_loss(*PAIR, beta=0.2, label_smoothing=0.1)) == pytest.approx(expected)


def test_robust_by_hand_and_unbiased_under_flips() -> None:
    expected = (-0.9 * log_sigmoid(1.0) + 0.1 * log_sigmoid(-1.0)) / 0.8
    robust = value(robust_loss(*PAIR, beta=0.2, label_smoothing=0.1))
    assert robust == pytest.approx(expected)
    w, l, ref_w, ref_l = PAIR
    flipped = value(robust_loss(l, w, ref_l, ref_w, beta=0.2, label_smoothing=0.1))
    assert 0.9 * robust + 0.1 * flipped == pytest.approx(-log_sigmoid(1.0))


def test_ipo_summed_and_averaged() -> None:
    assert value(ipo_loss(*PAIR, beta=0.2)) == pytest.approx((5 - 2.5) ** 2)
    chosen, rejected = LENGTHS
    averaged = ipo_loss(*PAIR, beta=0.2, chosen_lengths=chosen, rejected_lengths=rejected)
    assert value(averaged) == pytest.approx((2 / 4 + 3 / 2 - 2.5) ** 2)


def test_hinge_on_both_sides_of_the_margin() -> None:
    assert value(hinge_loss(*PAIR, beta=0.1)) == pytest.approx(0.5)
    assert value(hinge_loss(*PAIR, beta=0.3)) == 0.0


def test_length_normalised_sigmoid_by_hand() -> None:
    # c / |y_w| - l / |y_l| = 2 / 4 + 3 / 2 = 2
    loss = sigmoid_norm_loss(*PAIR, *LENGTHS, beta=0.5)
    assert value(loss) == pytest.approx(-log_sigmoid(1.0))


def test_apo_zero_by_hand() -> None:
    # beta c = 0.4, beta l = -0.6
    expected = 1 - 1 / (1 + math.exp(-0.4)) + 1 / (1 + math.exp(0.6))
    assert value(apo_zero_loss(*PAIR, beta=0.2)) == pytest.approx(expected)


def test_apo_zero_moves_each_answer_by_itself() -> None:
    """Its gradient of the chosen answer's log-prob does not look at the rejected one."""
    gradients = []
    for rejected in (-9.0, -2.0):
        w, l, ref_w, ref_l = (x.clone().requires_grad_() for x in PAIR)
        with torch.no_grad():
            l.fill_(rejected)
        apo_zero_loss(w, l, ref_w, ref_l, beta=0.2).sum.backward()
        assert w.grad is not None
        gradients.append(w.grad.item())
    slope = 0.2 / (1 + math.exp(-0.4)) / (1 + math.exp(0.4))
    assert gradients == pytest.approx([-slope, -slope])


def test_simpo_by_hand() -> None:
    # -8/4 + 9/2 = 2.5; 2 * 2.5 - 0.5 = 4.5
    loss = simpo_loss(PAIR[0], PAIR[1], *LENGTHS, beta=2.0, gamma=0.5)
    assert value(loss) == pytest.approx(-log_sigmoid(4.5), rel=1e-5)


def test_orpo_by_hand() -> None:
    # Mean log-probs log(1/2) and log(1/4): odds 1 and 1/3, ratio 3, sigma(log 3) = 3/4.
    chosen, rejected = torch.tensor([4 * math.log(0.5)]), torch.tensor([2 * math.log(0.25)])
    assert value(orpo_loss(chosen, rejected, *LENGTHS)) == pytest.approx(-math.log(0.75))


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    chosen = torch.tensor([0.0], requires_grad=True)
    rejected = torch.tensor([-1.0], requires_grad=True)
    loss = orpo_loss(chosen, rejected, *LENGTHS).sum
    loss.backward()
    assert loss.isfinite()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_kto_by_hand() -> None:
    # Desirable: log-ratio 2, undesirable: -3; z = 0.5, beta = 0.2.
    policy, ref = torch.tensor([-8.0, -9.0]), torch.tensor([-10.0, -6.0])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    loss, count = kto_loss(policy, ref, torch.tensor([True, False]), 0.5, beta=0.2, **weights)
    good = 1.5 * (1 - 1 / (1 + math.exp(-0.2 * (2 - 0.5))))
    bad = 0.5 * (1 - 1 / (1 + math.exp(-0.2 * (0.5 + 3))))
    assert loss.item() == pytest.approx(good + bad)
    assert count.item() == 2


def test_kto_estimate_is_at_least_zero_and_has_no_gradient() -> None:
    policy, ref, good = torch.tensor([-8.0]), torch.tensor([-10.0]), torch.tensor([True])
    negative = kto_loss(policy, ref, good, -3.0, beta=0.2)
    assert negative.sum == kto_loss(policy, ref, good, 0.0, beta=0.2).sum
    z = torch.tensor(0.5, requires_grad=True)
    assert not kto_loss(policy, ref, good, z, beta=0.2).sum.requires_grad


def test_plackett_luce_dpo_at_two_answers_is_dpo() -> None:
    policy, ref = torch.tensor([[-8.0, -9.0]]), torch.tensor([[-10.0, -6.0]])
    loss = plackett_luce_dpo_loss(policy, ref, torch.tensor([[0, 1]]), beta=0.2)
    assert value(loss) == pytest.approx(-log_sigmoid(1.0))


def test_plackett_luce_dpo_by_hand() -> None:
    # Rewards 0.5 * log-ratios (2, 0, -4) = 1, 0, -2, ranked b > a > c.
    policy, ref = torch.tensor([[-3.0, -5.0, -9.0]]), torch.full((1, 3), -5.0)
    loss = plackett_luce_dpo_loss(policy, ref, torch.tensor([[1, 0, 2]]), beta=0.5)
    e = math.exp
    expected = -(0 - math.log(1 + e(1) + e(-2))) - (1 - math.log(e(1) + e(-2)))
    assert value(loss) == pytest.approx(expected, rel=1e-6)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Total]
LOSSES: dict[str, Loss] = {
    "sigmoid": lambda w, v, rw, rv, nw, nv: sigmoid_loss(w, v, rw, rv, beta=0.1),
    "cdpo": lambda w, v, rw, rv, nw, nv: sigmoid_loss(w, v, rw, rv, beta=0.1, label_smoothing=0.2),
    "robust": lambda w, v, rw, rv, nw, nv: robust_loss(w, v, rw, rv, beta=0.1, label_smoothing=0.2),
    "ipo": lambda w, v, rw, rv, nw, nv: ipo_loss(
        w, v, rw, rv, beta=0.1, chosen_lengths=nw, rejected_lengths=nv
    ),
    "hinge": lambda w, v, rw, rv, nw, nv: hinge_loss(w, v, rw, rv, beta=0.1),
    "apo-zero": lambda w, v, rw, rv, nw, nv: apo_zero_loss(w, v, rw, rv, beta=0.1),
    "sigmoid-norm": lambda w, v, rw, rv, nw, nv: sigmoid_norm_loss(w, v, rw, rv, nw, nv, beta=0.1),
    "simpo": lambda w, v, rw, rv, nw, nv: simpo_loss(w, v, nw, nv, beta=2.0, gamma=0.5),
    "orpo": lambda w, v, rw, rv, nw, nv: orpo_loss(w, v, nw, nv),
    "kto": lambda w, v, rw, rv, nw, nv: kto_loss(w, rw, nw > nv, 0.3, beta=0.1),
    "plackett-luce": lambda w, v, rw, rv, nw, nv: plackett_luce_dpo_loss(
        torch.stack([w, v], 1), torch.stack([rw, rv], 1), torch.tensor([[0, 1]] * len(w)), beta=0.1
    ),
}


def random_pairs(size: int) -> list[Tensor]:
    log_probs = [-10 * torch.rand(size) - 1 for _ in range(4)]
    return [*log_probs, torch.randint(1, 9, (size,)), torch.randint(1, 9, (size,))]


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    pairs = random_pairs(7)
    whole = LOSSES[name](*pairs)
    for cut in (1, 4):
        head, tail = (LOSSES[name](*(x[s] for x in pairs)) for s in (slice(cut), slice(cut, None)))
        assert (head.sum + tail.sum).item() == pytest.approx(whole.sum.item(), rel=1e-5)
        assert head.count + tail.count == whole.count == 7


@pytest.mark.parametrize("name", LOSSES)
def test_float32_inside_and_descent_prefers_the_chosen(name: str) -> None:
    pairs = [torch.tensor([v]) for v in (-8.0, -8.0, -9.0, -9.0)] + [torch.tensor([4])] * 2
    half = [x.bfloat16() if x.is_floating_point() else x for x in pairs]
    assert LOSSES[name](*half).sum.dtype == torch.float32
    for x in pairs[:2]:
        x.requires_grad_()
    LOSSES[name](*pairs).sum.backward()
    chosen, rejected = pairs[0].grad, pairs[1].grad
    if name == "kto":  # equal lengths stand for "undesirable" here
        assert chosen is not None
        assert chosen > 0
    else:
        assert chosen is not None
        assert rejected is not None
        assert chosen < 0 < rejected
