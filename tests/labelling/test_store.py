"""The store: migrations, addresses, sessions, and what a killed or full database leaves."""

import sqlite3
import threading
import time

import pytest
from alembic import command as alembic
from alembic.autogenerate import compare_metadata
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from sqlalchemy import text

from prefloop.config.labelling import LabelExportConfig, LabelImportConfig
from prefloop.errors import UserError
from prefloop.files import read_rows, write_jsonl
from prefloop.labelling import export, imports
from prefloop.labelling.assign import next_assignment, submit
from prefloop.labelling.store import Store, Unavailable
from prefloop.labelling.store.projects import versions_of
from prefloop.labelling.store.schema import metadata
from prefloop.labelling.store.settling import put_finished
from tests.labelling.small import Clock, add, in_order, open_store, put, rows


def test_the_migrations_make_the_schema(tmp_path):
    store = open_store(tmp_path)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == "0005"
        assert compare_metadata(context, metadata) == []


def take_back(address, revision):
    """A store as an earlier version left it."""
    store = Store(address)
    config = AlembicConfig()
    config.set_main_option("script_location", "prefloop:labelling/store/migrations")
    config.set_main_option("path_separator", "os")
    with store.engine.connect().execution_options(writes=True) as connection, connection.begin():
        config.attributes["connection"] = connection
        alembic.downgrade(config, revision)
    store.close()


def label_two_tasks(store):
    """Of three answers: on the first task one pair in three is ordered apart, with a flag; on the
    second a tie meets an order, twice in three pairs."""
    ann, bob = add(store, "ann", "bob")
    orders = {ann: ([[0], [1], [2]], [[0, 1, 2]]), bob: ([[0], [2], [1]], [[0], [1, 2]])}
    for who, tiers in orders.items():
        for number in (0, 1):
            task = next_assignment(store, who)
            flags = [{"answer": 0, "flag": "harmful"}] if (who, task.task_id) == (ann, 1) else []
            said = in_order(task, f"{who}-{number}", tiers=tiers[task.task_id - 1], flags=flags)
            submit(store, who, task.id, said)


FACTS = "SELECT id, disagreement, flagged, adjudicated FROM tasks ORDER BY id"
OLD = ("projects", "prompts", "responses", "labellers", "tasks", "assignments", "annotations")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_older_store_gains_what_is_new_and_loses_nothing(tmp_path, request, kind):
    """What the pages ask for is worked out of the annotations that are there."""
    if kind == "postgresql":
        address = request.getfixturevalue("postgres")("older")
    else:
        address = str(tmp_path / "labels.db")
    put(tmp_path, rows(2), address=address, need=2)
    store = open_store(tmp_path, address=address)
    label_two_tasks(store)
    with store.write() as t:
        by = t.put_labeller("boss (adjudication)", "labeller", "x")
        t.set_active(by, False)
        put_finished(t, 2, by, "adjudication", [[0], [1], [2]])
    before, facts = everything(store, OLD), facts_of(store)
    assert facts == [(1, 0.333333333, 1, False), (2, 0.333333333, 0, True)]
    store.close()
    take_back(address, "0001")
    store = open_store(tmp_path, address=address)
    assert facts_of(store) == facts
    after = everything(store, OLD)
    for one in (before, after):  # the version of the guidelines was not known then
        one["annotations"] = [row | {"project_version": None} for row in one["annotations"]]
    assert after["labellers"].pop() == before["labellers"].pop() | {"role": "adjudicator"}
    assert after == before
    with store.read() as t:
        versions = versions_of(t, 1)
        assert [(v["version"], v["settings"]) for v in versions] == [
            (1, t.projects()[0]["settings"])
        ]
        assert [p["name"] for p in t.projects(1)] == ["main"]


def facts_of(store):
    with store.read() as t:
        return [tuple(row) for row in t.connection.execute(text(FACTS))]


def everything(store, tables):
    with store.read() as t:
        return {name: t.all(metadata.tables[name].select().order_by(text("id"))) for name in tables}


def test_a_store_opens_again_as_it_was(tmp_path):
    put(tmp_path, rows(2))
    for _ in range(2):
        store = open_store(tmp_path)
        with store.read() as t:
            assert [p["name"] for p in t.projects()] == ["main"]
            assert t.connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        store.close()


def test_a_store_of_a_later_version_is_refused(tmp_path):
    store = open_store(tmp_path)
    with store.write() as t:
        t.connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(UserError, match="later prefloop"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("absent/labels.db", "no folder"),
        ("rows.jsonl", "give a database"),
        ("mysql://x/y", "SQLite file or a postgresql URL"),
        ("://x", "not a database URL"),
        ("postgresql://127.0.0.1:1/none", "check the address"),
    ],
)
def test_bad_addresses_are_told(address, told):
    with pytest.raises(UserError, match=told):
        Store(address)


def test_a_file_that_is_no_database_is_told(tmp_path):
    (tmp_path / "labels.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match="not a database"):
        open_store(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Store(str(tmp_path / "absent.db"), must_exist=True)


def test_only_hashes_of_tokens_are_stored(tmp_path):
    store = open_store(tmp_path)
    add(store, "ann")
    with store.write() as t:
        assert t.open_session("token-ann", "session-ann", 60.0)["name"] == "ann"
    store.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("labels.db*"))
    assert b"ann" in stored
    assert b"token-ann" not in stored
    assert b"session-ann" not in stored


def test_sessions_expire_and_end_with_access(tmp_path):
    clock = Clock()
    store = open_store(tmp_path, clock)
    (ann,) = add(store, "ann")
    with store.write() as t:
        assert t.open_session("wrong", "s", 60.0) is None
        t.open_session("token-ann", "s", 60.0)
    with store.read() as t:
        assert t.session("s")["id"] == ann
        assert t.session("other") is None
    clock.now += 61
    with store.read() as t:
        assert t.session("s") is None
    with store.write() as t:
        t.open_session("token-ann", "s2", 60.0)
        t.set_active(ann, False)
    with store.write() as t:
        assert t.session("s2") is None
        assert t.open_session("token-ann", "s3", 60.0) is None
        t.put_labeller("ann", "labeller", "new")  # a new link lets ann in again, and old ones not
    with store.write() as t:
        assert t.open_session("token-ann", "s4", 60.0) is None
        assert t.open_session("new", "s4", 60.0)["id"] == ann


def test_a_write_that_fails_leaves_nothing(tmp_path):
    store = open_store(tmp_path)

    def half():
        with store.write() as t:
            t.put_labeller("ann", "labeller", "a")
            t.connection.execute(text("INSERT INTO absent VALUES (1)"))

    with pytest.raises(Unavailable):
        half()
    with store.read() as t:
        assert t.labeller_named("ann") is None
    add(store, "ann")  # the lock is free


def test_a_writer_waits_for_another_process(tmp_path):
    store = open_store(tmp_path)
    other = sqlite3.connect(tmp_path / "labels.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    timer.start()
    start = time.monotonic()
    add(store, "ann")
    assert time.monotonic() - start > 0.2
    timer.join()
    other.close()


def test_a_full_disk_loses_nothing(tmp_path):
    """The database may not grow: writing fails, what was there stays, and room mends it."""
    store = open_store(tmp_path)
    add(store, "ann")
    with store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    limit = f"PRAGMA max_page_count={pages}"

    def fill():
        with store.write() as t:
            t.connection.exec_driver_sql(limit)
            for n in range(2000):
                t.log("fill", detail_of="x" * 100, number=n)

    with pytest.raises(Unavailable, match="full"):
        fill()
    with store.write() as t:
        t.connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        assert t.labeller_named("ann") is not None
        t.log("fill")


SAMPLED = {
    "prompt": "p",
    "completions": ["a", "b", "c"],
    "tiers": [[1], [0, 2]],
    "completion_ids": [[7, 2], [2**31 - 1], None],
    "finish_reasons": ["stop", "length", None],
    "tokenizer": "0123456789abcdef",
}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_is_known_of_sampled_answers_comes_back(tmp_path, request, kind):
    if kind == "postgresql":
        address = request.getfixturevalue("postgres")("sampled")
    else:
        address = str(tmp_path / "labels.db")
    write_jsonl(tmp_path / "rows.jsonl", [SAMPLED])
    told = imports.run(LabelImportConfig(store=address, data=str(tmp_path / "rows.jsonl")))
    assert told["tasks"] == 1
    output = tmp_path / "out.jsonl"
    export.run(LabelExportConfig(store=address, output=output))
    ((_, row),) = read_rows(output)
    assert row == SAMPLED | {"labeller": "import"}
