"""The database behind the labelling store: SQLite (WAL) by default, PostgreSQL by URL.

On SQLite writers queue at a lock of the process, then at the database's; on PostgreSQL rows are
locked, so several servers may share one store.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from alembic import command as alembic
from alembic.config import Config as AlembicConfig
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefloop.errors import UserError, first_line
from prefloop.labelling.store.transaction import Transaction

BUSY_SECONDS = 10.0
"""How long a writer waits for SQLite's lock before it gives up."""
MIGRATING = 7203115
"""Key of the PostgreSQL lock that lets one server migrate at a time."""


class Unavailable(Exception):
    """The database cannot serve now; `reason` is `busy` (ask again) or `full` (no room on disk)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Store:
    """One database; `clock` gives seconds since 1970.

    A SQLite file is made where none is, unless `must_exist`; its writers wait `busy_seconds` for
    each other. UserError for an address that leads to no database.
    """

    def __init__(
        self,
        address: str,
        clock: Callable[[], float] = time.time,
        *,
        must_exist: bool = False,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        if must_exist and "://" not in address and not Path(address).is_file():
            raise UserError(f"--store {address}: no such file; check the path")
        self.clock = clock
        self.engine = _engine(address, busy_seconds)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._writer: AbstractContextManager[object] = (
            threading.Lock() if self.is_sqlite else nullcontext()
        )
        try:
            self._migrate()
        except DBAPIError as error:
            message = first_line(error.orig or error)
            raise UserError(f"--store {self.name}: {message}; check the address") from error

    @property
    def name(self) -> str:
        """The address without its password."""
        return self.engine.url.render_as_string()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """One consistent look at the store."""
        with _told_if_unavailable(), self.engine.begin() as connection:
            yield Transaction(connection, self.clock())

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """All of what the block does, on disk when it ends, or nothing."""
        with _told_if_unavailable(), self._connection() as connection:
            t = Transaction(connection, self.clock())
            yield t
            t.sums.write(connection)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def _migrate(self) -> None:
        """Bring the tables to this version of prefloop; refuse those of a later one."""
        with self._connection() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATING})"))
            migrate(connection)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with (
            self._writer,
            self.engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection


@contextmanager
def _told_if_unavailable() -> Iterator[None]:
    """The database's passing faults as Unavailable: a lock held too long, a deadlock, no room."""
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        problem = first_line(getattr(error, "orig", None) or error)
        full = "full" in problem or "No space left" in problem
        raise Unavailable("full" if full else "busy", problem) from error


def migrate(connection: Connection) -> None:
    """Run the migrations that the database has not seen."""
    config = AlembicConfig()
    config.set_main_option("script_location", "prefloop:labelling/store/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        alembic.upgrade(config, "head")
    except CommandError as error:
        raise UserError(
            f"--store: {first_line(error)}; it was written by a later prefloop, install that"
        ) from error


def _engine(address: str, busy_seconds: float) -> Engine:
    url = address if "://" in address else f"sqlite:///{address}"
    if "://" not in address and address.endswith((".jsonl", ".json", ".csv", ".parquet")):
        raise UserError(f"--store {address}: give a database (labels.db), not a file of rows")
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise UserError(f"--store {address}: give a SQLite file or a postgresql URL")
        if parsed.get_backend_name() == "sqlite":
            path = Path(parsed.database or "")
            if not path.parent.is_dir() or path.is_dir():
                raise UserError(f"--store {address}: no folder {path.parent} to hold it; make it")
            return _sqlite_engine(url, busy_seconds)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_size=20, max_overflow=20)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"--store {address}: not a database URL; see --help") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"--store {address}: needs {error.name}; pip install 'prefloop[postgresql]'"
        ) from error


def _sqlite_engine(url: str, busy_seconds: float) -> Engine:
    engine = create_engine(url, connect_args={"timeout": busy_seconds}, pool_size=20)

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
