"""A gold judge, and simulated annotators with tastes of their own.

What an annotator sees in an answer is its gold score, plus the weights that this annotator alone
gives to the words of the answer, however often they stand there. A share of
the rankings is handed in upside down, as by one who took 1 for the worst. Few annotators: their
tastes stand in what a reward model learns from them. Many: they cancel out, and gold remains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefloop.data.sampled import samples_of_list
from prefloop.files import read_rows, write_jsonl
from prefloop.recipes.sentiment_data import WORD, gold_reward
from prefloop.records import Ranking, ranking_to_json
from prefloop.rewards.health import repeated_share

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Scores of completions, each with its prompt."""
COMMON = 15  # times that a word stands in the sentences, for annotators to care about it


def gold_judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """From -4 to 4: the regression on people's ratings, as far as an answer says something new.

    The regression sees which words stand in a text, not whether it can be read: `good good good`
    is praise. People rated sentences, so it has seen none that go round in circles. A reader would
    call that the worst: with r the share of an answer's pairs of words that stood in it before,
    the rating is g - r (g + 4).
    """
    return [
        gold - repeated_share(WORD.findall(text.lower()), 2) * (gold + 4.0)
        for gold, text in zip(gold_reward(prompts, completions), completions, strict=True)
    ]


@dataclass(frozen=True)
class Annotator:
    """One person's own weights of words, in points of the gold score."""

    taste: Mapping[str, float]

    def likes(self, answer: str) -> float:
        """What the words of an answer are worth to this annotator, beside gold.

        >>> Annotator({"plot": 0.5, "war": -2.0}).likes("A plot, and what a plot.")
        0.5
        """
        return sum(self.taste.get(word, 0.0) for word in sorted(set(WORD.findall(answer.lower()))))


def common_words(sentences: Iterable[str]) -> list[str]:
    """Words that stand in the sentences often enough for a taste to be about them."""
    counts = Counter(word for text in sentences for word in WORD.findall(text.lower()))
    return sorted(word for word, count in counts.items() if count >= COMMON)


def draw_annotators(
    count: int, words: Sequence[str], deviation: float, rng: np.random.Generator
) -> list[Annotator]:
    """Each weighs each word by a normal draw of this deviation."""
    weights = rng.normal(0.0, deviation, (count, len(words))).tolist()
    return [Annotator(dict(zip(words, row, strict=True))) for row in weights]


def rank_by_turns(
    samples: Path,
    output: Path,
    annotators: Sequence[Annotator],
    flips: float,
    prompts: Sequence[int],
    judge: Judge,
    rng: np.random.Generator,
) -> None:
    """Writes rankings of the sampled answers to some rows of `samples`, an annotator each in turn.

    `judge` gives the gold score that annotators see beside what their own taste adds.

    Equal answers to a prompt are shown once; a prompt with one answer only is left out.
    """
    rows = list(read_rows(samples))
    rankings = []
    for turn, number in enumerate(prompts):
        where, row = rows[number]
        prompt, completions = str(row["prompt"]), tuple(dict.fromkeys(row["completions"]))
        every = samples_of_list(row, where, len(row["completions"]))
        sampled = tuple(every[row["completions"].index(t)] for t in completions if every)
        upside_down = rng.random() < flips
        if len(completions) < 2:
            continue
        annotator = annotators[turn % len(annotators)]
        gold = judge([prompt] * len(completions), completions)
        worth = [g + annotator.likes(text) for g, text in zip(gold, completions, strict=True)]
        order = sorted(range(len(worth)), key=lambda i: worth[i], reverse=not upside_down)
        tiers = tuple((i,) for i in order)
        rankings.append(Ranking(prompt, completions, tiers, where, sampled=sampled))
    write_jsonl(output, [ranking_to_json(ranking) for ranking in rankings])
