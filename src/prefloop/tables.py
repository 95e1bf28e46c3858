"""A source's rows as they stand there: a file, a folder saved by `datasets`, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from prefloop.errors import UserError, first_line
from prefloop.files import SUFFIXES, OnBad, plain, raise_bad, read_rows


def rows_of(source: str, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`source:number`, row) of a file, or of `NAME`, `NAME#CONFIG`, `NAME#CONFIG:SPLIT`.

    The names are those of a folder or a hub id that `datasets` reads; `NAME#:SPLIT` has no
    configuration. Without a split it is `train`, or the only one. `on_bad` is read_rows'.
    """
    name, _, part = source.partition("#")
    config, _, split = part.partition(":")
    path = Path(name)
    local = name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.is_file() or (local and not path.is_dir()):
        if part:
            raise UserError(f"{source}: a file has no configurations or splits; leave #{part} out")
        yield from read_rows(name, on_bad)
        return
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        what = "a folder" if path.is_dir() else "no file, so a hub id"
        raise UserError(
            f"{name}: {what}, which needs the datasets package; pip install datasets"
        ) from error
    try:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        data = (
            datasets.load_from_disk(name)
            if saved
            else datasets.load_dataset(name, *([config] if config else []))
        )
    except Exception as error:  # whatever the package, the network or the hub say
        told = first_line(error)
        raise UserError(f"{source}: datasets cannot load it ({told}); check the name") from error
    data = _split(data, split, source)
    for number, row in enumerate(data, 1):
        yield f"{source}:{number}", {key: plain(value) for key, value in row.items()}


def _split(data: Any, split: str, source: str) -> Any:
    if not isinstance(data, dict):
        if split:
            raise UserError(f"{source}: one table without splits; leave :{split} out")
        return data
    told = ", ".join(data)
    if split and split not in data:
        raise UserError(f"{source}: splits {told}; choose one of them")
    if not split and "train" not in data and len(data) > 1:
        raise UserError(
            f"{source}: splits {told}, and none is `train`; name one, as {source}#:NAME"
        )
    return data[split or ("train" if "train" in data else next(iter(data)))]
