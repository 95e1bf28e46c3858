"""Win rates at equal length: who would win if both sides' answers were as long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefloop.intervals import Interval, estimate

Floats = NDArray[np.float64]
RIDGE = 0.1  # on the length's coefficient squared, halved
STEPS = 50


@dataclass(frozen=True)
class Duels:
    """Answers of one way against those of another, a row each: [rows]."""

    wins: Floats  # 1 the first way's answer is better, 0 the second's, 1/2 a tie
    differences: Floats  # tokens of the first way's answer minus those of the second's
    prompts: NDArray[np.int64]  # 0, 1, ...: of which prompt
    weights: Floats  # those of a prompt sum to 1
    first_runs: NDArray[np.int64]  # which run of each way answered
    second_runs: NDArray[np.int64]

    def by_run(self, values: Floats) -> tuple[Floats, Floats]:
        """Values of rows, summed by prompt, for each run of the first and of the second way [S, N].

        The mean over runs is the sum over a prompt's rows.
        """
        first, second = (self._table(values, runs) for runs in (self.first_runs, self.second_runs))
        return first, second

    def _table(self, values: Floats, runs: NDArray[np.int64]) -> Floats:
        count = int(runs.max()) + 1
        table = np.zeros((count, int(self.prompts.max()) + 1))
        np.add.at(table, (runs, self.prompts), values * count)
        return table


def fit(wins: Floats, lengths: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Coefficients [2] (theta, phi) of logit P(win) = theta + phi z, and the Hessian [2, 2].

    Newton's method on the weighted log-likelihood of wins within [0, 1] and of one more tie at z =
    0, minus RIDGE phi^2/2: so both are finite where one side wins everything.
    """
    wins, weights = np.append(wins, 0.5), np.append(weights, 1.0)
    design = np.stack([np.ones(len(wins)), np.append(lengths, 0.0)], axis=1)
    penalty = np.diag([0.0, RIDGE])
    beta = np.zeros(2)

    def loss(at: Floats) -> float:
        logits = design @ at
        fitted = weights @ (np.logaddexp(0.0, logits) - wins * logits)
        return float(fitted + at @ penalty @ at / 2)

    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(design @ beta)))
        gradient = design.T @ (weights * (wins - p)) - penalty @ beta
        hessian = (design.T * (weights * p * (1 - p))) @ design + penalty
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and loss(beta + size * step) > loss(beta):
            size /= 2
        beta = beta + size * step
        if float(np.abs(step).max()) < 1e-10:
            break
    return beta, hessian


def length_controlled(duels: Duels) -> Interval:
    """The win rate that AlpacaEval 2's model gives at equal length.

    logit P(win) = theta + phi tanh(d/s) with d the difference in tokens and s its deviation over
    all rows; at equal length P = sigma(theta) (Dubois et al. 2024, arXiv 2404.04475, equation 2).
    Their third term, the instruction's difficulty, is left out: it is fitted on a leaderboard of
    many models, and two models' answers to a prompt say nothing of it. Wins may be ties and shares.
    The interval is a share's, with the error of P made linear in prompts (the jackknife's form of
    the sandwich), and at no more answers than the plain win rate's.
    """
    mean = np.average(duels.differences, weights=duels.weights)
    variance = np.average((duels.differences - mean) ** 2, weights=duels.weights)
    lengths = np.tanh(duels.differences / np.sqrt(variance)) if variance else 0 * duels.differences
    (theta, phi), hessian = fit(duels.wins, lengths, duels.weights)
    p = float(1 / (1 + np.exp(-theta)))
    # Each row's pull on P were it left out (jackknife), by prompt and by run of either way.
    at = 1 / (1 + np.exp(-(theta + phi * lengths)))
    inverse = np.linalg.inv(hessian)
    design = np.stack([np.ones(len(lengths)), lengths], axis=1)
    leverage = duels.weights * at * (1 - at) * ((design @ inverse) * design).sum(axis=1)
    residuals = duels.weights * (duels.wins - at) / (1 - leverage)
    first, second = duels.by_run(p * (1 - p) * residuals * (design @ inverse[0]))
    prompts = first.shape[1]
    values = prompts * (first.mean(axis=0) - first.mean())
    runs = prompts * first, prompts * second
    plain = estimate(duels.by_run(duels.weights * duels.wins)[0].mean(axis=0), resamples=0)
    return estimate(p + values, runs=runs, resamples=0).share(prompts, plain.answers(prompts))
