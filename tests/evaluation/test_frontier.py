from itertools import combinations, product
from math import log

import numpy as np
import pytest

from prefloop.evaluation.frontier import best_of_n, best_of_n_kl, best_of_n_weights


def test_kl_bound() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(log(2) - 0.5)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


@pytest.mark.parametrize("n", [2, 4])
def test_kl_by_enumeration_stays_below_the_bound_and_nears_it(n: int) -> None:
    """KL(best-of-n || uniform) over m answers with distinct scores, by enumerating all draws."""
    gaps = []
    for m in (3, 12):
        counts = np.zeros(m)
        for draw in product(range(m), repeat=n):
            counts[max(draw)] += 1
        p = counts / m**n
        gaps.append(best_of_n_kl(n) - float((p * np.log(p * m)).sum()))
    assert 0 < gaps[1] < gaps[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("proxy", [[0.3, 2.0, -1.0, 5.0, 1.0], [1.0, 1.0, 0.0, 1.0, -2.0]])
def test_weights_by_enumerating_subsets(proxy: list[float], n: int) -> None:
    expected = np.zeros(5)
    subsets = list(combinations(range(5), n))
    for subset in subsets:
        top = max(proxy[i] for i in subset)
        winners = [i for i in subset if proxy[i] == top]
        for i in winners:
            expected[i] += 1 / len(winners) / len(subsets)
    np.testing.assert_allclose(best_of_n_weights(proxy, n), expected, atol=1e-12)


def test_expected_score_is_the_judges_not_the_proxys() -> None:
    # n = 2 of 3: the proxy's first leads 2 of 3 pairs, its second 1, its third none.
    value = best_of_n([[10.0, 1.0, 100.0]], [[3.0, 2.0, 1.0]], 2)
    assert value.mean == pytest.approx((2 * 10 + 1 * 1) / 3)
    with pytest.raises(ValueError, match="n = 4"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0]], 4)
