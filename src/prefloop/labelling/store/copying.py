"""A store copied as it stands at one moment.

SQLite goes by SQLite's own backup, which sees what stands in the write-ahead log too. Between
databases the rows go over table by table, all read in one transaction that sees one state.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, text

from prefloop.errors import UserError
from prefloop.labelling.store.database import Store
from prefloop.labelling.store.schema import metadata

ROWS = 2000
"""Rows in one insertion."""


def half_name(output: Path) -> Path:
    """Where the copy grows: the name itself is there only when all of it is."""
    return output.with_name(f"{output.name}.part")


def copy_file(store: Store, output: Path) -> dict[str, int]:
    """A SQLite store into a new file; what the copy holds."""
    half = half_name(output)
    if not half.parent.is_dir():
        raise UserError(f"--output {output}: no folder {half.parent} to hold it; make it")
    half.unlink(missing_ok=True)
    with (
        closing(store.engine.raw_connection()) as source,
        closing(sqlite3.connect(half)) as target,
    ):
        live = source.driver_connection
        assert isinstance(live, sqlite3.Connection)
        live.backup(target)  # in one step: readers keep no writer waiting in WAL mode
    finish(half, output)
    with closing(Store(str(output))) as copy, copy.read() as t:
        return _counts(t.connection)


def finish(half: Path, output: Path) -> None:
    """One file, whole and sound, under its own name."""
    with closing(sqlite3.connect(half)) as target:
        target.execute("PRAGMA journal_mode=DELETE")
        found = target.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok":
        raise UserError(f"--store: its copy is not sound ({found}); check the disk")
    half.replace(output)


def copy_rows(store: Store, output: str) -> dict[str, int]:
    """Every row of every table, into a database that holds none."""
    one_state: Mapping[str, Any] = {} if store.is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with (
        closing(Store(output)) as copy,
        store.engine.connect().execution_options(**one_state) as source,
        source.begin(),
        copy.engine.connect().execution_options(writes=True) as target,
        target.begin(),
    ):
        if any(_counts(target).values()):
            raise UserError(f"--output {copy.name}: it holds a store already; give an empty one")
        for table in metadata.sorted_tables:
            rows = source.execution_options(yield_per=ROWS).execute(
                select(table).order_by(*table.primary_key.columns)
            )
            for part in rows.mappings().partitions(ROWS):
                target.execute(insert(table), [dict(row) for row in part])
            if not copy.is_sqlite and "id" in table.c:  # the next row's number follows the last
                last = text(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), "
                    f"(SELECT coalesce(max(id), 0) + 1 FROM {table.name}), false)"
                )
                target.execute(last)
        return _counts(target)


def _counts(connection: Connection) -> dict[str, int]:
    """How many projects, tasks, labellers and annotations (each version) a database holds."""
    wanted = ("projects", "tasks", "labellers", "annotations")
    tables = metadata.tables
    return {
        name: int(connection.execute(select(func.count()).select_from(tables[name])).scalar_one())
        for name in wanted
    }
