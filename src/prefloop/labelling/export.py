"""`prefloop label export`: annotations to training rows; what is left out is counted.

Gold tasks and repeats test the labellers and are never exported but to the audit. A task that an
admin has adjudicated gives that ranking alone: the newest, where several admins did.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.config.labelling import Consensus, LabelExportConfig
from prefloop.config.resolve import nearest
from prefloop.data.formats import parse_row
from prefloop.data.split import split_by_prompt
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.labelling.agreement import copeland, one_coin, pair_signs, ranks_of
from prefloop.labelling.forms import Decision, form_rows, margin_of
from prefloop.labelling.store import Store, Transaction
from prefloop.labelling.store.projects import versions_of
from prefloop.labelling.store.reading import (
    Annotation,
    annotations_of,
    events_of,
    progress_of,
    prompts_of,
    responses_of,
)
from prefloop.records import (
    Prompt,
    Ranking,
    RowCounts,
    Unpaired,
)


def run(config: LabelExportConfig) -> dict[str, Any]:
    """Write --output (and NAME.eval.jsonl), and say how much went in and what was left out."""
    if not config.output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output {config.output}: give the name of a .jsonl or .jsonl.gz file")
    with closing(Store(config.store, must_exist=True)) as store:
        # 1. Wait, where asked to, until nothing more will come.
        if config.wait:
            _wait(store, config.project, config.wait_seconds)
        # 2. Read and decide.
        counts = RowCounts()
        rows, held_out = training_rows(store, config, counts)
        # 3. Write.
        result = {"output": str(config.output), "rows": len(rows), **_counted(counts)}
        write_jsonl(config.output, rows)
        if held_out:
            path = _eval_path(config.output)
            write_jsonl(path, held_out)
            result |= {"eval_output": str(path), "eval_rows": len(held_out)}
        with store.write() as t:
            details = {"form": config.form, "consensus": config.consensus, **result}
            t.log("export", None, project=config.project, exclude=list(config.exclude), **details)
    return result


def training_rows(
    store: Store, config: LabelExportConfig, counts: RowCounts
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The rows that an export writes, and those of the held-out prompts."""
    if config.form == "audit":
        rows = audit(store, config.project)
        counts.read = counts.used = len(rows)
        return rows, []
    wanted = (config.consensus, config.exclude)
    decided = decisions(store, config.project, *wanted, counts, config.label_margins)
    kept = {id(d.ranking): d for d in decided}
    sides = split_by_prompt([d.ranking for d in decided], config.eval_fraction, config.seed)
    train, held_out = (
        [row for r in side for row in form_rows(config.form, kept[id(r)], counts)] for side in sides
    )
    return train, held_out


def _counted(counts: RowCounts) -> dict[str, Any]:
    return {"annotations": counts.read, "used": counts.used, "left_out": dict(counts.dropped)}


def _eval_path(output: Path) -> Path:
    stem, _, rest = output.name.partition(".jsonl")
    return output.with_name(f"{stem}.eval.jsonl{rest}")


class NoProject(UserError):
    """A project that the store does not hold, or that the asker does not see; `known`: others."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        held = ", ".join(known) or "none"
        super().__init__(f"no project {name} in the store; it holds {held}{nearest(name, known)}")
        self.name, self.known = name, known


def project_of(t: Transaction, name: str, labeller_id: int | None = None) -> Mapping[str, Any]:
    """A project by name (one that a labeller sees); NoProject where there is none."""
    seen = t.projects(labeller_id)
    found = next((p for p in seen if p["name"] == name), None)
    if found is None:
        raise NoProject(name, [p["name"] for p in seen])
    return found


def project_id_of(t: Transaction, name: str) -> int:
    """A project's id; NoProject where there is none of that name."""
    return int(project_of(t, name)["id"])


def _wait(store: Store, project: str, seconds: float) -> None:
    """Return when no task can get another annotation that it needs; says how far it is."""
    before = None
    while True:
        with store.read() as t:
            now = progress_of(t, project_id_of(t, project))
        if now.unsettled == 0:
            return
        if now != before:
            progress = f"waiting for labels: {now.done} of {now.needed}, {now.unsettled} tasks open"
            print(progress, file=sys.stderr, flush=True)
        before = now
        time.sleep(seconds)


# --- deciding ------------------------------------------------------------------------------------


def is_store(source: str) -> bool:
    """Whether rows are to come from a labelling store: `labels.db`, `labels.db#PROJECT`, a URL.

    >>> [is_store(s) for s in ("labels.db", "x/labels.db#main", "postgresql://h/x", "rows.jsonl")]
    [True, True, True, False]
    """
    return bool(re.fullmatch(r"(postgresql(\+\w+)?://[^#]+|[^#]+\.(db|sqlite3?))(#.*)?", source))


def split_address(address: str) -> tuple[str, str]:
    """(store, project) of `STORE` or `STORE#PROJECT`."""
    store, _, project = address.partition("#")
    return store, project or "main"


def read_records(
    address: str, kind: str, counts: RowCounts, margins: bool = False
) -> list[Ranking | Unpaired]:
    """Training records of `STORE#PROJECT`: a ranking an annotation, or KTO's unpaired rows."""
    if kind not in ("preference", "unpaired"):
        raise UserError(
            f"{address}: a labelling store gives preferences and prompts; give a file of {kind}s"
        )
    path, project = split_address(address)
    before = counts.used
    with closing(Store(path, must_exist=True)) as store:
        decided = decisions(store, project, "labeller", (), counts, margins)
    counts.used = before  # who makes examples of the records counts those
    if kind == "preference":
        return [decision.ranking for decision in decided]
    rows = [(d.ranking.where, row) for d in decided for row in form_rows("kto", d, counts)]
    parsed = [record for where, row in rows for record in parse_row(row, where, "unpaired")]
    return [record for record in parsed if isinstance(record, Unpaired)]


def store_rows(address: str, counts: RowCounts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the rankings of `STORE#PROJECT`, one a labeller and task."""
    path, project = split_address(address)
    with closing(Store(path, must_exist=True)) as store:
        decided = decisions(store, project, "labeller", (), counts)
    for decision in decided:
        for row in form_rows("rankings", decision, counts):
            yield decision.ranking.where, row


def read_prompts(address: str, counts: RowCounts) -> list[Prompt]:
    """All prompts of `STORE#PROJECT`, answered or not."""
    path, project = split_address(address)
    with closing(Store(path, must_exist=True)) as store, store.read() as t:
        stored = prompts_of(t, project_id_of(t, project))
    if not stored:
        raise UserError(f"{address}: it holds no prompts; import some")
    counts.read += len(stored)
    records = []
    for number, (prompt, extra) in sorted(stored.items()):
        where = f"{address}: prompt {number}"
        parsed = parse_row({**(extra or {}), "prompt": prompt}, where, "prompt")
        records += [record for record in parsed if isinstance(record, Prompt)]
    return records


def decisions(
    store: Store,
    project: str,
    consensus: Consensus,
    exclude: Sequence[str],
    counts: RowCounts,
    margins: bool = False,
) -> list[Decision]:
    """What the labellers decided: each by itself, or together for each task.

    `margins`: what `margin_of` makes of each by itself.
    """
    with store.read() as t:
        project_id = project_id_of(t, project)
        require_labellers(t, exclude)
        said = list(annotations_of(t, project_id))
        prompts, responses = prompts_of(t, project_id), responses_of(t, project_id)
    # 1. What speaks of real tasks.
    said = [a for a in said if is_kept(a, exclude, counts)]
    by_task = [list(group) for _, group in groupby(said, key=lambda a: a.task_id)]
    weight = _weights(by_task) if consensus == "dawid-skene" else lambda name: 1.0
    # 2. One decision an annotation, or one a task.
    decided: list[Decision] = []
    for group in by_task:
        chosen = deciding(group, counts)
        first = chosen[0]
        asked, extra = prompts[first.prompt_id]
        answers = [responses[i] for i in first.response_ids]
        row = {"prompt": asked, "tools": extra.get("tools"), **_answer_columns(answers)}
        where = f"{project}, task {first.task_id}"
        if consensus == "labeller" or first.strategy == "adjudication":
            for a in chosen:
                assert a.tiers is not None
                ranking = _ranking(row, a.tiers, where)
                if margins:
                    ranking = replace(ranking, margin=margin_of(a.strength, a.confidence))
                ratings, name = a.ratings, a.labeller
                decided.append(Decision(ranking, name, a.confidence, a.all_bad, ratings))
        else:
            decided.append(_together(row, chosen, weight, where))
        counts.used += len(chosen)
    if not decided:
        raise UserError(f"project {project}: nothing to use: {counts.summary()}; label some tasks")
    return decided


def require_labellers(t: Transaction, exclude: Sequence[str]) -> None:
    """UserError for a name that is no labeller's."""
    if unknown := [name for name in exclude if t.labeller_named(name) is None]:
        raise UserError(f"--exclude {unknown[0]}: no labeller of that name")


def deciding(group: Sequence[Annotation], counts: RowCounts) -> Sequence[Annotation]:
    """Of one task's annotations those that count: the newest adjudication alone, or all."""
    adjudicated = [a for a in group if a.strategy == "adjudication"]
    last = max(adjudicated, key=lambda a: a.created, default=None)
    chosen = group if last is None else [last]
    for _ in range(len(group) - len(chosen)):
        counts.drop("overruled by adjudication")
    return chosen


def is_kept(a: Annotation, exclude: Sequence[str], counts: RowCounts) -> bool:
    """Whether an annotation says how a real task's answers rank; counted where not."""
    counts.read += 1
    reason = (
        ("adjudication withdrawn" if a.strategy == "adjudication" else "skipped")
        if a.tiers is None
        else {"gold": "gold task", "repeat": "repeated task", "practice": "practice task"}.get(
            a.kind
        )
    )
    if reason is None and a.labeller in exclude:
        reason = f"labeller {a.labeller} excluded"
    if reason is not None:
        counts.drop(reason)
    return reason is None


def _answer_columns(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stored responses as a row's columns."""
    return {
        "completions": [one["completion"] for one in answers],
        "finish_reasons": [one["finish_reason"] for one in answers],
        "completion_ids": [one["token_ids"] for one in answers],  # all of one row: one tokenizer's
        "tokenizer": next((one["tokenizer"] for one in answers if one["token_ids"]), None),
    }


def _ranking(row: Mapping[str, Any], tiers: Sequence[Sequence[int]], where: str) -> Ranking:
    ranking = parse_row({**row, "tiers": [list(t) for t in tiers]}, where, "preference")[0]
    assert isinstance(ranking, Ranking)
    return ranking


def _together(
    row: Mapping[str, Any],
    said: Sequence[Annotation],
    weight: Callable[[str], float],
    where: str,
) -> Decision:
    """The (weighted) majority on each pair, then tiers by pairs won minus pairs lost."""
    count = len(row["completions"])
    ranks = np.array([ranks_of(a.tiers or (), count) for a in said])
    votes = np.array([weight(a.labeller) for a in said]) @ pair_signs(ranks)
    ratings = None
    if rated := [a.ratings for a in said if a.ratings is not None]:
        ratings = [round(float(x)) for x in np.mean(rated, axis=0)]
    all_bad = 2 * sum(a.all_bad for a in said) > len(said)
    tiers = copeland(votes.tolist(), count)
    return Decision(_ranking(row, tiers, where), "", None, all_bad, ratings)


def _weights(by_task: Sequence[Sequence[Annotation]]) -> Callable[[str], float]:
    """log(2p/(1 - p)), p a labeller's accuracy on pairs by one-coin Dawid-Skene (three classes).

    It is what one vote adds to a class's log-odds; below 0 for one who is more often wrong.
    """
    names = sorted({a.labeller for group in by_task for a in group})
    items, who, labels, number = [], [], [], 0
    for group in by_task:
        count = len(group[0].response_ids)
        pairs = count * (count - 1) // 2
        for a in group:
            signs = pair_signs(np.array([ranks_of(a.tiers or (), count)]))[0]
            items += list(range(number, number + pairs))
            who += [names.index(a.labeller)] * pairs
            labels += [int(sign) + 1 for sign in signs]
        number += pairs
    model = one_coin(np.array(items), np.array(who), np.array(labels), classes=3)
    accuracy = {name: float(p) for name, p in zip(names, model.accuracy, strict=True)}
    return lambda name: log(2 * accuracy[name] / (1 - accuracy[name]))


def audit(store: Store, project: str) -> list[dict[str, object]]:
    """Every version of every annotation with all that is known of it, then those of the project's
    guidelines and settings, then the event log."""
    with store.read() as t:
        project_id = project_id_of(t, project)
        prompts, responses = prompts_of(t, project_id), responses_of(t, project_id)
        made = (
            *("completion", "model", "weights", "sampling", "seed", "log_prob", "finish_reason"),
            *("token_ids", "tokenizer"),
        )
        rows = [
            {
                **{name: getattr(a, name) for name in Annotation.__slots__},
                "type": "annotation",
                "prompt": prompts[a.prompt_id][0],
                "responses": [{name: responses[i][name] for name in made} for i in a.response_ids],
            }
            for a in annotations_of(t, project_id, every_version=True)
        ]
        versions = [
            {"type": "project", "project": project, "by": one["name"]}
            | {name: one[name] for name in ("version", "guidelines", "settings", "created")}
            for one in reversed(versions_of(t, project_id))
        ]
        log = [{"type": "event", **event} for event in reversed(events_of(t))]
    return [*rows, *versions, *log]
