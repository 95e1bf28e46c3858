"""How many judgements a reward model needs: `python -m benchmarks labels`.

Three sets that people judged (labels_sets), five ways to spend their judgements, sizes doubling to
all, five seeds. The model's body is frozen: a reward model is a linear head on what SmolLM2-135M
makes of an answer, fitted by the package's own losses. Parts that are done are kept in
build/labels, and the command, given again, goes on. Draws docs/images/fewer-labels.svg.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import labels_report
from benchmarks.labels_report import ACTIVE, MAJORITY, RANKINGS, WAYS, WEIGHTS
from benchmarks.labels_sets import (
    FOLDS,
    Floats,
    Ints,
    Judged,
    LabelSet,
    Ordered,
    load_set,
    ordered,
    signs,
)
from prefloop import provenance
from prefloop.files import write_atomic
from prefloop.labelling.agreement import one_coin
from prefloop.labelling.imports import uncertainty_and_gap
from prefloop.losses.masked import Total
from prefloop.losses.reward import bradley_terry_loss, plackett_luce_loss

FOLDER = Path("build/labels")
PICTURE = Path("docs/images/fewer-labels.svg")
SEEDS = range(5)
PENALTY_SEED = 99
FIRST = 16  # judgements of the smallest size
MODELS = 4  # heads whose spread chooses
RANDOM_SHARE = 0.2  # of what is handed out, as the labelling store has it at least
EACH = 3  # labellers of a pair where several judge it
LOSSES = ("rankings", "pairs", "every pair")
STEPS = 100  # of L-BFGS at most
PENALTIES = (10.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
Said = tuple[tuple[int, ...], Ints]
"""Items and their ranks [K]: what is learned from."""
Bought = tuple[int, list[Said]]
"""Judgements that were made, and what they say."""


@dataclass(frozen=True)
class Point:
    """A head's cost, by COUNTS, and its accuracy on each held-out prompt."""

    cost: tuple[float, float, float]
    accuracy: Mapping[int, float]


# --- the reward model ----------------------------------------------------------------------------


def fit(
    features: Tensor, said: Sequence[Said], loss: str, penalty: float, around: Tensor | None = None
) -> Tensor:
    """The head w [D] of scores x w: least of the loss over all that was said + penalty/2 |w - c|^2,
    c being `around`, or 0.

    "rankings" is Plackett-Luce's loss, "pairs" Bradley-Terry's, whose mean over a ranking's pairs
    counts as one; "every pair" sums them.
    """
    width = max((len(items) for items, _ in said), default=0)
    index = torch.zeros(len(said), width, dtype=torch.long)
    tiers = torch.full((len(said), width), -1)
    for row, (items, ranks) in enumerate(said):
        index[row, : len(items)] = torch.tensor(items)
        tiers[row, : len(items)] = torch.from_numpy(ranks)
    known, places = index.unique(return_inverse=True)
    seen = features[known]
    centre = torch.zeros(features.shape[1]) if around is None else around
    head = centre.clone().requires_grad_()
    solver = torch.optim.LBFGS([head], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        scores = (seen @ head)[places]
        value: Tensor = (
            _loss(loss, scores, tiers).sum + penalty / 2 * (head - centre).square().sum()
        )
        value.backward()
        return value

    if said:
        solver.step(closure)
    return head.detach()


def _loss(name: str, scores: Tensor, tiers: Tensor) -> Total:
    if name == "rankings":
        return plackett_luce_loss(scores, tiers)
    return bradley_terry_loss(scores, tiers, normalize="prompt" if name == "pairs" else "pair")


def accuracy(scores: Floats, held_out: Mapping[int, Ordered]) -> dict[int, float]:
    """By prompt, the share of its pairs that the scores order right; equal ones half."""
    found = {}
    for prompt, pairs in held_out.items():
        ahead = np.array([scores[better] - scores[worse] for better, worse in pairs])
        found[prompt] = float(((1 + np.sign(ahead)) / 2).mean())
    return found


def best_penalty(of: LabelSet, loss: str, said: Sequence[Said]) -> float:
    """The penalty of the highest accuracy on a fifth of the prompts, learned from the others; of
    films on each fifth in turn, for few of their pairs have both sentences in one.
    """
    every = sorted({of.prompts[item] for items, _ in said for item in items})
    order = np.random.default_rng(0).permutation(every)
    fifths = np.array_split(order, 5) if of.name == "films" else [order[: len(every) // 5]]
    found = dict.fromkeys(PENALTIES, 0.0)
    for kept in (set(fifth.tolist()) for fifth in fifths):
        inside = [[of.prompts[item] in kept for item in items] for items, _ in said]
        rest = [one for one, within in zip(said, inside, strict=True) if not any(within)]
        truth = {}
        for n, ((items, ranks), within) in enumerate(zip(said, inside, strict=True)):
            own = [item for item, here in zip(items, within, strict=True) if here]
            if pairs := ordered(own, ranks[np.array(within)]):
                truth[n] = pairs
        for penalty in PENALTIES:
            head = fit(of.features, rest, loss, penalty)
            right = accuracy((of.features @ head).numpy(), truth)
            found[penalty] += sum(right.values())
    return max(found, key=lambda penalty: found[penalty])


# --- ways to spend judgements --------------------------------------------------------------------


def sizes(whole: int) -> list[int]:
    """FIRST, doubled as long as it is less, and the whole.

    >>> sizes(100)
    [16, 32, 64, 100]
    """
    found = [FIRST]
    while 2 * found[-1] < whole:
        found.append(2 * found[-1])
    return [*found, whole] if whole > FIRST else [whole]


def one_each(tasks: Sequence[Judged], draw: np.random.Generator) -> Iterator[Bought]:
    """Tasks in a random order, each judged by one labeller, who is drawn."""
    order = draw.permutation(len(tasks))
    said = [_by_one(tasks[n], draw) for n in order]
    for size in sizes(len(tasks)):
        yield size, said[:size]


def _by_one(task: Judged, draw: np.random.Generator) -> Said:
    items, ranks = task
    return items, ranks[draw.integers(len(ranks))]


def by_spread(of: LabelSet, draw: np.random.Generator, penalty: float) -> Iterator[Bought]:
    """As `prefloop label score` has it: of the pairs that are left, those on which heads differ
    most, and a random share. The heads learn from what has been said so far.
    """
    left = draw.permutation(len(of.pairs)).tolist()
    said: list[Said] = []
    for size in sizes(len(of.pairs)):
        wanted = size - len(said)
        if said:
            heads = [_another(of, said, draw, penalty) for _ in range(MODELS)]
            scores = torch.stack([of.features @ head for head in heads]).tolist()
            spread = {
                n: uncertainty_and_gap([[own[item] for item in of.pairs[n][0]] for own in scores])[
                    0
                ]
                for n in left
            }
            chosen = sorted(left, key=lambda n: -spread[n])[: round((1 - RANDOM_SHARE) * wanted)]
            rest = set(left) - set(chosen)
            left = chosen + [n for n in left if n in rest]
        said += [_by_one(of.pairs[n], draw) for n in left[:wanted]]
        left = left[wanted:]
        yield size, list(said)


def _another(
    of: LabelSet, said: Sequence[Said], draw: np.random.Generator, penalty: float
) -> Tensor:
    """A head from a resample of what was said, held near a draw of its own, so that heads differ
    where nothing was said (randomised prior functions: Osband et al., 2018).
    """
    drawn = draw.integers(len(said), size=len(said))
    start = draw.normal(0.0, penalty**-0.5, of.features.shape[1]).astype(np.float32)
    resampled = [said[n] for n in drawn]
    return fit(of.features, resampled, "pairs", penalty, torch.from_numpy(start))


def by_several(of: LabelSet, draw: np.random.Generator, weighed: bool) -> Iterator[Bought]:
    """Random pairs, each judged by EACH labellers: the majority, or with a labeller's weight
    log(2p/(1 - p)), p the accuracy by one-coin Dawid-Skene, as `label export` has it.
    """
    order = draw.permutation(len(of.pairs))
    votes = []  # of each pair: labellers and what they say, 1 where the first is better
    for n in order:
        who = draw.permutation(of.labellers)[:EACH]
        votes.append((who, signs(of.pairs[n][1][who])))
    for size in sizes(EACH * len(order)):
        count = size // EACH
        weight = _weights(votes[:count], of.labellers) if weighed else np.ones(of.labellers)
        said = []
        for n, (who, says) in zip(order[:count], votes[:count], strict=True):
            sign = int(np.sign(round(float(weight[who] @ says), 9)))
            ranks = {1: (0, 1), 0: (0, 0), -1: (1, 0)}[sign]
            said.append((of.pairs[n][0], np.array(ranks)))
        yield EACH * count, said


def _weights(votes: Sequence[tuple[Ints, Ints]], labellers: int) -> Floats:
    items = np.repeat(np.arange(len(votes)), [len(who) for who, _ in votes])
    who, says = (np.concatenate(of) for of in zip(*votes, strict=True))
    found = one_coin(items, who, says + 1, classes=3).accuracy
    whole = np.full(labellers, 1 / 3)  # nothing known: of no weight
    whole[: len(found)] = found
    weight: Floats = np.log(2 * whole / (1 - whole))
    return weight


def cost(said: Sequence[Said], judgements: int) -> tuple[float, float, float]:
    """By COUNTS: K - 1 comparisons of K answers at least, and those of sorting them by binary
    insertion, sum over k = 2..K of ceil(log2 k). A judgement of a pair is one of each.
    """
    if all(len(items) == 2 for items, _ in said):
        return (float(judgements),) * 3
    sizes_of = [len(items) for items, _ in said]
    least = sum(size - 1 for size in sizes_of)
    sorting = sum(ceil(log2(k)) for size in sizes_of for k in range(2, size + 1))
    return float(judgements), float(least), float(sorting)


def curve(of: LabelSet, way: str, seed: int, penalties: Mapping[str, float]) -> list[Point]:
    """A way's points, from the smallest size to all."""
    draw = np.random.default_rng([seed, WAYS.index(way)])
    loss = "rankings" if way == RANKINGS else "pairs"
    if way == ACTIVE:
        bought = by_spread(of, draw, penalties[loss])
    elif way in (MAJORITY, WEIGHTS):
        bought = by_several(of, draw, way == WEIGHTS)
    else:
        bought = one_each(of.rankings if way == RANKINGS else of.pairs, draw)
    points = []
    for judgements, said in bought:
        head = fit(of.features, said, loss, penalties[loss])
        right = accuracy((of.features @ head).numpy(), of.held_out)
        points.append(Point(cost(said, judgements), right))
    return points


# --- parts, each kept ----------------------------------------------------------------------------


def penalties_of(name: str, folder: Path) -> dict[str, float]:
    """Each loss's best penalty, chosen once a set, by a seed of its own and in training rows."""
    path = folder / f"{name}-penalties.json"
    if not path.exists():
        of, draw = load_set(name, PENALTY_SEED, 0), np.random.default_rng(PENALTY_SEED)
        pairs = [_by_one(task, draw) for task in of.pairs]
        rankings = [_by_one(task, draw) for task in of.rankings]
        said = {loss: pairs if loss == "pairs" else rankings for loss in LOSSES}
        chosen = {loss: best_penalty(of, loss, said[loss]) for loss in LOSSES}
        chosen["pairs of rankings"] = best_penalty(of, "pairs", rankings)
        write_atomic(path, json.dumps(chosen) + "\n")
    loaded: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def part(name: str, seed: int, fold: int, folder: Path = FOLDER) -> dict[str, Any]:
    """The curves of a set and fold; of all rankings, each loss; beside people, what they agree."""
    path = folder / f"{name}-{seed}-{fold}.json"
    if not path.exists():
        penalties, before = penalties_of(name, folder), provenance.cpu_seconds()
        of = load_set(name, seed, fold)
        ways = [w for w in WAYS if w not in (MAJORITY, WEIGHTS) or of.labellers >= EACH]
        found: dict[str, Any] = {"penalties": penalties, "revision": provenance.revision()}
        found["curves"] = {
            way: [asdict(point) for point in curve(of, way, seed, penalties)] for way in ways
        }
        draw = np.random.default_rng([seed, len(WAYS)])
        said = [_by_one(task, draw) for task in of.rankings]
        found["losses"] = {
            loss: whole(of, loss, said, penalties["pairs of rankings" if loss == "pairs" else loss])
            for loss in LOSSES
        }
        if of.panel:
            found["people"] = beside_people(of, seed, penalties["pairs"])
        found["cpu_seconds"] = round(provenance.cpu_seconds() - before, 1)
        write_atomic(path, json.dumps(found) + "\n")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def whole(of: LabelSet, loss: str, said: Sequence[Said], penalty: float) -> dict[str, Any]:
    """A loss on the same rankings: accuracy, and the cost of one fit."""
    before = provenance.cpu_seconds()
    head = fit(of.features, said, loss, penalty)
    seconds = provenance.cpu_seconds() - before
    right = accuracy((of.features @ head).numpy(), of.held_out)
    return {"accuracy": right, "cpu_seconds": seconds}


def beside_people(of: LabelSet, seed: int, penalty: float) -> dict[str, dict[int, float]]:
    """By held-out prompt: how often the model, and how often another person, orders a pair as one
    person does who prefers one of it; who prefers none is right by half.
    """
    bought = list(by_several(of, np.random.default_rng([seed, WAYS.index(MAJORITY)]), False))
    head = fit(of.features, bought[-1][1], "pairs", penalty)
    scores = (of.features @ head).numpy()
    model, person = {}, {}
    for prompt, pairs in of.panel.items():
        by_model, by_person = [], []
        for (a, b), ranks in pairs:
            said, ahead = signs(ranks), np.sign(scores[a] - scores[b])
            for n, own in enumerate(said):
                if own:
                    by_model.append((1 + own * ahead) / 2)
                    by_person += [(1 + own * other) / 2 for other in np.delete(said, n)]
        if by_model:
            model[prompt], person[prompt] = float(np.mean(by_model)), float(np.mean(by_person))
    return {"model": model, "person": person}


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All parts, printed, drawn and returned; the heads are float32 whatever `dtype` says."""
    torch.set_num_threads(threads)
    found = {}
    for name, folds in FOLDS.items():
        parts = []
        for seed, fold in product(SEEDS, range(folds)):
            parts.append((seed, part(name, seed, fold)))
            print(f"{name}, seed {seed}, part {fold + 1} of {folds}", flush=True)
        found[name] = labels_report.summary(parts)
    print(*labels_report.tables(found), sep="\n")
    labels_report.draw(found, PICTURE)
    return {"labels": found}
