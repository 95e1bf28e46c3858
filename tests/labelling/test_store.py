"""The store: migrations, addresses, sessions, and what a killed or full database leaves."""

import sqlite3
import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from prefloop.config.labelling import LabelExportConfig, LabelImportConfig
from prefloop.errors import UserError
from prefloop.files import read_rows, write_jsonl
from prefloop.labelling import export, imports
from prefloop.labelling.store import Store, Unavailable
from prefloop.labelling.store.schema import metadata
from tests.labelling.small import Clock, add, open_store, put, rows


def test_the_migrations_make_the_schema(tmp_path):
    store = open_store(tmp_path)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == "0003"
        assert compare_metadata(context, metadata) == []


def test_a_store_of_the_first_version_gains_the_columns(tmp_path):
    put(tmp_path, rows(1))
    with sqlite3.connect(tmp_path / "labels.db") as old:
        for column in ("token_ids", "tokenizer"):
            old.execute(f"ALTER TABLE responses DROP COLUMN {column}")
        old.execute("ALTER TABLE tasks DROP COLUMN reason")
        old.execute("UPDATE alembic_version SET version_num = '0001'")
    old.close()
    with open_store(tmp_path).read() as t:
        found = t.all(text("SELECT completion, token_ids, tokenizer FROM responses"))
    assert [(row["token_ids"], row["tokenizer"]) for row in found] == [(None, None)] * 3


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


def test_a_store_of_the_first_version_gains_the_columns_on_postgresql(tmp_path, postgres):
    address = postgres("first")
    write_jsonl(tmp_path / "rows.jsonl", rows(1))
    imports.run(LabelImportConfig(store=address, data=str(tmp_path / "rows.jsonl")))
    engine = create_engine(address.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as old:
        for column in ("token_ids", "tokenizer"):
            old.execute(text(f"ALTER TABLE responses DROP COLUMN {column}"))
        old.execute(text("ALTER TABLE tasks DROP COLUMN reason"))
        old.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    store = Store(address)
    with store.read() as t:
        found = t.all(text("SELECT completion, token_ids, tokenizer FROM responses"))
    store.close()
    assert [(row["token_ids"], row["tokenizer"]) for row in found] == [(None, None)] * 3
