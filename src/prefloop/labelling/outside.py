"""Argilla's and Label Studio's exports -> rows of `prompt`, `completions` and `judged`.

`judged` lists {labeller, tiers}. Argilla: ranking questions, of version 1 and 2, nested or flat as
`datasets` holds them. Label Studio: Pairwise, and Ranker without buckets, of the JSON export.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.errors import UserError
from prefloop.records import RowCounts
from prefloop.tables import rows_of

Row = Mapping[str, Any]
PROMPT_NAMES = ("prompt", "instruction", "question", "query", "text")
GIVEN_UP = ("discarded", "draft")  # of Argilla: nothing was decided


def read_outside(source: str, counts: RowCounts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:row`, row) of any file that `label import` takes, in prefloop's columns."""
    for where, row in _rows(source):
        if isinstance(row.get("data"), dict) and "annotations" in row:
            yield where, _label_studio(row, where, counts)
        elif isinstance(row.get("fields"), dict) and "responses" in row:
            yield where, _argilla(row["fields"], _argilla_answers(row), where, counts)
        elif any(name.endswith(".responses") for name in row):
            fields = {k: v for k, v in row.items() if "." not in k and isinstance(v, str)}
            yield where, _argilla(fields, _argilla_flat(row), where, counts)
        else:
            yield where, row


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not source.endswith(".json"):
        yield from rows_of(source)
        return
    try:
        listed = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{source}: malformed JSON ({error}); export it again") from error
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise UserError(f"{source}: a JSON export must be a list of objects; use .jsonl for rows")
    for number, row in enumerate(listed, 1):
        yield f"{source}:{number}", row


def tiers_of_ranks(ranks: Sequence[float]) -> list[list[int]]:
    """Tiers from a rank for each answer, lowest first; equal ranks tie.

    >>> tiers_of_ranks([2, 1, 2, 5])
    [[1], [0, 2], [3]]
    """
    return [[i for i, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))]


# --- Argilla -------------------------------------------------------------------------------------


def _argilla_answers(row: Row) -> list[tuple[str, str, Any]]:
    """(labeller, status, value) of each response to each question."""
    responses = row["responses"] or []
    if isinstance(responses, dict):
        return [
            (str(said.get("user_id")), str(said.get("status") or "submitted"), said.get("value"))
            for question in responses.values()
            for said in question
        ]
    return [
        (str(said.get("user_id")), str(said.get("status") or "submitted"), answer.get("value"))
        for said in responses
        for answer in (said.get("values") or {}).values()
    ]


def _argilla_flat(row: Row) -> list[tuple[str, str, Any]]:
    verdicts: list[tuple[str, str, Any]] = []
    for name in row:
        if name.endswith(".responses"):
            values = row[name] or []
            users = row.get(f"{name}.users") or [None] * len(values)
            states = row.get(f"{name}.status") or ["submitted"] * len(values)
            verdicts += [(str(u), str(s), v) for u, s, v in zip(users, states, values, strict=True)]
    return verdicts


def _argilla(
    fields: Row, answers: Sequence[tuple[str, str, Any]], where: str, counts: RowCounts
) -> dict[str, Any]:
    rankings: list[tuple[str, dict[str, float]]] = []
    for labeller, status, value in answers:
        if status in GIVEN_UP:
            counts.drop(f"{status} response")
        elif (ranks := _argilla_ranks(value)) is not None:
            rankings.append((labeller, ranks))
    names = sorted({name for _, ranks in rankings for name in ranks}) or [
        name for name in fields if name not in PROMPT_NAMES
    ]
    missing = [name for name in names if not isinstance(fields.get(name), str)]
    if missing or len(names) < 2:
        raise UserError(
            f"{where}: the ranking question's values {', '.join(names) or '(none)'} must be the "
            f"names of at least two text fields ({', '.join(fields)}); rename the fields"
        )
    partial = [labeller for labeller, ranks in rankings if ranks.keys() != set(names)]
    if partial:
        raise UserError(f"{where}: {partial[0]} ranked some answers only; remove that response")
    judged = [
        {"labeller": labeller, "tiers": tiers_of_ranks([ranks[name] for name in names])}
        for labeller, ranks in rankings
    ]
    completions = [fields[name] for name in names]
    prompt = _prompt(fields, names, where)
    return {"prompt": prompt, "completions": completions, "judged": judged}


def _argilla_ranks(value: Any) -> dict[str, float] | None:
    """Rank by name; None where the value is not a ranking."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return {name: float(rank) for rank, name in enumerate(value)}
    if all(isinstance(item, dict) and {"value", "rank"} <= item.keys() for item in value):
        return {str(item["value"]): float(item["rank"]) for item in value}
    return None


# --- Label Studio --------------------------------------------------------------------------------


def _label_studio(row: Row, where: str, counts: RowCounts) -> dict[str, Any]:
    data = row["data"]
    listed = next((v for v in data.values() if isinstance(v, list) and v), None)
    if listed is None:
        names = [k for k, v in data.items() if isinstance(v, str) and k not in PROMPT_NAMES]
        if len(names) != 2:
            raise UserError(
                f"{where}: `data` has the texts {', '.join(names) or '(none)'} beside the prompt; "
                "a pair needs two"
            )
        ids, completions = ["left", "right"], [data[name] for name in names]
    else:
        names = []
        ids = [str(item.get("id")) for item in listed]
        completions = [item.get("body") or item.get("html") or item.get("title") for item in listed]
    judged = []
    for said in row["annotations"]:
        ranks = [r for item in said.get("result", []) if (r := _studio_ranks(item, ids, where))]
        if said.get("was_cancelled") or not ranks:
            counts.drop("annotation without a decision")
            continue
        by = said.get("completed_by")
        name = by.get("email") if isinstance(by, dict) else by
        judged.append({"labeller": str(name), "tiers": tiers_of_ranks(ranks[0])})
    prompt = _prompt(data, names, where)
    return {"prompt": prompt, "completions": completions, "judged": judged}


def _studio_ranks(item: Row, ids: Sequence[str], where: str) -> list[float] | None:
    """A rank for each answer from one result; None where it is of another kind."""
    value = item.get("value", {})
    if item.get("type") == "pairwise" and value.get("selected") in ids:
        return [0.0 if name == value["selected"] else 1.0 for name in ids]
    if item.get("type") != "ranker":
        return None
    order = value.get("ranker")
    if isinstance(order, dict) and len(order) == 1:
        order = next(iter(order.values()))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(ids):
        raise UserError(
            f"{where}: a Ranker with buckets, or of some items only, gives no order of all "
            "answers; export a Ranker without buckets"
        )
    return [float([str(x) for x in order].index(name)) for name in ids]


def _prompt(fields: Row, answers: Sequence[str], where: str) -> str:
    rest = [k for k, v in fields.items() if isinstance(v, str) and k not in answers]
    named = [name for name in PROMPT_NAMES if name in rest] or rest[:1]
    if not named:
        raise UserError(f"{where}: no text beside the answers; name the prompt's field `prompt`")
    return str(fields[named[0]])
