"""`prefloop label import`: prompts with answers into the store, ranked or not, or without any."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from prefloop.config.labelling import LabelImportConfig
from prefloop.data.columns import HEADS, answered, carried
from prefloop.data.formats import parse_row
from prefloop.data.messages import decoded
from prefloop.errors import UserError
from prefloop.labelling.compared import compared_rows, is_compared
from prefloop.labelling.export import is_store, project_id_of, split_address, store_rows
from prefloop.labelling.outside import read_outside
from prefloop.labelling.store import Store, Transaction, key_of
from prefloop.labelling.store.projects import put_project
from prefloop.labelling.store.reading import unanswered_of
from prefloop.labelling.store.settling import put_finished
from prefloop.records import Prompt, Ranking, RowCounts, Sampled, text_to_json

MOST_ANSWERS = 9
"""Answers of a task: they are ranked with the keys 1 to 9."""
LISTS = ("completions", "tiers", "judged", "scores", "log_probs")
"""Columns that a CSV cell holds as JSON text."""


@dataclass(frozen=True)
class Item:
    """One row: a prompt's answers with what is known of their making, and who ranked them how."""

    ranking: Ranking  # its tiers mean nothing where `judged` is empty
    judged: Sequence[tuple[str, Sequence[Sequence[int]]]]  # labeller, tiers
    row: Mapping[str, Any]


def run(config: LabelImportConfig, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Import a file into a project, made or changed as the settings say, all of it or nothing.

    `kept` are settings that the project keeps instead. Rows with a prompt alone wait in the project
    until `prefloop sample` answers them.
    """
    # 1. Read and check every row.
    counts = RowCounts()
    items: list[Item] = []
    waiting: list[Prompt] = []
    for where, row in _rows(config, counts):
        if answered(row) or row.get("prompt") is None:
            items.append(_item(row, where, config))
        elif _kind(config) != "real":
            raise UserError(
                f"{where}: a {_kind(config)} row needs `completions` and `tiers`; add them"
            )
        else:
            carried(row, where)
            waiting += [p for p in parse_row(row, where, "prompt") if isinstance(p, Prompt)]
    if not items and not waiting:
        why = f"nothing to rank: {counts.summary()}" if counts.dropped else "it holds no rows"
        raise UserError(f"{config.data}: {why}")
    guidelines = _guidelines(config.guidelines)
    # 2. Write.
    with closing(Store(config.store)) as store, store.write() as t:
        settings = kept or _settings(config)
        seen = [_labeller_id(t, name) for name in config.members]
        named = (config.project, config.mode, guidelines, settings)
        project_id, changes = put_project(t, *named, seen)
        made = sum(_put(t, project_id, item, config, counts) for item in items)
        for prompt in waiting:
            t.put_prompt(project_id, text_to_json(prompt.prompt), prompt.extra)
        summary = {"tasks": made, "prompts": len(waiting), "dropped": counts.dropped}
        summary |= {"changed": changes} if changes else {}
        t.log("import", None, project=config.project, data=config.data, **summary)
    return {"project": config.project, "rows": len(items) + len(waiting), **summary}


def _rows(config: LabelImportConfig, counts: RowCounts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of whatever --data names."""
    if is_compared(config.data):
        return compared_rows(config.data, config.samples, counts)
    if config.samples != 1:
        raise UserError(
            f"--samples {config.samples}: {config.data} is no folder of prefloop compare, whose "
            "answers it counts; leave it out"
        )
    return (store_rows if is_store(config.data) else read_outside)(config.data, counts)


def unanswered(address: str) -> list[Prompt]:
    """The prompts of `STORE#PROJECT` that have no answer yet; UserError where all have some."""
    place, name = split_address(address)
    with closing(Store(place, must_exist=True)) as store, store.read() as t:
        waiting = unanswered_of(t, project_id_of(t, name))
    if not waiting:
        raise UserError(f"{address}: no prompt waits for answers; import prompts alone, first")
    records = []
    for number, (prompt, extra) in enumerate(waiting, 1):
        parsed = parse_row({"prompt": prompt, **extra}, f"{address}: prompt {number}", "prompt")
        records += [record for record in parsed if isinstance(record, Prompt)]
    return records


def check_store(address: str) -> None:
    """UserError where `STORE#PROJECT` cannot be written: before hours of sampling, not after."""
    Store(split_address(address)[0]).close()


def add_samples(address: str, path: Path) -> dict[str, Any]:
    """Put what `prefloop sample` wrote into `STORE#PROJECT`, whose settings stay as they are."""
    place, name = split_address(address)
    with closing(Store(place)) as store, store.read() as t:
        project = t.project(name)
    if project is None:
        return run(LabelImportConfig(store=place, project=name, data=str(path)))
    # Whatever the strategy, what was just sampled has no scores yet.
    settings = {"mode": project["mode"], **project["settings"], "strategy": "random"}
    config = LabelImportConfig(store=place, project=name, data=str(path), **settings)
    return run(config, project["settings"])


def _kind(config: LabelImportConfig) -> str:
    """Of the tasks that the rows make."""
    return "gold" if config.gold else "practice" if config.practice else "real"


def _settings(config: LabelImportConfig) -> dict[str, object]:
    """What hand-out goes by."""
    return {
        "need": config.need,
        "overlap": config.overlap,
        "overlap_need": config.overlap_need,
        "gold_share": config.gold_share,
        "repeat_share": config.repeat_share,
        "strategy": config.strategy,
        "random_share": config.random_share,
        "lease_minutes": config.lease_minutes,
        "seed": config.seed,
    }


def _guidelines(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--guidelines {path}: cannot be read ({error}); give a text file"
        ) from error


def _item(row: Mapping[str, Any], where: str, config: LabelImportConfig) -> Item:
    """A row with its answers, checked."""
    row = {k: decoded(v, k, where) if k in LISTS else v for k, v in row.items()}
    carried(row, where)
    if row.get("completions") is not None and row.get("prompt") is not None:
        listed = row["completions"]
        count = len(listed) if isinstance(listed, list) else 0
        tiers = row.get("tiers")
        given = tiers if tiers is not None else [list(range(count))]
        parsed = parse_row({**row, "tiers": given}, where, "preference")
    else:
        parsed, tiers = parse_row(row, where, "preference"), [[0], [1]]
    ranking = parsed[0]
    if not isinstance(ranking, Ranking):
        raise UserError(f"{where}: {ranking}; remove the row")
    _check_types(row, where)
    judged = [(str(said["labeller"]), said["tiers"]) for said in row.get("judged") or ()]
    if tiers is not None:
        judged.append((str(row.get("labeller") or config.labeller), ranking.tiers))
    if _kind(config) != "real" and len(judged) != 1:
        raise UserError(f"{where}: a {_kind(config)} row needs `tiers`, once; add them")
    reason = row.get("reason")
    if config.practice and not (isinstance(reason, str) and reason.strip()):
        raise UserError(f"{where}: a practice row needs `reason`, why its order is right; add it")
    count = len(ranking.completions)
    if not 2 <= count <= MOST_ANSWERS:
        raise UserError(f"{where}: {count} answers; labellers rank 2 to {MOST_ANSWERS}")
    said = row.get("log_probs")
    if said is not None and (not isinstance(said, list) or len(said) != count):
        raise UserError(f"{where}: `log_probs` must hold one number for each of {count} answers")
    _scores(row, count, where, config.strategy)
    return Item(ranking, judged, {**row, "where": where})


def _check_types(row: Mapping[str, Any], where: str) -> None:
    """What is known of the answers beside their text is of the type that the store holds."""
    judged = row.get("judged") or ()
    if not isinstance(judged, list | tuple) or not all(
        isinstance(said, dict) and said.keys() >= {"labeller", "tiers"} for said in judged
    ):
        raise UserError(f"{where}: `judged` must be a list of {{labeller, tiers}}; mend it")
    for name in ("priority", "seed"):
        value = row.get(name)
        number = str(value).strip().removeprefix("-")  # a CSV cell is text
        if value is not None and not (number.isdecimal() and len(number) < 10):
            raise UserError(f"{where}: `{name}` is {value!r}; it must be a whole number")
    for name, most in (("model", 1000), ("weights", 64)):
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= most):
            raise UserError(f"{where}: `{name}` must be a text of at most {most} characters")
    listed = row.get("log_probs")
    for value in listed if isinstance(listed, list) else ():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}: `log_probs` holds {value!r}; it must hold numbers")


def _scores(row: Mapping[str, Any], count: int, where: str, strategy: str) -> list[list[float]]:
    """One list of scores a reward model, each with a finite number an answer."""
    given = row.get("scores")
    if given is None:
        if strategy != "random":
            raise UserError(
                f"{where}: --strategy {strategy} needs `scores` of reward models; add them, or "
                "import with --strategy random and then run prefloop label score"
            )
        return []
    models = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    for scores in models:
        right = isinstance(scores, list) and len(scores) == count
        if not right or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
            raise UserError(
                f"{where}: `scores` must hold {count} numbers, or such a list a reward model"
            )
    if strategy == "uncertainty" and len(models) < 2:
        raise UserError(f"{where}: --strategy uncertainty needs `scores` of two reward models")
    return [[float(s) for s in scores] for scores in models]


def uncertainty_and_gap(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How much reward models disagree on a task, and the largest difference that they predict.

    Uncertainty: over pairs of answers, the mean of the standard deviation over models of the
    difference of their scores. Gap: highest minus lowest mean score.

    >>> uncertainty_and_gap([[0.0, 2.0], [0.0, 4.0]])
    (1.0, 3.0)
    """
    if not scores:
        return 0.0, 0.0
    means = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
    spreads = []
    for a, b in combinations(range(len(means)), 2):
        differences = [model[a] - model[b] for model in scores]
        mean = sum(differences) / len(differences)
        spreads.append(math.sqrt(sum((d - mean) ** 2 for d in differences) / len(differences)))
    return sum(spreads) / len(spreads), max(means) - min(means)


def _put(
    t: Transaction, project_id: int, item: Item, config: LabelImportConfig, counts: RowCounts
) -> int:
    """Write a row's prompt, answers and tasks; how many tasks are new."""
    ranking, row = item.ranking, item.row
    completions = [text_to_json(completion) for completion in ranking.completions]
    kept = _distinct(completions) if not item.judged else list(range(len(completions)))
    if len(kept) < len(completions):
        counts.drop("answer equal to another one")
    if len(kept) < 2:
        counts.drop("row whose answers are all equal")
        return 0
    extra = {k: v for k, v in carried(row, row["where"]).items() if k not in ("prompt", "where")}
    extra = {k: v for k, v in extra.items() if k not in HEADS}  # they stand in the prompt
    prompt = text_to_json(ranking.prompt)
    # In pairwise mode every pair of answers is a task of its own.
    groups = list(combinations(kept, 2)) if config.mode == "pairwise" else [tuple(kept)]
    prompt_id, made = 0, 0
    ids: dict[int, int] = {}
    for group in groups:
        kind = _kind(config)
        key = key_of(kind, prompt, [completions[i] for i in group])
        judged = [(name, _restricted(tiers, group)) for name, tiers in item.judged]
        known = t.task_by_key(project_id, key)
        if known is None:
            prompt_id = prompt_id or t.put_prompt(project_id, prompt, extra)
            ids = ids or _put_responses(t, prompt_id, completions, ranking, row)
            values = _task_values(config, row, group, key, prompt, judged)
            mine = {"project_id": project_id, "prompt_id": prompt_id, "kind": kind, "key": key}
            task_id = t.put_task(**mine, **values, response_ids=[ids[i] for i in group])
            made += 1
        else:
            task_id = known["id"]
        added = kind == "real" and sum(_put_judged(t, task_id, *said) for said in judged)
        if known is not None and not added:
            counts.drop("task that is there already")
    return made


def _whole(row: Mapping[str, Any], name: str) -> int | None:
    return None if row.get(name) is None else int(row[name])


def _distinct(values: Sequence[object]) -> list[int]:
    return [i for i, value in enumerate(values) if value not in values[:i]]


def _restricted(tiers: Sequence[Sequence[int]], group: Sequence[int]) -> list[list[int]]:
    """The order of some of the answers, by their places in `group`."""
    renumbered = [[group.index(i) for i in tier if i in group] for tier in tiers]
    return [tier for tier in renumbered if tier]


def _put_responses(
    t: Transaction,
    prompt_id: int,
    completions: Sequence[object],
    ranking: Ranking,
    row: Mapping[str, Any],
) -> dict[int, int]:
    snapshot = row.get("model") and t.put_snapshot(row["model"], row.get("weights") or "")
    count = len(completions)
    sampled: Sequence[Sampled | None] = ranking.sampled or [None] * count
    log_probs = row.get("log_probs") or [None] * count
    scores = _scores(row, count, row["where"], "random")
    same = {"snapshot_id": snapshot, "sampling": row.get("sampling"), "seed": _whole(row, "seed")}
    return {
        i: t.put_response(
            prompt_id,
            completion,
            **same,
            finish_reason=one and one.finish_reason,
            token_ids=list(one.ids) if one and one.ids else None,
            tokenizer=one.tokenizer if one and one.ids else None,
            log_prob=log_probs[i],
            scores=[model[i] for model in scores] or None,
        )
        for i, (completion, one) in enumerate(zip(completions, sampled, strict=True))
    }


def _task_values(
    config: LabelImportConfig,
    row: Mapping[str, Any],
    group: Sequence[int],
    key: str,
    prompt: object,
    judged: Sequence[tuple[str, Sequence[Sequence[int]]]],
) -> dict[str, Any]:
    overlaps = Random(f"overlap:{config.seed}:{key_of(prompt)}").random() < config.overlap
    need = config.overlap_need if overlaps else config.need
    scores = _scores(row, len(row.get("completions") or "ab"), row["where"], "random")
    uncertainty, gap = uncertainty_and_gap([[model[i] for i in group] for model in scores])
    return {
        "need": max(need, len(judged)) if _kind(config) == "real" else None,
        "priority": _whole(row, "priority") or 0,
        "draw": Random(f"draw:{config.seed}:{key}").random(),
        "uncertainty": uncertainty,
        "gap": gap,
        "gold_tiers": None if _kind(config) == "real" else judged[0][1],
        "reason": row["reason"] if config.practice else None,
    }


def _put_judged(
    t: Transaction, task_id: int, labeller: str, tiers: Sequence[Sequence[int]]
) -> bool:
    """An annotation made elsewhere; False where this labeller has one of the task already."""
    return put_finished(t, task_id, _labeller_id(t, labeller), "import", tiers)


def _labeller_id(t: Transaction, name: str) -> int:
    """A labeller by name; a new one has no link, until `label add-user` makes one."""
    known = t.labeller_named(name)
    if known is not None:
        return int(known["id"])
    labeller_id = t.put_labeller(name, "labeller", secrets.token_urlsafe(32))
    t.set_active(labeller_id, False)
    return labeller_id
