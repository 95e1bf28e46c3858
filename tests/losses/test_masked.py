import pytest
import torch
from jaxtyping import TypeCheckError

from prefloop.losses import masked_sum, segment_sum, sft_loss, total


def test_masked_sum_ignores_what_is_masked() -> None:
    x = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert masked_sum(x, mask) == 15.0
    assert masked_sum(x[:, :1]) == 5.0


def test_masked_sum_gives_no_gradient_to_what_is_masked() -> None:
    x = torch.tensor([3.0, float("nan")], requires_grad=True)
    masked_sum(x, torch.tensor([True, False])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


def test_total_counts_terms() -> None:
    sum_, count = total(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    assert (sum_.item(), count.item()) == (5.0, 2)


def test_segment_sum_adds_per_answer_and_leaves_empty_ones_zero() -> None:
    x = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    sums = segment_sum(x, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [-10.0, 0.0, -5.0, 0.0]


def test_bfloat16_is_summed_in_float32() -> None:
    x = torch.full((1000,), 1.0078125, dtype=torch.bfloat16)  # 1 + 2^-7; bfloat16 sums stall
    assert masked_sum(x) == 1007.8125
    assert segment_sum(x, torch.zeros(1000, dtype=torch.long), 1).item() == 1007.8125


def test_sft_loss_is_the_negative_sum() -> None:
    loss, count = sft_loss(torch.tensor([-0.5, -1.5, -1.0]))
    assert (loss.item(), count.item()) == (3.0, 3)


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        masked_sum(torch.zeros(3), torch.ones(2, dtype=torch.bool))
