"""A source's rows as they stand there: a file, a folder saved by `datasets`, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

from prefloop.errors import UserError, first_line
from prefloop.files import SUFFIXES, OnBad, plain, raise_bad, read_rows
from prefloop.hub import require_hub


def rows_of(source: str, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`source:number`, row) of a file, or of `NAME`, `NAME#CONFIG`, `NAME#CONFIG:SPLIT`.

    The names are those of a folder or a hub id that `datasets` reads; `NAME#:SPLIT` has no
    configuration. Without a split it is `train`, or the only one. `on_bad` is read_rows'.
    """
    name, _, part = source.partition("#")
    config, _, split = part.partition(":")
    path = Path(name)
    if path.is_file() or (name.endswith(SUFFIXES) and not path.is_dir()):
        if part:
            raise UserError(f"{source}: a file has no configurations or splits; leave #{part} out")
        yield from read_rows(name, on_bad)
        return
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{name}: no such file or folder; mend the path")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        what = "a folder" if path.is_dir() else "no file, so a hub id"
        raise UserError(
            f"{name}: {what}, which needs the datasets package; pip install datasets"
        ) from error
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if saved and config:
        raise UserError(f"{source}: a saved set has no configurations; leave {config} out")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if not path.is_dir() and not (cache / name.replace("/", "___")).is_dir():
        require_hub(name)
    try:
        if saved:
            data = datasets.load_from_disk(name)
        else:
            place = str(cache / _stamp(path)) if path.is_dir() else None
            data = datasets.load_dataset(name, *([config] if config else []), cache_dir=place)
    except Exception as error:  # whatever the package, the network or the hub say
        problem = " ".join(str(error).split("\n")[:2]).strip() or first_line(error)
        raise UserError(f"{source}: datasets cannot load it ({problem}); check the name") from error
    data = _split(data, split, source).with_format(None)  # Python's values, not arrays
    for number, row in enumerate(data, 1):
        yield f"{source}:{number}", {key: plain(_listed(value)) for key, value in row.items()}


def _stamp(folder: Path) -> str:
    """A digest of a folder's files: `datasets` may take those it read before for these."""
    files = sorted((str(p), p.stat()) for p in folder.rglob("*") if p.is_file())
    states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return blake2b(repr(states).encode(), digest_size=8).hexdigest()


def _listed(value: Any) -> Any:
    """Messages that an older set holds as a table of columns, as the list that they are."""
    names = value.keys() if isinstance(value, dict) else set()
    columns = (
        list(value.values()) if {"role", "content"} <= names or {"from", "value"} <= names else []
    )
    if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return value
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _split(data: Any, split: str, source: str) -> Any:
    if not isinstance(data, dict):
        if split:
            raise UserError(f"{source}: one table without splits; leave :{split} out")
        return data
    names = ", ".join(data)
    if split and split not in data:
        raise UserError(f"{source}: splits {names}; choose one of them")
    if not split and "train" not in data and len(data) > 1:
        raise UserError(
            f"{source}: splits {names}, and none is `train`; name one, as {source}#:NAME"
        )
    return data[split or ("train" if "train" in data else next(iter(data)))]
