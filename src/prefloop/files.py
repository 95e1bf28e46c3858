"""Files of rows: JSONL, CSV and Parquet in, JSONL out; whole or not at all. No torch."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import UUID

from prefloop.errors import AGAIN, UserError, disk_error, first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well and its bytes are on disk.

    Through a symbolic link it is the link's target that is written. UserError where it cannot be.
    """
    check_writable(path)
    path = Path(path).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            mend = AGAIN if disk_error(error) else "give another"
            message = f"{path}: cannot be written ({error.strerror}); {mend}"
            raise UserError(message) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(path: Path | str) -> None:
    """UserError where no file of this name can be made: told before the work, not after it."""
    try:
        target = Path(path).resolve()
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: not a file; give the name of a file")
        check_folder(target.parent)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}; give another") from error


def check_folder(path: Path) -> None:
    """UserError where there is no such folder and none can be made."""
    try:
        there = next(part for part in (path, *path.absolute().parents) if part.exists())
        made = there.is_dir() and os.access(there, os.W_OK)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}; give another") from error
    if not made:
        raise UserError(f"{path}: {there} is no folder one can write to; give another")


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write a whole file, or leave what was there."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def append(path: Path, text: str) -> None:
    """Add whole lines to a file, or leave it as it was; UserError where it cannot be written."""
    size = None
    try:
        with path.open("ab") as file:
            size = file.tell()
            file.write(text.encode())
    except OSError as error:
        if size is not None:
            with suppress(OSError):  # then its last line is seen to be cut short
                os.truncate(path, size)
        mend = AGAIN if disk_error(error) else "check it, then give the same command again"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {mend}") from error


def drop_cut_line(path: Path) -> None:
    """Take away a last line that a kill cut short."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one object a line (gzip for `.gz`, the same bytes every time), or nothing at all."""
    with atomic_file(path) as file:
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if _is_gz(path) else None
        for row in rows:
            text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
            (packed or file).write(text.encode() + b"\n")
        if packed:
            packed.close()


def set_aside(path: Path, name: str) -> Path:
    """Rename to the first free `NAME-N` beside it."""
    number = 1
    while (target := path.with_name(f"{name}-{number}")).exists():
        number += 1
    return path.rename(target)


def cache_dir() -> Path:
    """Where prefloop keeps what can be had again: `$PREFLOOP_CACHE`, or `~/.cache/prefloop`."""
    return Path(os.environ.get("PREFLOOP_CACHE") or "~/.cache/prefloop").expanduser()


# --- reading -------------------------------------------------------------------------------------


def _is_gz(path: Path | str) -> bool:
    return str(path).endswith(".gz")


OnBad = Callable[[str, UserError], None]
"""Told where a bad row stands and what is wrong with it; the row is left out if this returns."""


def raise_bad(where: str, error: UserError) -> None:
    """Leave no row out."""
    raise error


def read_rows(path: Path | str, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, row) of a JSONL, JSONL.gz, CSV or Parquet file.

    Raises UserError for what cannot be read: the file, a line that is not UTF-8 or not a JSON
    object, a CSV row that does not fit its header; the last three go to `on_bad`.
    """
    name = str(path)
    if not name.endswith(SUFFIXES):
        raise UserError(f"{name}: unknown kind of file; use {', '.join(SUFFIXES)}")
    if not Path(path).is_file():
        raise UserError(f"{name}: no such file; check the path")
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(name)
        elif name.endswith(".csv"):
            yield from _read_csv(name, on_bad)
        elif name.endswith(".json"):
            yield from _read_json(name, on_bad)
        else:
            yield from _read_jsonl(name, on_bad)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); check or fetch it again") from error


def _raw_lines(name: str) -> Iterator[tuple[int, bytes]]:
    with gzip.open(name, "rb") if _is_gz(name) else open(name, "rb") as file:
        yield from enumerate(file, 1)


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte can be told with its line."""
    for number, raw in _raw_lines(name):
        yield number, _decoded(raw, number, name)


def _decoded(raw: bytes, number: int, name: str) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}:{number}: byte 0x{error.object[error.start]:02x} at column "
            f"{error.start + 1} is not UTF-8; convert the file "
            "(iconv -f ITS-ENCODING -t UTF-8)"
        ) from error


def _read_jsonl(name: str, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, raw in _raw_lines(name):
        where = f"{name}:{number}"
        try:
            line = _decoded(raw, number, name)
            row = _object(line, where) if line.strip() else None
        except UserError as error:
            on_bad(where, error)
            continue
        if row is not None:
            yield where, row


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = first_line(error)
        if isinstance(error, json.JSONDecodeError):
            problem = f"{error.msg}, column {error.colno}"
        raise UserError(
            f"{where}: malformed JSON ({problem}); each line must be one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a JSON {json_type(row)}; each line must be one JSON object with the "
            "columns as keys"
        )
    return row


def _read_json(name: str, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    """One list of objects, numbered from 1."""
    text = "".join(line for _, line in _lines(name))
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name}: malformed JSON ({first_line(error)}); it must be one list of objects, or "
            "name it .jsonl where each line is one"
        ) from error
    if not isinstance(listed, list):
        raise UserError(
            f"{name}: a JSON {json_type(listed)}; give one list of objects, or .jsonl for lines"
        )
    for number, row in enumerate(listed, 1):
        where = f"{name}:{number}"
        if isinstance(row, dict):
            yield where, row
        else:
            message = f"{where}: a JSON {json_type(row)}; each row must be an object"
            on_bad(where, UserError(message))


def _read_csv(name: str, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells are strings, empty ones null; of a quoted cell over lines the first one is named."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(name)), strict=True)
    header: Sequence[str] = ()
    start = 1
    try:
        for cells in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header and len(set(cells)) < len(cells):
                raise UserError(f"{where}: a column stands twice in {', '.join(cells)}; rename one")
            if not header:
                header = cells
            elif len(cells) != len(header):
                message = (
                    f"{where}: {len(cells)} cells under {len(header)} columns "
                    f"({', '.join(header)}); quote cells that hold commas or line breaks"
                )
                on_bad(where, UserError(message))
            else:
                yield where, {k: v or None for k, v in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{name}:{start}: malformed CSV ({error}); mend it or use JSONL") from error


def _read_parquet(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows are numbered from 1."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{name}: Parquet needs pyarrow; pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", {k: plain(v) for k, v in row.items()}
    except (arrow.ArrowException, ValueError, OverflowError) as error:  # or too fine a time
        problem = f"{name}: malformed Parquet after row {number} ({first_line(error)})"
        raise UserError(f"{problem}; write it again, times in microseconds") from error


def plain(value: Any) -> Any:
    """A value of a table as JSON holds it: dates and decimals as text, NaN as null.

    Bytes stay bytes: whoever writes them must say what became of them.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta | UUID) else value


def json_type(value: object) -> str:
    """What JSON calls a value's type.

    >>> [json_type(value) for value in (None, True, 1.5, "a", [], {})]
    ['null', 'boolean', 'number', 'string', 'list', 'object']
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {str: "string", list: "list", dict: "object", int: "number", float: "number"}
    return kinds.get(type(value), type(value).__name__)
