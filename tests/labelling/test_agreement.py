"""Agreement: against hand-worked values, Krippendorff's own example, and other implementations."""

import json
from itertools import permutations
from pathlib import Path

import krippendorff
import numpy as np
import pytest

from prefloop.labelling import agreement as ag


def test_pair_agreement_by_hand():
    """A > B > C against C > B > A, against A = B > C, and against itself; then two full ties."""
    ranks = np.array([[0, 1, 2], [2, 1, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0]])
    signs = ag.pair_signs(ranks)
    first = np.repeat(signs[:1], 4, axis=0)
    assert ag.pair_agreement(first, signs[1:]).tolist() == [0.0, 2.5 / 3, 1.0, 0.5]
    assert ag.pair_agreement(signs[4:], signs[4:]).tolist() == [1.0]


def counts_of(reliability, values):
    """[raters, units] with NaN -> [units, values] counts."""
    return np.array(
        [[np.sum(column == value) for value in range(values)] for column in reliability.T]
    )


def test_alpha_of_krippendorffs_own_example():
    """Four observers, twelve units, five values (Computing Krippendorff's Alpha-Reliability, 2011,
    section C and E): 0.815 for ordinal data."""
    nan = np.nan
    table = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        ]
    )
    counts = counts_of(table - 1, 5)
    estimate = ag.krippendorff_alpha(counts, np.arange(12))
    assert round(estimate.mean, 3) == 0.815
    assert estimate.low < 0.815 < estimate.high


@pytest.mark.parametrize("seed", range(5))
def test_alpha_equals_another_implementation(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 4, size=(5, 40)).astype(float)
    table[1:3] = np.where(rng.random((2, 40)) < 0.7, table[0], table[1:3])
    table[rng.random(table.shape) < 0.3] = np.nan
    table[:2, :3] = [[0, 1, 2], [0, 1, 3]]
    counts = counts_of(table, 4)
    expected = krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal")
    assert ag.krippendorff_alpha(counts, np.arange(40)).mean == pytest.approx(expected, abs=1e-12)


def test_alpha_without_variation_is_not_a_number():
    assert np.isnan(ag.krippendorff_alpha(np.array([[2, 0], [2, 0]]), np.arange(2)).mean)


def test_alphas_interval_covers_the_truth():
    """Ranks of three with noise; the truth is taken from many prompts. 90 of 100 intervals, of 95
    expected, would be 2.3 standard deviations low."""

    def sample(rng, prompts):
        true = np.array([rng.permutation(3) for _ in range(prompts)])
        noisy = [
            np.argsort(np.argsort(true + rng.normal(0, 0.8, true.shape), axis=1), axis=1)
            for _ in range(2)
        ]
        return np.stack([(a[..., None] == np.arange(3)).astype(int) for a in noisy]).sum(axis=0)

    rng = np.random.default_rng(0)
    truth = ag.alpha_of(ag.coincidences(sample(rng, 20_000).reshape(-1, 3)).sum(axis=0))
    covered = 0
    for seed in range(60):
        counts = sample(rng, 60).reshape(-1, 3)
        estimate = ag.krippendorff_alpha(counts, np.repeat(np.arange(60), 3), seed)
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 52


def test_prompts_are_what_is_drawn():
    """Two prompts of 99 equal values each are two observations, not 198."""
    values, prompts = np.repeat([0.0, 1.0], 99), np.repeat([4, 7], 99)
    assert str(ag.share_by_prompt(values, prompts)) == "0.50 [0.00, 1.00]"
    mean = ag.mean_by_prompt(values, prompts)
    # The error of two observations 0 and 1 is 1/2; Student's t of one freedom is 12.706.
    assert (mean.mean, mean.high) == pytest.approx((0.5, 0.5 + 12.7062 / 2), abs=1e-4)


def test_the_error_of_a_mean_over_prompts_of_many_sizes():
    """Sum over prompts of (sum - mean * size)^2, by hand: the mean of 1, 1, 0 / 0 / 1, 0 is 1/2.

    Sums less half the sizes: 1/2, -1/2, 0; over the mean size 2: 1/4, -1/4, 0; their variance
    1/16, over three prompts 1/48.
    """
    values, prompts = np.array([1.0, 1, 0, 0, 1, 0]), np.array([0, 0, 0, 1, 2, 2])
    mean = ag.mean_by_prompt(values, prompts)
    assert mean.mean == pytest.approx(0.5)
    assert mean.high - mean.mean >= 4.3026 / 48**0.5 - 1e-4  # t of two freedoms, or more
    share = ag.share_by_prompt(values, prompts)
    z2, n = 4.3026**2, 0.25 * 48
    half = 4.3026 * (0.25 / n + z2 / (4 * n * n)) ** 0.5 / (1 + z2 / n)
    assert (share.low, share.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def test_one_coin_equals_crowd_kit():
    told = json.loads(Path(__file__).with_name("one_coin.json").read_text())
    items, labellers, labels = (np.array(column) for column in zip(*told["votes"], strict=True))
    model = ag.one_coin(items, labellers, labels, classes=3, iterations=2000)
    assert model.accuracy == pytest.approx(told["accuracy"], abs=1e-6)
    assert model.posterior == pytest.approx(np.array(told["posterior"]), abs=1e-6)


def test_one_coin_finds_who_is_good():
    """2,000 items: the standard error of an accuracy is 0.01."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 2000)
    accuracy = np.array([0.95, 0.85, 0.75, 0.6])
    right = rng.random((4, 2000)) < accuracy[:, None]
    labels = np.where(right, truth, 1 - truth)
    model = ag.one_coin(
        np.tile(np.arange(2000), 4), np.repeat(np.arange(4), 2000), labels.ravel(), classes=2
    )
    assert model.accuracy == pytest.approx(accuracy, abs=0.05)
    assert (model.posterior.argmax(axis=1) == truth).mean() > 0.95


def test_the_first_wins_without_and_with_bias():
    rng = np.random.default_rng(2)
    fair = np.array([rng.permutation(4) for _ in range(400)])
    share, p = ag.share_test(ag.first_wins(fair))
    assert abs(share - 0.5) < 0.06
    assert p > 0.001
    lazy = fair.copy()
    lazy[:120] = np.arange(4)  # three in ten simply say the order shown
    share, p = ag.share_test(ag.first_wins(lazy))
    assert share == pytest.approx(0.65, abs=0.05)
    assert p < 1e-6


def test_share_test_by_hand():
    """Shares 1, 1, 0.5, 0.5, 0.5, 0.5: mean 2/3, standard deviation 0.2582, z 1.5811, p 0.1138."""
    mean, p = ag.share_test(np.array([1, 1, 0.5, 0.5, 0.5, 0.5]))
    assert mean == pytest.approx(2 / 3)
    assert p == pytest.approx(0.11385, abs=1e-5)
    assert ag.share_test(np.array([0.5, 0.5])) == (0.5, 1.0)
    assert np.isnan(ag.share_test(np.array([0.5]))[1])


def test_the_first_wins_half_over_all_orders():
    """Over every order of any ranking the earlier answer wins half of the pairs."""
    ranks = np.array([0, 1, 1, 2])
    shown = np.array([ranks[list(order)] for order in permutations(range(4))])
    assert ag.first_wins(shown).mean() == 0.5


@pytest.mark.parametrize(
    ("votes", "tiers"),
    [
        ([2.0], [[0], [1]]),
        ([-0.1], [[1], [0]]),
        ([0.0], [[0, 1]]),
        ([1.0, 1.0, -1.0], [[0], [2], [1]]),
        ([1.0, -1.0, 1.0], [[0, 1, 2]]),  # a beats b beats c beats a
    ],
)
def test_copeland(votes, tiers):
    assert ag.copeland(votes, 2 if len(votes) == 1 else 3) == tiers
