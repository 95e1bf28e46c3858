"""Writes bradley_terry.json: strengths by choix 0.4.1 of simulated judgements with ties.

Run in an environment of its own (pip install choix). choix knows wins alone: a win counts twice and
a tie is a win for each, the tie that `strengths` adds to every pair among them.
"""

import json
from pathlib import Path

import choix
import numpy as np

cases = []
for seed, (ways, count) in enumerate([(2, 40), (4, 200), (6, 150)]):
    rng = np.random.default_rng(seed)
    strength = rng.normal(0, 1, ways)
    rows, won = [], []
    for _ in range(count):
        i, j = sorted(int(x) for x in rng.choice(ways, 2, replace=False))
        p = 1 / (1 + np.exp(strength[j] - strength[i]))
        rows.append((i, j, 0.5 if rng.random() < 0.15 else float(rng.random() < p)))
    for i, j, score in [*rows, *((i, j, 0.5) for i, j in {(i, j) for i, j, _ in rows})]:
        won += [(i, j)] * round(2 * score) + [(j, i)] * round(2 * (1 - score))
    found = choix.opt_pairwise(ways, won, alpha=0.0, method="Newton-CG", tol=1e-12)
    told = [round(float(x), 9) for x in found - found[0]]
    cases.append({"ways": ways, "rows": rows, "strengths": told})
Path(__file__).with_name("bradley_terry.json").write_text(json.dumps(cases) + "\n")
