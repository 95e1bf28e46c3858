import math

import pytest
import torch

from prefloop.errors import UserError
from prefloop.losses import (
    dr_grpo_advantages,
    gae,
    grpo_advantages,
    moments,
    next_kl_coef,
    policy_loss,
    rloo_advantages,
    token_rewards,
    value_loss,
    whiten,
)

NAN = float("nan")


def test_reward_stands_at_the_last_generated_token() -> None:
    """Three tokens, then one with padding behind it; KL log-ratios 0.5, -0.2, 0.1 and 1."""
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, NAN, NAN]])
    ref = torch.tensor([[-1.5, -1.8, -0.6], [-2.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([3.0, -7.0]), log_probs, ref, mask, 0.1)
    expected = torch.tensor([[-0.05, 0.02, 2.99], [-7.1, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_gae_by_hand() -> None:
    """gamma 0.9, lambda 0.5: deltas from the end are 1 - 2 = -1, 0 + 1.8 - 1 = 0.8 and
    0.5 + 0.9 - 3 = -1.6; advantages -1, 0.8 - 0.45 = 0.35 and -1.6 + 0.1575 = -1.4425."""
    rewards = torch.tensor([[0.5, 0.0, 1.0, NAN]])
    values = torch.tensor([[3.0, 1.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    advantages = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-1.4425, 0.35, -1.0, 0.0]]))


def test_gae_of_an_answer_that_goes_on_by_hand() -> None:
    """As above, with V = 2 after the last token: its delta is 1 + 1.8 - 2 = 0.8, the advantages
    before it 0.8 + 0.36 = 1.16 and -1.6 + 0.522 = -1.078. The second answer has ended."""
    rewards = torch.tensor([[0.5, 0.0, 1.0, NAN], [1.0, NAN, NAN, NAN]])
    values = torch.tensor([[3.0, 1.0, 2.0, NAN], [0.5, NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    after = torch.tensor([2.0, 0.0])
    advantages = gae(rewards, values, mask, gamma=0.9, lam=0.5, after=after)
    expected = torch.tensor([[-1.078, 1.16, 0.8, 0.0], [0.5, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages, expected)


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, 5.0, 5.0]])
    advantages = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[2.0, 1.0, -1.0]]))


X = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_moments_by_hand() -> None:
    m = moments(X, MASK)
    assert (m.sum.item(), m.sum_of_squares.item(), m.count.item()) == (9.0, 41.0, 3)
    assert (m.mean.item(), m.variance.item()) == (3.0, 7.0)  # (4 + 1 + 9) / 2


def test_moments_of_parts_add_up_even_far_from_zero() -> None:
    x = torch.randn(64) + 1e4
    mask = torch.ones(64, dtype=torch.bool)
    parts = [moments(x[s], mask[s]) for s in (slice(10), slice(10, None))]
    joined = type(parts[0])(*(a + b for a, b in zip(*parts, strict=True)))
    assert joined.variance.item() == pytest.approx(x.double().var().item(), rel=1e-6)
    assert joined.mean.item() == pytest.approx(x.double().mean().item(), rel=1e-12)


def test_whiten_by_hand() -> None:
    m = moments(X, MASK)
    s = math.sqrt(7)
    white = whiten(X, MASK, m.mean, m.variance)
    torch.testing.assert_close(white, torch.tensor([[-2 / s, -1 / s, 0.0], [3 / s, 0.0, 0.0]]))
    kept = whiten(X, MASK, 3.0, 7.0, shift_mean=False)
    expected = torch.tensor([[3 - 2 / s, 3 - 1 / s, 0.0], [3 + 3 / s, 0.0, 0.0]])
    torch.testing.assert_close(kept, expected)


def test_whiten_keeps_the_sign() -> None:
    x = torch.tensor([-2.0, 0.0, 5.0])
    m = moments(x, torch.ones(3, dtype=torch.bool))
    assert whiten(x, torch.ones(3, dtype=torch.bool), m.mean, m.variance).argmax() == 2


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1 and range 0.2."""
    old = torch.full((4,), -1.0)
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    log_probs = (old + ratios.log()).requires_grad_()
    out = policy_loss(log_probs, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), cliprange=0.2)
    assert out.sum.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)
    assert (out.count.item(), out.clipfrac_sum.item()) == (4, 2.0)
    assert out.ratio_sum.item() == pytest.approx(4.0)
    assert out.approxkl_sum.item() == pytest.approx(math.log(1.5) ** 2 + math.log(0.5) ** 2)
    out.sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])  # clipped: no gradient


def test_clip_higher_by_hand() -> None:
    """Ratios 1.25, 1.5, 1.25 and 0.5, range 0.2 below and 0.3 above: the first is let through."""
    old = torch.full((4,), -1.0)
    log_probs = (old + torch.tensor([1.25, 1.5, 1.25, 0.5]).log()).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = policy_loss(log_probs, old, advantages, cliprange=0.2, clip_high=0.3)
    assert out.sum.item() == pytest.approx(-1.25 - 1.3 + 1.25 + 0.8)
    assert out.clipfrac_sum.item() == 2.0
    out.sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-1.25, 0.0, 1.25, 0.0])


def test_policy_loss_before_any_step() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -3.0])
    out = policy_loss(log_probs, log_probs, torch.tensor([1.0, 2.0, -6.0]), cliprange=0.2)
    assert [x.item() for x in out] == [3.0, 3, 0.0, 0.0, 3.0]


def test_value_loss_by_hand() -> None:
    """Values 1.0 and 1.1, old value 0.5, returns 0.5 and 2.0, range 0.2: clipped to 0.7."""
    values = torch.tensor([1.0, 1.1])
    out = value_loss(
        values, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 2.0]), cliprange_value=0.2
    )
    assert out.sum.item() == pytest.approx((0.5**2 + 1.3**2) / 2)
    assert out.clipfrac_sum.item() == 1.0


def test_adaptive_kl_coefficient() -> None:
    common = {"target": 6.0, "episodes": 500, "horizon": 10_000.0}
    assert next_kl_coef(0.1, 6.6, **common) == pytest.approx(0.1 * (1 + 0.1 * 0.05))
    assert next_kl_coef(0.1, 60.0, **common) == pytest.approx(0.1 * (1 + 0.2 * 0.05))
    assert next_kl_coef(0.1, 0.0, **common) == pytest.approx(0.1 * (1 - 0.2 * 0.05))


def test_adaptive_kl_coefficient_stays_positive() -> None:
    """However many episodes an iteration has, one moves beta by at most a fifth."""
    for episodes in (100, 101, 501, 10**6):
        common = {"target": 6.0, "episodes": episodes, "horizon": 100.0}
        assert next_kl_coef(0.1, 0.0, **common) == pytest.approx(0.08)
        assert next_kl_coef(0.1, 99.0, **common) == pytest.approx(0.12)


def test_group_baselines_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    # rloo: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    torch.testing.assert_close(
        rloo_advantages(scores), torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]])
    )
    s = math.sqrt(7) + 1e-4
    expected = torch.tensor([[-2 / s, -1 / s, 3 / s], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(grpo_advantages(scores), expected)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(dr_grpo_advantages(scores), expected)


@pytest.mark.parametrize("baseline", [rloo_advantages, grpo_advantages, dr_grpo_advantages])
def test_one_sample_has_no_baseline(baseline: object) -> None:
    assert callable(baseline)
    with pytest.raises(UserError, match="samples_per_prompt"):
        baseline(torch.zeros(3, 1))


def test_parts_of_a_batch_add_up() -> None:
    log_probs, old, advantages = torch.randn(3, 9)
    whole = policy_loss(log_probs, old, advantages, cliprange=0.2)
    parts = [
        policy_loss(log_probs[s], old[s], advantages[s], cliprange=0.2)
        for s in (slice(2), slice(2, None))
    ]
    for a, b, both in zip(*parts, whole, strict=True):
        assert (a + b).item() == pytest.approx(both.item(), rel=1e-5)
    halves = [
        value_loss(log_probs[s], old[s], advantages[s], cliprange_value=0.2)
        for s in (slice(2), slice(2, None))
    ]
    both_halves = value_loss(log_probs, old, advantages, cliprange_value=0.2)
    for a, b, both in zip(*halves, both_halves, strict=True):
        assert (a + b).item() == pytest.approx(both.item(), rel=1e-5)


def test_bfloat16_is_upcast() -> None:
    x = torch.randn(2, 3).bfloat16()
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert token_rewards(x[:, 0], x, x, mask, 0.1).dtype == torch.float32
    assert gae(x, x, mask, gamma=1.0, lam=0.95).dtype == torch.float32
    assert policy_loss(x[0], x[0], x[0], cliprange=0.2).sum.dtype == torch.float32
