"""Three sets that people judged, as a frozen model reads them: what benchmarks.labels learns from.

Each answer is read once by the first half of SmolLM2-135M's layers; what is kept of it are the
hidden states of the answer, the last one and their mean. They lie in the cache, so a reward model
is a linear head.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.data.batches import to_batches
from prefloop.data.tokenize import Example, encode_answers, with_answers
from prefloop.files import cache_dir
from prefloop.labelling.agreement import copeland, ranks_of
from prefloop.models.heads import hidden_states
from prefloop.models.load import load_scorer
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage
from prefloop.recipes.fetch import RatedSentence, building, fetch_model, fetch_movie_ratings
from prefloop.recipes.public import Row, mqm_rankings, pandalm_pairs
from prefloop.recipes.sentiment_data import split
from prefloop.recipes.splits import near_duplicates
from prefloop.recipes.splits import split as split_groups
from prefloop.records import Message, Sampled, Text

VERSION = 1  # of what is kept of an answer
LAYERS = 15  # of 30
TOGETHER = 32  # answers to a prompt in one stream
MOST_TOKENS = 4096  # of one forward pass
SPLIT_SEED = 20260127
FOLDS = {"films": 1, "PandaLM": 5, "MQM": 3}  # held out in turn; of the films one part, always
FILM_SPLIT = {"train": 4000, "held-out": 1500, "rest": 0}  # sentences
FILM_PAIRS, FILM_RANKINGS, FILM_K = 4096, 2048, 4
FILM_TESTED = 10  # sentences of a held-out group
CARE = (1, 1, 2, 3, 8)  # raters in each of the films' labellers
ASKED = "A sentence of a film review:"

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Judged = tuple[tuple[int, ...], Ints]
"""Items, and their ranks by each labeller [labellers, K]; 0 is best."""
Ordered = list[tuple[int, int]]
"""Pairs of a prompt's items, the better one first."""


@dataclass(frozen=True)
class LabelSet:
    """What people said of the items of a set, by what they are asked."""

    name: str
    features: Tensor  # [items, D], of mean 0 and deviation 1
    pairs: list[Judged]
    rankings: list[Judged]
    prompts: list[int]  # the number of each item's prompt; a film's sentence is its own
    held_out: dict[int, Ordered]  # by the prompt's number
    panel: dict[int, list[Judged]] = field(default_factory=dict)  # held-out pairs, as people judged

    @property
    def labellers(self) -> int:
        """How many there are."""
        return len(self.pairs[0][1])


def load_set(name: str, seed: int, fold: int) -> LabelSet:
    """A set by its name; the seed draws the folds, and deals out the raters of the films."""
    return films(seed) if name == "films" else {"PandaLM": pandalm, "MQM": mqm}[name](seed, fold)


def ordered(items: Sequence[int], ranks: Ints) -> Ordered:
    """Pairs of items whose ranks [K] differ.

    >>> ordered([7, 8, 9], np.array([1, 0, 1]))
    [(8, 7), (8, 9)]
    """
    pairs = combinations(zip(items, ranks.tolist(), strict=True), 2)
    return [(a, b) if x < y else (b, a) for (a, x), (b, y) in pairs if x != y]


# --- films ---------------------------------------------------------------------------------------


def films(seed: int) -> LabelSet:
    """Sentences with 15 to 29 raters, whose names are not known: they are dealt out to five
    labellers, one, one, two, three and eight of them; a labeller's rating is their mean. The truth
    of a held-out sentence is the mean of all.
    """
    parts = split(fetch_movie_ratings(), FILM_SPLIT)
    sentences = [*parts["train"], *parts["held-out"]]
    features = embedded("films", [(ASKED, " " + s.text) for s in sentences])
    draw = np.random.default_rng([SPLIT_SEED, seed])
    known = len(parts["train"])
    ratings = dealt(sentences[:known], draw)
    means = np.array([s.mean for s in sentences])
    tested = np.random.default_rng(SPLIT_SEED).permutation(np.arange(known, len(sentences)))
    groups = tested[: len(tested) // FILM_TESTED * FILM_TESTED].reshape(-1, FILM_TESTED)

    def drawn(count: int, size: int) -> list[Judged]:
        rows = (draw.choice(known, size, replace=False) for _ in range(count))
        return [(tuple(row.tolist()), ranked(ratings[:, row])) for row in rows]

    return LabelSet(
        "films",
        features,
        drawn(FILM_PAIRS, 2),
        drawn(FILM_RANKINGS, FILM_K),
        list(range(len(sentences))),
        {n: ordered(of.tolist(), ranked(means[of][None])[0]) for n, of in enumerate(groups)},
    )


def dealt(sentences: Sequence[RatedSentence], draw: np.random.Generator) -> Floats:
    """The ratings of the labellers [labellers, sentences]: means of disjoint raters."""
    ends = np.cumsum(CARE)
    rows = []
    for sentence in sentences:
        drawn = draw.permutation(np.array(sentence.ratings, dtype=np.float64))[: ends[-1]]
        rows.append([part.mean() for part in np.split(drawn, ends[:-1])])
    return np.array(rows).T


def ranked(scores: Floats) -> Ints:
    """Ranks [labellers, K] of scores; the highest gets 0, equal ones the same.

    >>> ranked(np.array([[1.0, 3.0, 1.0]])).tolist()
    [[1, 0, 1]]
    """
    ranks = [np.unique(-row, return_inverse=True)[1].reshape(-1) for row in scores]
    return np.array(ranks, dtype=np.int64)


# --- PandaLM and MQM -----------------------------------------------------------------------------


def pandalm(seed: int, fold: int) -> LabelSet:
    """Pairs of answers that three people judged. Nobody ranked more than two: a ranking is made of
    what one person said of the pairs of a prompt's answers. Truth: the majority, pairs with none
    left out.
    """
    rows = pandalm_rows()
    items = _Items()
    pairs = [(items.places(r["prompt"], r["completions"]), _raters(r)) for r in rows]
    numbers, own = by_prompt("PandaLM", [row["prompt"] for row in rows], seed, fold)
    known = [n for n in range(len(rows)) if n not in own]
    held_out: dict[int, Ordered] = {}
    panel: dict[int, list[Judged]] = {}
    for n in sorted(own):
        panel.setdefault(numbers[n], []).append(pairs[n])
        (a, b), vote = pairs[n][0], signs(pairs[n][1]).sum()
        if vote and a != b:
            held_out.setdefault(numbers[n], []).append((a, b) if vote > 0 else (b, a))
    return LabelSet(
        "PandaLM",
        embedded("pandalm", items.asked),
        [pairs[n] for n in known],
        put_together([numbers[n] for n in known], [pairs[n] for n in known]),
        items.prompts,
        held_out,
        panel,
    )


def pandalm_rows() -> list[Row]:
    """All but the one whose answer is no text."""
    return [r for r in pandalm_pairs().rows if all(isinstance(c, str) for c in r["completions"])]


def _raters(row: Row) -> Ints:
    return np.array([ranks_of(tiers, 2) for tiers in row["raters"]], dtype=np.int64)


def signs(ranks: Ints) -> Ints:
    """[labellers]: 1 where the first of two is better, -1 where the second is."""
    found: Ints = np.sign(ranks[:, 1] - ranks[:, 0])
    return found


def put_together(prompts: Sequence[int], pairs: Sequence[Judged]) -> list[Judged]:
    """Rankings of three answers or more: by pairs won less pairs lost, each labeller's own."""
    groups: dict[int, list[Judged]] = {}
    for prompt, pair in zip(prompts, pairs, strict=True):
        groups.setdefault(prompt, []).append(pair)
    found = []
    for group in groups.values():
        places = sorted({item for items, _ in group for item in items})
        if len(places) < 3:
            continue
        cells = {pair: n for n, pair in enumerate(combinations(places, 2))}
        votes = np.zeros((len(group[0][1]), len(cells)))
        for (a, b), ranks in group:
            if a != b:
                votes[:, cells[min(a, b), max(a, b)]] += signs(ranks) * (1 if a < b else -1)
        tiers = [copeland(row.tolist(), len(places)) for row in votes]
        ranks = np.array([ranks_of(of, len(places)) for of in tiers], dtype=np.int64)
        found.append((tuple(places), ranks))
    return found


def mqm(seed: int, fold: int) -> LabelSet:
    """Translations with their published marks, each by one professional whose name the set has not:
    one labeller. A pair is one of a ranking's.
    """
    rows = mqm_rankings().rows
    items = _Items()
    rankings = [
        (items.places(row["prompt"], row["completions"]), ranked(np.array([row["mqm"]])))
        for row in rows
    ]
    _, own = by_prompt("MQM", [row["prompt"] for row in rows], seed, fold)
    known = [rankings[n] for n in range(len(rows)) if n not in own]
    pairs: list[Judged] = [
        ((places[a], places[b]), ranked(-ranks[:, [a, b]].astype(np.float64)))
        for places, ranks in known
        for a, b in combinations(range(len(places)), 2)
    ]
    held_out = {n: ordered(rankings[n][0], rankings[n][1][0]) for n in sorted(own)}
    held_out = {n: pairs for n, pairs in held_out.items() if pairs}
    return LabelSet("MQM", embedded("mqm", items.asked), pairs, known, items.prompts, held_out)


class _Items:
    """Distinct (prompt, answer), numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}

    def places(self, prompt: str, answers: Sequence[str]) -> tuple[int, ...]:
        """The numbers of a prompt's answers."""
        return tuple(self.numbers.setdefault((prompt, a), len(self.numbers)) for a in answers)

    @property
    def asked(self) -> list[tuple[str, str]]:
        """All of them."""
        return list(self.numbers)

    @property
    def prompts(self) -> list[int]:
        """The number of each one's prompt."""
        known = {prompt: n for n, prompt in enumerate(dict.fromkeys(p for p, _ in self.numbers))}
        return [known[prompt] for prompt, _ in self.numbers]


@functools.lru_cache(maxsize=2)
def _groups(prompts: tuple[str, ...]) -> list[int]:
    return near_duplicates(prompts)


def by_prompt(
    name: str, prompts: Sequence[str], seed: int, fold: int
) -> tuple[list[int], set[int]]:
    """The number of each row's prompt, and the places of the rows that the fold holds out; prompts
    that are near duplicates stay in one fold.
    """
    shares = {str(n): 1 / FOLDS[name] for n in range(FOLDS[name])}
    parts = split_groups(_groups(tuple(prompts)), shares, SPLIT_SEED + seed)
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts], set(parts[str(fold)])


# --- what the frozen model makes of an answer ----------------------------------------------------


def embedded(name: str, asked: Sequence[tuple[str, str]]) -> Tensor:
    """Features [items, D] of (prompt, answer), from the cache; each column of mean 0, deviation 1.

    A film's sentence continues the prompt; elsewhere the prompt is a user's turn.
    """
    path = cache_dir() / "labels" / f"{name}-{VERSION}-{len(asked)}.npy"
    if not path.exists():
        model = load_scorer(str(body()), torch.device("cpu"), Storage("bfloat16"))
        whole = [(text if name == "films" else (Message("user", text),), a) for text, a in asked]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")  # whole or not at all
        np.save(part, states(model, whole).numpy())
        part.replace(path)
    return _kept(path)


@functools.lru_cache(maxsize=3)
def _kept(path: Path) -> Tensor:
    kept = torch.from_numpy(np.load(path))
    kept -= kept.mean(0)
    return kept / kept.std(0).clamp(min=1e-6)


def body() -> Path:
    """SmolLM2-135M's first LAYERS, in the cache: half of what all of them cost."""
    folder = cache_dir() / "labels" / f"body-{LAYERS}"
    if not folder.exists():
        source = fetch_model("smollm2-135m-instruct")
        with building(folder) as part:
            shutil.copytree(source, part / "model")
            later = re.compile(r"model\.layers\.(\d+)\.")
            weights = load_file(source / "model.safetensors")
            kept = {
                name: weight
                for name, weight in weights.items()
                if not (found := later.match(name)) or int(found[1]) < LAYERS
            }
            save_file(kept, part / "model" / "model.safetensors", {"format": "pt"})
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            text = json.dumps(config | {"num_hidden_layers": LAYERS})
            (part / "model" / "config.json").write_text(text, encoding="utf-8")
            (part / "model").replace(folder)
    return folder


@torch.no_grad()
def states(model: LoadedModel, asked: Sequence[tuple[Text, str]]) -> Tensor:
    """[answers, 2 D] in float32: the hidden state that a reward model's head reads, and the mean of
    those of the answer's tokens. Answers that follow one another to one prompt share it.
    """
    examples: list[Example] = []
    for prompt, group in groupby(asked, key=lambda one: one[0]):
        answers = [answer for _, answer in group]
        for n in range(0, len(answers), TOGETHER):
            examples.append(_example(model, prompt, answers[n : n + TOGETHER], len(examples)))
    parts = []
    for batch in to_batches(examples, MOST_TOKENS, model.device, False):
        hidden = hidden_states(model, batch).float()
        segments = [batch.segments[number].rows for number in batch.answer_segment]
        rows = torch.tensor([row for own in segments for row in own])
        lengths = torch.tensor([len(own) for own in segments])
        answer = torch.arange(batch.answers).repeat_interleave(lengths)
        total = hidden.new_zeros(batch.answers, hidden.shape[1]).index_add(0, answer, hidden[rows])
        parts.append(torch.cat([hidden[batch.last_index], total / lengths[:, None]], 1))
    return torch.cat(parts)


def _example(model: LoadedModel, prompt: Text, answers: Sequence[str], index: int) -> Example:
    texts = [a if isinstance(prompt, str) else (Message("assistant", a),) for a in answers]
    head, ids = encode_answers(model.encoder, prompt, texts, [Sampled(True)] * len(texts))
    return with_answers(Example(head, index=index, where=f"prompt {index}"), ids)
