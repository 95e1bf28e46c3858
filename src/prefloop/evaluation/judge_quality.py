"""`prefloop evaluate judge`: a judge against people who have ranked the same answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefloop.config import JudgeQualityConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import is_endpoint
from prefloop.data.columns import HEADS
from prefloop.data.formats import parse_row
from prefloop.data.messages import decoded
from prefloop.errors import UserError
from prefloop.evaluation.verdicts import (
    Row,
    judge_of,
    preferences_of,
    ratings_of,
    row_of,
    scores_of,
)
from prefloop.files import check_writable, write_atomic
from prefloop.labelling.agreement import mean_by_prompt, pair_signs, ranks_of, share_by_prompt
from prefloop.labelling.export import is_store, store_rows
from prefloop.records import Prompt, Ranking, RowCounts, text_to_json, tools_of
from prefloop.rewards.llm import pairwise_judge, rubric_judge
from prefloop.tables import rows_of
from prefloop.terminal import shown

Signs = NDArray[np.float64]


NOT_OTHERS = ("prompt", "completions", "tiers", "raters", "judged", *HEADS)


class Rated(NamedTuple):
    """Answers with what each of several people said of them."""

    row: Row
    signs: Signs  # [raters, pairs]: 1 the first of two answers is better, -1 worse, 0 tied


class Measured(NamedTuple):
    """Of one pair of answers, each between 0 and 1; NaN where there is nothing to agree with."""

    judge: float  # agreement with one person, in the mean over them
    people: float  # of one person with another
    judge_majority: float  # agreement with the majority of all people but one
    people_majority: float  # that one person's


def run(config: JudgeQualityConfig) -> dict[str, Any]:
    """Agreement of judge and people, with intervals that resample prompts."""
    # 1. What people said.
    validate(config)
    if config.output is not None:
        check_writable(config.output)
    counts = RowCounts(bad_rows="error" if config.bad_rows == "error" else "list")
    rated = _read(config, counts)
    # 2. What the judge says.
    said, more = _verdicts(config, [one.row for one in rated])
    # 3. Both, pair by pair.
    measured, prompts, ties = [], [], []
    names: dict[str, int] = {}
    for one, signs in zip(rated, said, strict=True):
        asked = one.row.prompt.prompt
        name = json.dumps([text_to_json(asked), tools_of(asked)])
        for pair, sign in enumerate(signs):
            if np.isnan(sign):
                continue
            measured.append(measure(float(sign), one.signs[:, pair]))
            prompts.append(names.setdefault(name, len(names)))
            ties.append((float(sign == 0), float((one.signs[:, pair] == 0).mean())))
    if not measured:
        raise UserError(f"{config.judge}: no verdict on any pair; give another judge")
    table, groups = np.array(measured), np.array(prompts)
    whole = ~np.isnan(table[:, 2])
    result: dict[str, Any] = {
        "pairs": len(table),
        "prompts": len(names),
        "left_out": dict(counts.dropped),
        "agreement": _beside(table[:, :2], groups, config.seed),
        "pairs_with_majority": int(whole.sum()),
        "ties": dict(zip(("judge", "people"), np.mean(ties, axis=0).tolist(), strict=True)),
    }
    if whole.any():
        result["majority"] = _beside(table[whole, 2:], groups[whole], config.seed)
    result |= more
    if config.output is not None:
        write_atomic(config.output, json.dumps(result, indent=2) + "\n")
    return result


def measure(judge: float, people: Signs) -> Measured:
    """Agreement on one pair: 1 for the same verdict, 1/2 where one of two ties, 0 for opposites.

    judge: its sign; people: their signs [raters]. With a majority agree those that it exists for:
    the sum of the other people's signs is not 0.

    >>> measure(1.0, np.array([1.0, 1.0, 0.0]))
    Measured(judge=0.8333333333333334, people=0.6666666666666666, judge_majority=1.0, \
people_majority=0.8333333333333334)
    """
    with_people = 1 - np.abs(judge - people) / 2
    first, second = np.triu_indices(len(people), 1)
    among = 1 - np.abs(people[first] - people[second]) / 2
    others = np.sign(people.sum() - people)  # the majority but for each one
    strict = others != 0
    nothing = float("nan")
    return Measured(
        float(with_people.mean()),
        float(among.mean()),
        float(((1 + judge * others[strict]) / 2).mean()) if strict.any() else nothing,
        float(((1 + people[strict] * others[strict]) / 2).mean()) if strict.any() else nothing,
    )


def _beside(both: Signs, groups: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """The judge's and people's means [pairs, 2], and their difference on the same pairs."""
    shares = {"judge": both[:, 0], "people": both[:, 1]}
    difference = mean_by_prompt(both[:, 0] - both[:, 1], groups, seed)
    return {
        **{name: asdict(share_by_prompt(column, groups)) for name, column in shares.items()},
        "difference": asdict(difference),
    }


# --- the judge -----------------------------------------------------------------------------------


def _verdicts(
    config: JudgeQualityConfig, rows: Sequence[Row]
) -> tuple[list[Signs], dict[str, Any]]:
    """Signs of each row's pairs, NaN where an LLM gave no verdict; what an LLM adds to tell."""
    if not is_endpoint(config.judge):
        judge = judge_of(config, (row.prompt for row in rows))
        return [_signs(scores) for scores in scores_of(judge, rows)], {}
    more: dict[str, Any] = {}
    if config.judge_mode == "rubric":
        rubric = rubric_judge(config.judge, config)
        said = [_signs(scores) for scores in ratings_of(rubric, rows)]
        usage = rubric.endpoint.usage
    else:
        pairwise = pairwise_judge(config.judge, config)
        preferences = preferences_of(pairwise, rows)
        signs = [[np.nan if p is None else 2 * p.first - 1 for p in row] for row in preferences]
        said, usage = [np.array(row) for row in signs], pairwise.endpoint.usage
        agreed = [p.agreed for row in preferences for p in row if p is not None]
        more["order_agreement"] = sum(agreed) / len(agreed) if agreed else None
    missing = sum(int(np.isnan(signs).sum()) for signs in said)
    return said, more | {"pairs_without_verdict": missing, "judge_usage": asdict(usage)}


def _signs(scores: Sequence[float | None]) -> Signs:
    """Of each two answers, whether the first scores higher; NaN where one has no score."""
    known = np.array([np.nan if score is None else score for score in scores])
    first, second = np.triu_indices(len(known), 1)
    signs: Signs = np.sign(known[first] - known[second])
    return signs


# --- what people said ----------------------------------------------------------------------------


def _read(config: JudgeQualityConfig, counts: RowCounts) -> list[Rated]:
    """Answers that two people or more have ranked; rows of the same answers are put together."""
    store = is_store(config.data)
    rows = store_rows(config.data, counts) if store else rows_of(config.data, counts.bad_row)
    said: dict[str, list[Ranking]] = {}
    columns: dict[str, dict[str, Any]] = {}  # the others of the first row of each
    for where, row in rows:
        others = {k: row[k] for k in row if k not in NOT_OTHERS}
        try:
            rankings = list(_rankings(row, where, config.chat))
            row_of(_sampled(rankings[0], others))  # its answers can be judged
        except UserError as error:
            counts.bad_row(where, error)
            continue
        for ranking in rankings:
            texts = [text_to_json(text) for text in (ranking.prompt, *ranking.completions)]
            name = json.dumps([texts, tools_of(ranking.prompt)])
            said.setdefault(name, []).append(ranking)
            columns.setdefault(name, others)
    for where, problem in counts.bad:
        print(shown(f"left out: {where}: {problem}"), file=sys.stderr)
    rated = []
    for name, rankings in list(said.items())[: config.max_rows or None]:
        if len(rankings) < 2:
            counts.drop("ranked by one person alone")
            continue
        first = rankings[0]
        ranks = np.array([ranks_of(one.tiers, len(first.completions)) for one in rankings])
        asked_of = row_of(_sampled(first, columns[name]))
        rated.append(Rated(asked_of, pair_signs(ranks).astype(np.float64)))
    if not rated:
        raise UserError(
            f"{config.data}: nothing that two people have ranked; give rows of `prompt`, "
            "`completions` and `raters`, or one row a person"
        )
    return rated


def _rankings(row: dict[str, Any], where: str, chat: bool) -> Iterator[Ranking]:
    """What each person said in a row."""
    for tiers in _raters(row, where):
        parsed = parse_row({**row, "tiers": tiers}, where, "preference", chat)
        yield from (item for item in parsed if isinstance(item, Ranking))


def _sampled(ranking: Ranking, others: dict[str, Any]) -> Prompt:
    """A ranking's prompt with its answers, as `sample` gives them, and the row's other columns."""
    answers = {"completions": [text_to_json(text) for text in ranking.completions]}
    return Prompt(ranking.prompt, ranking.where, others | answers)


def _raters(row: dict[str, Any], where: str) -> Iterator[Any]:
    """Each person's tiers: of `raters` (a list of tiers), of `judged` (labeller and tiers), or the
    row's own `tiers`.
    """
    raters: Any = decoded(row.get("raters"), "raters", where)
    judged: Any = decoded(row.get("judged"), "judged", where)
    if raters is None and judged is not None:
        right = isinstance(judged, list) and all(isinstance(one, dict) for one in judged)
        raters = [one.get("tiers") for one in judged] if right else judged
    if raters is None and row.get("tiers") is not None:
        raters = [row["tiers"]]
    if not isinstance(raters, list) or not raters:
        raise UserError(
            f"{where}: says of nobody how the answers rank; give `raters`, a list of each person's "
            "tiers, or `judged`, a list of {labeller, tiers}, or `tiers`"
        )
    yield from raters
