"""Headlines in another newspaper's voice: keywords in, a satirical headline out.

What is human: 28,614 headlines, written by the staff of a satirical and of a serious newspaper. The
label is the newspaper, not a reader's judgement. What is simulated: the taste that is learned, a
classifier of newspapers. The classifier of the reward and the judge's are fitted on disjoint thirds
of the headlines, and no model trains on either third.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prefloop.files import cache_dir, write_jsonl
from prefloop.recipes.fetch import require_packages
from prefloop.recipes.public import Row, facts, headlines
from prefloop.recipes.sentiment_data import Gold
from prefloop.recipes.splits import distinct

Use = Literal["reward", "judge"]
SEED = 20260105
SIZES = {
    "reward": 9000,
    "judge": 9000,
    "sft": 5000,
    "preference": 1000,
    "ppo": 1000,
    "evaluation": 400,
}
ASKED = ("preference", "ppo", "evaluation")
HEADLINES = 28_614  # in the whole set
VERSION = 1  # raise on any change to what the classifiers depend on
STOP_WORDS = frozenset(
    "about after again against also another are around because been before being between both "
    "could does doing down during each ever every from gets getting goes going have having here "
    "into just like made make makes many more most much must need never only other over really "
    "says should some still such than that the their them then there these they thing things this "
    "those through under until very want wants was well were what when where which while who whom "
    "will with without would your yours you're it's don't".split()
)


def keywords_of(headline: str) -> list[str]:
    """Its longer words but common ones, in the alphabet's order: what it is about.

    >>> keywords_of("mayor says he will open the new bridge on monday")
    ['bridge', 'mayor', 'monday', 'open']
    """
    words = re.findall(r"\w+", headline.lower())
    return sorted({word for word in words if len(word) > 3 and word not in STOP_WORDS})


def prompt_of(headline: str) -> str:
    """What the model is asked."""
    return f"Words: {', '.join(keywords_of(headline))}\nHeadline:"


def parts() -> dict[str, list[Row]]:
    """Headlines by use; near duplicates are merged. All but the classifiers' have 3 to 8 keywords;
    those that are asked about come from the serious newspaper alone. Of fewer rows than there are
    in the whole set, each use has fewer.
    """
    rows = headlines().rows
    sizes = {name: int(size * min(1.0, len(rows) / HEADLINES)) for name, size in SIZES.items()}
    shuffled = [rows[place] for place in distinct([row["text"] for row in rows], SEED, words=2)]
    start, end = sizes["reward"], sizes["reward"] + sizes["judge"]
    rest = [row for row in shuffled[end:] if 3 <= len(keywords_of(row["text"])) <= 8]
    plain = [row for row in rest if not row["sarcastic"]]
    found = {"reward": shuffled[:start], "judge": shuffled[start:end]}
    for name in ASKED:
        found[name], plain = plain[: sizes[name]], plain[sizes[name] :]
    asked = {row["text"] for name in ASKED for row in found[name]}
    found["sft"] = [row for row in rest if row["text"] not in asked][: sizes["sft"]]
    return found


def write(folder: Path) -> dict[str, object]:
    """Write sft, preference, ppo and evaluation .jsonl; what there is to know of them."""
    found = parts()
    rows: dict[str, list[Row]] = {
        "sft": [
            {"prompt": prompt_of(row["text"]), "completion": " " + row["text"]}
            for row in found["sft"]
        ]
    }
    for name in ASKED:
        rows[name] = [{"prompt": prompt_of(r["text"]), "source": r["text"]} for r in found[name]]
    for name, part in rows.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    accuracy = {use: classifier(use).accuracy for use in ("reward", "judge")}
    return {
        "sets": facts([headlines()]),
        "rows": {name: len(part) for name, part in rows.items()},
        "classifiers' accuracy": accuracy,
        "human": "headlines, by journalists; the label is their newspaper",
        "simulated": "the taste: a classifier of newspapers, and the share of keywords used",
    }


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on TF-IDF of one and two words."""

    linear: Gold  # its score is the log-odds of the satirical newspaper
    accuracy: float  # on the other classifier's headlines, which it has not seen

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """Of each text, that it is the satirical newspaper's."""
        return [1 / (1 + math.exp(-self.linear.score(text))) for text in texts]


@functools.lru_cache(maxsize=2)
def classifier(use: Use) -> Classifier:
    """The reward's classifier, or the judge's: fitted once, and kept in the cache."""
    path = cache_dir() / "style" / f"classifier-{VERSION}-{use}.json"
    if not path.exists():
        found = parts()
        other = found["judge" if use == "reward" else "reward"]
        write_jsonl(path, [asdict(fit(found[use], other))])
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    linear = fields["linear"]
    terms = {gram: tuple(pair) for gram, pair in linear["terms"].items()}
    return Classifier(Gold(**linear | {"terms": terms}), fields["accuracy"])


def fit(train: Sequence[Row], held_out: Sequence[Row]) -> Classifier:
    """Fit on the newspapers of `train` and measure on `held_out`."""
    require_packages("sklearn", extra="recipes")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    features = vectorizer.fit_transform([row["text"] for row in train])
    model = LogisticRegression(C=4.0, max_iter=1000).fit(features, [r["sarcastic"] for r in train])
    names = vectorizer.get_feature_names_out().tolist()
    weights = zip(vectorizer.idf_.tolist(), model.coef_[0].tolist(), strict=True)
    terms = dict(zip(names, weights, strict=True))
    linear = Gold(terms, float(model.intercept_[0]), 0.0, 0.0, len(held_out))
    right = [(linear.score(row["text"]) > 0) == row["sarcastic"] for row in held_out]
    return Classifier(linear, sum(right) / len(right))
