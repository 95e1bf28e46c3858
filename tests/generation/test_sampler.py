from __future__ import annotations

import math

import pytest
import torch

from prefloop.errors import UserError
from prefloop.generation.sampler import Sampling, draw, keep_likeliest, request_uniforms

PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])


def sets(top_p: float = 1.0, top_k: int = 0) -> set[int]:
    """Ids that some uniform draws."""
    uniforms = torch.linspace(0, 1, 2001)[:-1]
    sampling = Sampling(top_p=top_p, top_k=top_k)
    tokens, _ = draw(PROBS.log().expand(2000, 5), uniforms, sampling)
    return set(tokens.tolist())


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (1.0, 0, {0, 1, 2, 3, 4}),
        (1.0, 2, {1, 3}),
        (1.0, 9, {0, 1, 2, 3, 4}),
        (0.35, 0, {1}),  # .4 is enough
        (0.6, 0, {1, 3}),  # .4 is not, .7 is
        (0.8, 0, {1, 3, 4}),  # .4 + .3 is not, .85 is
        (0.9, 0, {0, 1, 3, 4}),
        (0.5, 2, {1}),  # of the two left, .4 / .7 = .571 is enough
        (0.6, 2, {1, 3}),
        (1e-9, 0, {1}),
    ],
)
def test_exactly_the_right_tokens_stay(top_p: float, top_k: int, expected: set[int]) -> None:
    assert sets(top_p, top_k) == expected


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token() -> None:
    kept, ids = keep_likeliest(torch.tensor([[0.25, 0.5, 0.25]]), top_p=0.5, top_k=0)
    assert kept[0, 0] == 0.5
    assert ids[0, 0] == 1
    assert kept[0, 1:].tolist() == [0, 0]


def test_the_inverse_cdf_by_hand() -> None:
    # cumulative .1 .5 .55 .85 1: a token owns [its lower end, its upper end)
    logits = PROBS.log().expand(6, 5)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.5001, 0.84, 1 - 2**-24])
    tokens, _ = draw(logits, uniforms, Sampling())
    assert tokens.tolist() == [0, 0, 1, 2, 3, 4]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, 5)
    tokens, log_probs = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), Sampling())
    assert tokens.tolist() == [1, 3, 3]
    assert log_probs.tolist() == pytest.approx([math.log(0.5)] * 3)


@pytest.mark.parametrize("size", [700, 768])
def test_the_inverse_cdf_over_many_tokens(size: int) -> None:
    """Against one running sum in float64; half of the tokens have no probability."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, size, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
    uniforms = torch.rand(4000, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])
    tokens, _ = draw(logits, uniforms, Sampling())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    ends = cumulative.gather(-1, tokens[:, None])[:, 0]
    starts = ends - logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (ends > starts).all()
    assert (starts - 1e-6 <= uniforms).all()
    assert (uniforms <= ends + 1e-6).all()


def test_log_probs_are_the_whole_distributions_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    at_half = [math.exp(2 * x) for x in (0.0, 1.0, 2.0)]
    for top_k in (0, 1):
        tokens, log_probs = draw(
            logits, torch.tensor([0.99]), Sampling(temperature=0.5, top_k=top_k)
        )
        assert tokens.tolist() == [2]
        assert log_probs.item() == pytest.approx(math.log(at_half[2] / sum(at_half)), abs=1e-6)


def test_temperature_zero_takes_the_likeliest_and_gives_its_log_prob_at_one() -> None:
    tokens, log_probs = draw(PROBS.log(), torch.tensor([0.999]), Sampling(temperature=0))
    assert tokens.tolist() == [1]
    assert log_probs.item() == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    count, generator = 40_000, torch.Generator().manual_seed(3)
    logits = torch.randn(50, generator=generator)
    uniforms = torch.rand(count, generator=generator)
    tokens, _ = draw(logits.expand(count, 50), uniforms, Sampling(temperature=temperature))
    expected = count * (logits / temperature).softmax(-1)
    seen = torch.bincount(tokens, minlength=50)
    chi_square = ((seen - expected) ** 2 / expected).sum().item()
    assert chi_square < 85.35  # the 99.9 % point with 49 degrees of freedom


def test_frequencies_match_the_renormalised_nucleus() -> None:
    count = 40_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(4))
    tokens, _ = draw(PROBS.log().expand(count, 5), uniforms, Sampling(top_p=0.8))
    seen = torch.bincount(tokens, minlength=5)
    expected = count * torch.tensor([0.4, 0.3, 0.15]) / 0.85
    chi_square = ((seen[[1, 3, 4]] - expected) ** 2 / expected).sum().item()
    assert seen[[0, 2]].tolist() == [0, 0]
    assert chi_square < 13.82  # 99.9 %, two degrees of freedom


def test_uniforms_depend_on_the_request_alone() -> None:
    uniforms = request_uniforms(7, 2, 1, 8)
    assert torch.equal(uniforms, request_uniforms(7, 2, 1, 8))
    for other in ((8, 2, 1), (7, 1, 1), (7, 2, 0), (7, 1, 2), (72, 1, 1)):
        assert not torch.equal(uniforms, request_uniforms(*other, 8))
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    # Written down once: a change of the hash would change every seeded run.
    assert request_uniforms(0, 0, 0, 2).tolist() == pytest.approx(PINNED, abs=1e-7)


PINNED = [0.3111660, 0.8848175]


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
