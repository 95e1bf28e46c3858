import math

import pytest
import torch

from prefloop.losses import k1, k2, k3

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float32)
REF = torch.tensor([0.25, 0.25, 0.4, 0.1]).log()


def test_by_hand() -> None:
    q = torch.tensor([2.0, -1.0])
    assert k1(q).tolist() == [2.0, -1.0]
    assert k2(q).tolist() == [2.0, 0.5]
    assert k3(q).tolist() == pytest.approx([math.exp(-2) + 1, math.e - 2])


def test_k1_and_k3_are_unbiased_on_an_enumerable_policy() -> None:
    log_p = LOGITS.log_softmax(0)
    kl = (log_p.exp() * (log_p - REF)).sum().item()
    for estimator in (k1, k3):
        mean = (log_p.exp() * estimator(log_p - REF)).sum().item()
        assert mean == pytest.approx(kl, rel=1e-5)


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl() -> None:
    """Samples are drawn without gradient, so the expectation weighs by a detached policy."""
    gradients = {}
    for name, estimator in {"k1": k1, "k2": k2, "k3": k3, "true": None}.items():
        logits = LOGITS.clone().requires_grad_()
        log_p = logits.log_softmax(0)
        if estimator is None:
            (log_p.exp() * (log_p - REF)).sum().backward()
        else:
            (log_p.detach().exp() * estimator(log_p - REF)).sum().backward()
        assert logits.grad is not None
        gradients[name] = logits.grad
    torch.testing.assert_close(gradients["k2"], gradients["true"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients["k1"], torch.zeros(4), atol=1e-6, rtol=0)
    assert (gradients["k3"] - gradients["true"]).abs().max() > 0.01
