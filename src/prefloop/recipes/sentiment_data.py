"""Controlled sentiment: film-review sentences rated by people, a gold reward, simulated annotators.

What is human: 10,605 sentences and their 198,810 ratings (-4..4). What is simulated: the gold
reward, a regression on those ratings that stands for the annotators' taste, and the annotators,
who see the gold score with the noise that real raters have. The five splits share no sentence and
no opening of four words.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloop.data.sampled import samples_of_list
from prefloop.errors import UserError
from prefloop.files import cache_dir, read_rows, write_atomic, write_jsonl
from prefloop.recipes.fetch import MOVIE_RATINGS, RatedSentence, require_packages
from prefloop.recipes.public import facts, movie_ratings
from prefloop.records import Ranking, ranking_to_json

Floats = NDArray[np.float64]
SPLITS = {"gold": 5000, "sft": 3200, "preference": 1000, "ppo": 900, "evaluation": 505}
"""Sentences by use; prompts and SFT rows are those of them with a fitting length."""
SPLIT_SEED = 20140601
GOLD_VERSION = 2  # raise on any change to what the fitted gold depends on
RIDGE = 0.75
PANEL = 19  # annotators: as many as rated a real sentence, on average
SHORTEST, LONGEST = 7, 15  # words of a sentence that gives a prompt, and of an SFT row
WORD = re.compile(r"\b\w\w+\b")


def clean(text: str) -> str:
    """The sentence as one would type it: entities, doubled quotes and spaces mended."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    text = re.sub(r"\s{2,}", " - ", text.strip())
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"\s+('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r"\.\.\.(?=\w)", "... ", text).lstrip(".- ")
    text = text[:1].upper() + text[1:]
    return text if re.search(r"[.!?][\"')]*$", text) else text + "."


def opening(text: str, words: int) -> str:
    """The first words, without the space that follows them."""
    return " ".join(text.split(" ")[:words])


def split(
    sentences: Sequence[RatedSentence], sizes: Mapping[str, int] = SPLITS
) -> dict[str, list[RatedSentence]]:
    """Cleaned sentences by use; those that open with the same four words stay together."""
    groups: dict[str, list[RatedSentence]] = {}
    for sentence in sentences:
        tidy = RatedSentence(clean(sentence.text), sentence.ratings)
        groups.setdefault(opening(tidy.text, 4).lower(), []).append(tidy)
    keys = sorted(groups)
    np.random.default_rng(SPLIT_SEED).shuffle(keys)
    names = iter(sizes.items())
    name, size = next(names)
    parts: dict[str, list[RatedSentence]] = {name: []}
    for key in keys:
        if len(parts[name]) >= size:
            name, size = next(names, (name, len(sentences)))
            parts.setdefault(name, [])
        parts[name].extend(groups[key])
    return parts


def prompts(sentences: Sequence[RatedSentence]) -> list[str]:
    """Distinct openings of 4 or 5 words of the sentences with 7 words or more."""
    return list(
        {
            opening(s.text, _prompt_words(s.text)): None
            for s in sentences
            if len(s.text.split(" ")) >= SHORTEST
        }
    )


def demonstrations(sentences: Sequence[RatedSentence]) -> list[dict[str, str]]:
    """SFT rows: a sentence's opening, and its rest with the space before it."""
    rows = []
    for text in (s.text for s in sentences):
        if SHORTEST <= len(text.split(" ")) <= LONGEST:
            prompt = opening(text, _prompt_words(text))
            rows.append({"prompt": prompt, "completion": text[len(prompt) :]})
    return rows


def _prompt_words(text: str) -> int:
    return 4 + hashlib.sha256(text.encode()).digest()[0] % 2


def write(folder: Path) -> dict[str, object]:
    """Write the rows of every stage; what there is to know of them."""
    return {
        "sets": facts([movie_ratings()]),
        "rows": write_splits(folder),
        "human": "the sentences, and 198,810 ratings of them",
        "simulated": "the order of a model's answers: a regression on the ratings, seen by "
        f"{PANEL} annotators with real raters' noise",
    }


def rated_sentences() -> list[RatedSentence]:
    """All of them, from where they are kept."""
    rows = movie_ratings().rows
    return [RatedSentence(row["text"], tuple(row["ratings"])) for row in rows]


def parts() -> dict[str, list[RatedSentence]]:
    """The five splits; of fewer sentences than there are in the whole set, each has fewer."""
    rows = rated_sentences()
    share = min(1.0, len(rows) / sum(SPLITS.values()))
    return split(rows, {name: int(size * share) for name, size in SPLITS.items()})


def write_splits(folder: Path) -> dict[str, int]:
    """Write sft, preference, ppo and evaluation .jsonl into `folder`; the row counts."""
    found = parts()
    rows: dict[str, list[dict[str, str]]] = {"sft": demonstrations(found["sft"])}
    for name in ("preference", "ppo", "evaluation"):
        rows[name] = [{"prompt": prompt} for prompt in prompts(found[name])]
    for name, part in rows.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return {name: len(part) for name, part in rows.items()}


@dataclass(frozen=True)
class Gold:
    """Ridge regression of the human mean rating on L2-normalised TF-IDF of one and two words."""

    terms: Mapping[str, tuple[float, float]]  # idf and coefficient of each n-gram
    intercept: float
    held_out_r: float  # Pearson correlation with human means on sentences it was not fitted on
    held_out_pair_accuracy: float  # pairs of them that it orders as the human means do
    held_out_sentences: int

    def score(self, text: str) -> float:
        """Expected human rating, about -4 to 4: b + sum_g w_g tfidf_g / |tfidf|."""
        words = WORD.findall(text.lower())
        counts: dict[str, int] = {}
        for gram in words + [f"{a} {b}" for a, b in pairwise(words)]:
            if gram in self.terms:
                counts[gram] = counts.get(gram, 0) + 1
        squares = total = 0.0
        for gram, count in counts.items():
            idf, weight = self.terms[gram]
            squares += (count * idf) ** 2
            total += count * idf * weight
        return self.intercept + (total / squares**0.5 if squares else 0.0)


def fit_gold(train: Sequence[RatedSentence], held_out: Sequence[RatedSentence]) -> Gold:
    """Fit on the human means of `train` and measure on `held_out`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    features = vectorizer.fit_transform([s.text for s in train])
    means = np.array([s.mean for s in train])
    model = Ridge(alpha=RIDGE, solver="sparse_cg", tol=1e-8).fit(features, means)
    names = vectorizer.get_feature_names_out().tolist()
    pairs = zip(vectorizer.idf_.tolist(), model.coef_.tolist(), strict=True)
    fitted = Gold(dict(zip(names, pairs, strict=True)), float(model.intercept_), 0.0, 0.0, 0)
    scores = np.array([fitted.score(s.text) for s in held_out])
    truth = np.array([s.mean for s in held_out])
    r = float(np.corrcoef(scores, truth)[0, 1])
    accuracy = pair_agreement(scores, truth)
    return Gold(fitted.terms, fitted.intercept, r, accuracy, len(held_out))


def pair_agreement(a: Floats, b: Floats, pairs: int = 50_000) -> float:
    """Share of random pairs ordered alike by `a` and `b`; a tie in one of them counts half."""
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, len(a), (2, pairs))
    order_a, order_b = np.sign(a[i] - a[j])[i != j], np.sign(b[i] - b[j])[i != j]
    ordered = (order_a != 0) | (order_b != 0)
    return float(((1 + order_a * order_b) / 2)[ordered].mean())


@functools.lru_cache(maxsize=1)
def gold() -> Gold:
    """The gold reward from the cache, fitted first where it is missing (seconds)."""
    path = cache_dir() / "sentiment" / f"gold-{GOLD_VERSION}-{MOVIE_RATINGS.sha256[:8]}.json"
    if not path.exists():
        require_packages("sklearn")
        found = parts()
        held_out = [s for name, part in found.items() if name != "gold" for s in part]
        write_jsonl(path, [asdict(fit_gold(found["gold"], held_out))])
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Gold(**fields | {"terms": {gram: tuple(pair) for gram, pair in fields["terms"].items()}})


def gold_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Gold score of each prompt with its completion; use as a judge or a reward function."""
    fitted = gold()
    return [fitted.score(p + c) for p, c in zip(prompts, completions, strict=True)]


@dataclass(frozen=True)
class RaterNoise:
    """How real raters differ from the mean of their sentence."""

    residuals: Floats  # [R] rating minus the sentence's mean, all ratings of all sentences
    half_pair_agreement: float  # of the means of two random halves of a sentence's raters
    one_rater_agreement: float  # of one rater with the mean of the others

    @property
    def deviation(self) -> float:
        """Standard deviation of the residuals, in points of the -4..4 scale."""
        return float(self.residuals.std())


def measure_noise(sentences: Sequence[RatedSentence]) -> RaterNoise:
    """Residuals and agreements of the real ratings."""
    rng = np.random.default_rng(0)
    residuals, halves, ones = [], [], []
    for sentence in sentences:
        ratings = rng.permutation(np.array(sentence.ratings, dtype=np.float64))
        residuals.append(ratings - ratings.mean())
        half = len(ratings) // 2
        halves.append((ratings[:half].mean(), ratings[half:].mean()))
        ones.append((ratings[0], ratings[1:].mean()))
    agreements = [pair_agreement(*np.array(x).T) for x in (halves, ones)]
    return RaterNoise(np.concatenate(residuals), *agreements)


def annotate(
    scores: Sequence[float], residuals: Floats, annotators: int, rng: np.random.Generator
) -> tuple[tuple[int, ...], ...]:
    """Tiers, best first, that simulated annotators give to answers with these gold scores.

    Each annotator rates each answer: gold score plus a real rater's residual, rounded to an
    integer in -4..4. Answers whose ratings have the same mean are tied.
    """
    totals = _rated(scores, residuals, annotators, rng).sum(axis=0)
    levels = sorted(set(totals.tolist()), reverse=True)
    return tuple(tuple(np.flatnonzero(totals == level).tolist()) for level in levels)


def _rated(
    scores: Sequence[float], residuals: Floats, annotators: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Whole ratings from -4 to 4 [annotators, answers]."""
    noisy = np.asarray(scores) + rng.choice(residuals, (annotators, len(scores)))
    ratings: NDArray[np.int64] = np.clip(np.rint(noisy), -4, 4).astype(np.int64)
    return ratings


def panel(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The mean rating of each answer by PANEL annotators as in `annotate`, drawn by its text: an
    answer that comes again is rated as before.
    """
    residuals, found = _noise().residuals, []
    pairs = zip(gold_reward(prompts, completions), prompts, completions, strict=True)
    for score, prompt, completion in pairs:
        text = hashlib.sha256(f"{prompt}{completion}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(text))
        found.append(float(_rated([score], residuals, PANEL, rng).mean()))
    return found


@functools.lru_cache(maxsize=1)
def _noise() -> RaterNoise:
    return measure_noise(rated_sentences())


def rank_samples(
    samples: Path, output: Path, annotators: int, seed: int, noise: RaterNoise
) -> dict[str, Any]:
    """Have simulated annotators rank sampled answers: writes rankings, and beside them the facts.

    Equal answers to a prompt are shown once. `panel_agreement` is how often a second panel of as
    many annotators orders a pair alike, ties half: the reward model's ceiling rests on it.
    """
    if annotators < 1:
        raise UserError(f"annotators: {annotators}; at least 1 is needed")
    rankings, one_answer, agreement, pairs, ties = [], 0, [], 0, 0
    for number, (where, row) in enumerate(read_rows(samples)):
        prompt, completions = str(row["prompt"]), tuple(dict.fromkeys(row["completions"]))
        every = samples_of_list(row, where, len(row["completions"]))
        sampled = tuple(every[row["completions"].index(t)] for t in completions if every)
        if len(completions) < 2:
            one_answer += 1
            continue
        scores = gold_reward([prompt] * len(completions), completions)
        panels = [
            annotate(scores, noise.residuals, annotators, np.random.default_rng([seed, number, p]))
            for p in range(2)
        ]
        ranking = Ranking(prompt, completions, panels[0], where, sampled=sampled)
        second = Ranking(prompt, completions, panels[1], where)
        strict, other = set(ranking.pairs()), set(second.pairs())
        agreement += [
            1.0 if pair in other else 0.0 if pair[::-1] in other else 0.5 for pair in strict
        ]
        pairs += len(strict)
        ties += ranking.tied_pairs()
        rankings.append(ranking)
    facts = {
        "rankings": len(rankings),
        "prompts_with_one_distinct_answer": one_answer,
        "strict_pairs": pairs,
        "tied_pairs": ties,
        "annotators": annotators,
        "rater_deviation": noise.deviation,
        "real_half_pair_agreement": noise.half_pair_agreement,
        "real_one_rater_agreement": noise.one_rater_agreement,
        "panel_agreement": float(np.mean(agreement)) if agreement else 0.0,
    }
    write_atomic(output.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    write_jsonl(output, [ranking_to_json(ranking) for ranking in rankings])
    return facts
