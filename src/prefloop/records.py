"""What people and files say, before any tokenizer: prompts, demonstrations, rankings. No torch.

A text is a plain string or a tuple of chat messages. Every record remembers `where` it was read
(`file:line`), so that whatever is found wrong later can still name the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, cast

from prefloop.config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class Prompt:
    """Something to be answered; `extra` carries the row's other columns along."""

    prompt: Text
    where: str = field(default="", compare=False)
    extra: Mapping[str, object] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with an answer to imitate."""

    prompt: Text
    completion: Text
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conversation:
    """A chat whose assistant turns are all to be imitated."""

    messages: tuple[Message, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt in a weak order: `tiers` holds their indices, best first.

    >>> Ranking("p", ("a", "b", "c"), ((1,), (2, 0))).pairs()
    [(1, 2), (1, 0)]
    """

    prompt: Text
    completions: tuple[Text, ...]
    tiers: tuple[tuple[int, ...], ...]
    where: str = field(default="", compare=False)
    margin: float = 0.0  # by which a reward model should score a better answer higher

    def __post_init__(self) -> None:
        ranked = sorted(index for tier in self.tiers for index in tier)
        if ranked != list(range(len(self.completions))) or not all(self.tiers):
            raise UserError(
                f"{located(self.where)}`tiers` {[list(tier) for tier in self.tiers]} must name "
                f"each of the {len(self.completions)} completions once, as 0 to "
                f"{len(self.completions) - 1}, with no empty tier"
            )

    def pairs(self) -> list[tuple[int, int]]:
        """Strictly ordered pairs (winner, loser) of indices into `completions`."""
        ordered = combinations(self.tiers, 2)
        return [(winner, loser) for above, below in ordered for winner in above for loser in below]

    def tied_pairs(self) -> int:
        """Pairs that stand in the same tier."""
        return sum(len(tier) * (len(tier) - 1) // 2 for tier in self.tiers)


@dataclass(frozen=True)
class Comparison:
    """Two different answers to one prompt, the better and the worse."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str = field(default="", compare=False)
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.chosen == self.rejected:
            raise UserError(
                f"{located(self.where)}`chosen` and `rejected` are equal, so nothing is preferred; "
                "remove the row or mend it"
            )

    def as_ranking(self) -> Ranking:
        """The same preference as a ranking of two."""
        answers = (self.chosen, self.rejected)
        return Ranking(self.prompt, answers, ((0,), (1,)), self.where, self.margin)


@dataclass(frozen=True)
class Unpaired:
    """One answer judged desirable (`label` true) or undesirable on its own."""

    prompt: Text
    completion: Text
    label: bool
    where: str = field(default="", compare=False)


Record = Prompt | Demonstration | Conversation | Comparison | Ranking | Unpaired


@dataclass
class RowCounts:
    """How many rows were read, used, cut and dropped, and why; nothing goes missing silently.

    A pair that is read as two unpaired answers counts as two rows.
    """

    read: int = 0
    used: int = 0
    truncated: int = 0
    tied_pairs: int = 0  # of answers in used rankings: they carry no order
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count one row that will not be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def as_dict(self) -> dict[str, object]:
        """For `run.json`."""
        names = ("read", "used", "truncated", "tied_pairs")
        return {**{name: getattr(self, name) for name in names}, "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """One line for people.

        >>> RowCounts(10, 8, 1, 3, {"too long": 2}).summary()
        'read 10 rows, used 8 (1 truncated, 3 tied pairs), dropped 2 (too long)'
        """
        line = f"read {self.read} rows, used {self.used}"
        told = [f"{self.truncated} truncated"] if self.truncated else []
        told += [f"{self.tied_pairs} tied pairs"] if self.tied_pairs else []
        line += f" ({', '.join(told)})" if told else ""
        parts = [f"{count} ({reason})" for reason, count in self.dropped.items()]
        return line + (f", dropped {', '.join(parts)}" if parts else "")


def located(where: str) -> str:
    """`where` as the beginning of an error line, or nothing where it is not known."""
    return f"{where}: " if where else ""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


# --- records as JSON -----------------------------------------------------------------------------


def text_to_json(text: Text) -> object:
    """A string as it is; messages as TRL's list of objects."""
    if isinstance(text, str):
        return text
    return [{"role": message.role, "content": message.content} for message in text]


def ranking_to_json(ranking: Ranking) -> dict[str, object]:
    """`prompt`, `completions` and `tiers`."""
    return {
        "prompt": text_to_json(ranking.prompt),
        "completions": [text_to_json(completion) for completion in ranking.completions],
        "tiers": [list(tier) for tier in ranking.tiers],
    }


def to_json(record: Record) -> dict[str, object]:
    """The row, with TRL's column names, that reads back as this record."""
    if isinstance(record, Conversation):
        return {"messages": text_to_json(record.messages)}
    if isinstance(record, Ranking):
        return ranking_to_json(record)
    row: dict[str, object] = {"prompt": text_to_json(record.prompt)}
    if isinstance(record, Prompt):
        row.update(record.extra)
    elif isinstance(record, Comparison):
        row |= {"chosen": text_to_json(record.chosen), "rejected": text_to_json(record.rejected)}
        row |= {"margin": record.margin} if record.margin else {}
    else:
        row["completion"] = text_to_json(record.completion)
        if isinstance(record, Unpaired):
            row["label"] = record.label
    return row


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well and its bytes are on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write a whole file, or leave what was there."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one object a line (gzip for `.gz`, the same bytes every time), or nothing at all."""
    with atomic_file(path) as file:
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if _is_gz(path) else None
        for row in rows:
            (packed or file).write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if packed:
            packed.close()


# --- reading -------------------------------------------------------------------------------------


def _is_gz(path: Path | str) -> bool:
    return str(path).endswith(".gz")


def read_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, row) of a JSONL, JSONL.gz, CSV or Parquet file.

    Raises UserError for what cannot be read: the file, a line that is not UTF-8 or not a JSON
    object, a CSV row that does not fit its header.
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
            yield from _read_csv(name)
        else:
            yield from _read_jsonl(name)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); check or fetch it again") from error


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte can be told with its line."""
    with gzip.open(name, "rb") if _is_gz(name) else open(name, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}:{number}: byte 0x{error.object[error.start]:02x} at column "
                    f"{error.start + 1} is not UTF-8; convert the file "
                    "(iconv -f ITS-ENCODING -t UTF-8)"
                ) from error


def _read_jsonl(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(name):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = first_line(error)
            if isinstance(error, json.JSONDecodeError):
                told = f"{error.msg}, column {error.colno}"
            raise UserError(
                f"{where}: malformed JSON ({told}); each line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a JSON {json_type(row)}; each line must be one JSON object with the "
                "columns as keys"
            )
        yield where, row


def _read_csv(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells are strings; a quoted cell may span lines, then the row's first line is named."""
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
                raise UserError(
                    f"{where}: {len(cells)} cells under {len(header)} columns "
                    f"({', '.join(header)}); quote cells that hold commas or line breaks"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}:{start}: malformed CSV ({error}); mend it or use JSONL") from error


def _read_parquet(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows are numbered from 1."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{name}: Parquet needs pyarrow; pip install pyarrow") from error
    try:
        number = 0
        with parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", row
    except arrow.ArrowException as error:
        told = first_line(error)
        raise UserError(f"{name}: malformed Parquet ({told}); write it again") from error


def json_type(value: object) -> str:
    """What JSON calls a value's type.

    >>> [json_type(value) for value in (None, True, 1.5, "a", [], {})]
    ['null', 'boolean', 'number', 'string', 'list', 'object']
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {str: "string", list: "list", dict: "object", int: "number", float: "number"}
    return kinds.get(type(value), type(value).__name__)
