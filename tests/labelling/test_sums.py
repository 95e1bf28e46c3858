"""The sums by day against a count of all that is there, after everything that changes labels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from random import Random

import pytest
from alembic.migration import MigrationContext
from sqlalchemy import text

from prefloop.labelling.assign import (
    Judgement,
    Refused,
    next_assignment,
    reopen,
    save_draft,
    submit,
    take_up,
)
from prefloop.labelling.store.reading import labellers_of, progress_of
from prefloop.labelling.store.schema import PACES, day_sums
from prefloop.labelling.store.settling import put_finished
from prefloop.labelling.store.workbench import days_of, hours_of
from tests.labelling.small import Clock, add, open_store, put, rows
from tests.labelling.test_store import take_back

SAID = """
SELECT t.project_id, t.kind, t.disagreement, a.labeller_id, a.strategy, a.state, n.created,
    n.seconds
FROM assignments a JOIN tasks t ON t.id = a.task_id
JOIN annotations n ON n.assignment_id = a.id AND n.version = a.version
"""
TASKS = """
SELECT count(*) tasks, sum(need) needed, sum(done) done, sum(taken - done) held
FROM tasks WHERE kind = 'real'
"""
PERSON = "labellers WHERE active AND role = 'labeller'"
UNSETTLED = f"""
SELECT count(*) n FROM tasks WHERE kind = 'real' AND done < need
AND (SELECT count(*) FROM assignments WHERE task_id = tasks.id AND state IN ('done', 'skipped')
     AND labeller_id IN (SELECT id FROM {PERSON})) < (SELECT count(*) FROM {PERSON})
"""
SKIPPED = """
SELECT skipped kept, (SELECT count(*) FROM assignments WHERE task_id = tasks.id
                      AND state = 'skipped') skipped FROM tasks
"""


def counted(store):
    """All finished assignments, one by one."""
    found = defaultdict(Counter)
    with store.read() as t:
        said = t.all(text(SAID))
    for one in said:
        if one["state"] not in ("done", "skipped") or one["strategy"] == "adjudication":
            continue
        here = found[one["project_id"], one["created"] // 86_400, one["labeller_id"]]
        here[one["state"]] += 1
        if one["kind"] == "real" and one["state"] == "done":
            here["real"] += 1
            if one["strategy"] != "import":
                here["annotations"] += 1
                here["milliseconds"] += math.floor(1000 * one["seconds"] + 0.5)
                for pace in PACES:
                    here[f"pace_{pace}"] += one["seconds"] <= pace
                if one["disagreement"] is not None:
                    here["shared"] += 1
                    here["agreed"] += 1_000_000_000 - round(1e9 * one["disagreement"])
    return {key: dict(+one) for key, one in found.items()}


def kept(store):
    with store.read() as t:
        stored = t.all(day_sums.select())
    keys = ("project_id", "day", "labeller_id")
    return {
        tuple(row.pop(key) for key in keys): {k: v for k, v in row.items() if v}
        for row in stored
        if any(v for k, v in row.items() if k not in keys)
    }


def order(draw, answers):
    places = [draw.randrange(3) for _ in range(answers)]
    return [[i for i in range(answers) if places[i] == p] for p in sorted(set(places))]


def act(store, draw, who, number):
    """One thing that a labeller may do: rank, skip, edit, take back, draft again, leave it."""
    deed = draw.choice(("rank", "rank", "rank", "skip", "again", "again", "draft", "leave"))
    said = {"seconds": draw.choice((4.9995, 10.0, 33.3, 200.0)), "request_id": f"request-{number}"}
    if deed in ("again", "draft"):
        with store.read() as t:
            mine = t.all(text(f"SELECT id FROM assignments WHERE labeller_id = {who}"))
        task = take_up(store, who, draw.choice(mine)["id"]) if mine else reopen(store, who)
    else:
        task = next_assignment(store, who)
    if task is None or deed == "leave":
        return
    if deed == "draft":
        save_draft(store, who, task.id, {"values": [1]})
        return
    tiers = None if deed == "skip" or draw.random() < 0.2 else order(draw, len(task.shown))
    submit(store, who, task.id, Judgement(tiers, base_version=task.version, **said))


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_the_sums_are_what_counting_gives(tmp_path, request, kind):
    """120 random deeds of four labellers over some days, imports and adjudications between them."""
    address = str(tmp_path / "labels.db")
    if kind == "postgresql":
        address = request.getfixturevalue("postgres")("sums")
    put(tmp_path, rows(24), address=address, need=2, repeat_share=0.2, lease_minutes=600)
    gold = [
        row | {"prompt": f"gold {n}", "tiers": [[0], [1], [2]]} for n, row in enumerate(rows(3))
    ]
    put(tmp_path, gold, address=address, need=2, repeat_share=0.2, gold_share=0.2,
        lease_minutes=600, gold=True)  # fmt: skip
    clock, draw = Clock(), Random(0)
    store = open_store(tmp_path, clock, address)
    people = add(store, "ann", "bob", "cat", "dan")
    with store.write() as t:
        boss = t.put_labeller("boss (adjudication)", "adjudicator", "x")
    refused = 0
    for number in range(120):
        clock.now += draw.choice((60.0, 3600.0, 40_000.0))
        try:
            act(store, draw, draw.choice(people), number)
        except Refused:
            refused += 1
        if number % 20 == 0:
            with store.write() as t:
                put_finished(t, 1 + draw.randrange(24), boss, "adjudication", order(draw, 3))
        if number % 50 == 25:
            judged = [
                row | {"tiers": order(draw, 3), "labeller": f"out {number}"} for row in rows(4)
            ]
            put(tmp_path, judged, address=address, need=2, repeat_share=0.2, gold_share=0.2)
    found = kept(store)
    assert found == counted(store)
    assert 0 < refused < 50
    assert sum(one.get("shared", 0) for one in found.values()) > 10
    assert sum(one.get("skipped", 0) for one in found.values()) > 5
    with store.read() as t:
        for days in (1, 7):
            kept_days, all_days = days_of(t, 1, 9, days), hours_of(t, 1, 9, days * 86_400.0)
            assert len(kept_days) == len(all_days) > 4
            for one, other in zip(kept_days, all_days, strict=True):
                assert one == pytest.approx(other, abs=0.01)
        told = progress_of(t, 1)
        assert [told.tasks, told.needed, told.done, told.held] == list(t.one(text(TASKS)).values())
        assert told.unsettled == t.one(text(UNSETTLED))["n"] > 0
        skipped = [row["skipped"] for row in t.all(text(SKIPPED)) if row["kept"] != row["skipped"]]
        assert skipped == []
        states = Counter((r["labeller_id"], r["state"]) for r in t.all(text(SAID)))
        for one in labellers_of(t, 1, "", 50):
            for state in ("done", "skipped"):
                assert one[state] == states[one["id"], state]
    # A store of before the sums gets the same by its migration.
    store.close()
    take_back(address, "0004")
    store = open_store(tmp_path, clock, address)
    with store.engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == "0005"
    assert kept(store) == found
