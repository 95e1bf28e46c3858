"""Writes one_coin.json: what crowd-kit 1.4.2's OneCoinDawidSkene makes of simulated votes.

Run in an environment of its own (pip install crowd-kit): crowd-kit brings pandas and more, and is
no dependency of the tests.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from crowdkit.aggregation import OneCoinDawidSkene

rng = np.random.default_rng(0)
ACCURACY = (0.95, 0.8, 0.7, 0.6, 0.4)
votes = []
for item in range(60):
    truth = int(rng.choice(3, p=(0.5, 0.1, 0.4)))
    for labeller, p in enumerate(ACCURACY):
        if rng.random() < 0.7 or labeller == item % 5:
            wrong = [c for c in range(3) if c != truth]
            votes.append((item, labeller, truth if rng.random() < p else int(rng.choice(wrong))))
data = pd.DataFrame(votes, columns=["task", "worker", "label"])
model = OneCoinDawidSkene(n_iter=2000, tol=-1.0).fit(data)
posterior = model.probas_.sort_index()[[0, 1, 2]].to_numpy()
Path(__file__).with_name("one_coin.json").write_text(
    json.dumps(
        {
            "votes": votes,
            "accuracy": [round(float(model.skills_[w]), 9) for w in range(len(ACCURACY))],
            "posterior": np.round(posterior, 9).tolist(),
        }
    )
    + "\n"
)
