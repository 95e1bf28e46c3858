"""`prefloop label backup`: a store as it stands at one moment, while it is served."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from prefloop.config.labelling import LabelBackupConfig
from prefloop.errors import UserError
from prefloop.labelling.export import is_store
from prefloop.labelling.store import Store
from prefloop.labelling.store.copying import copy_file, copy_rows, finish, half_name


def run(config: LabelBackupConfig) -> dict[str, Any]:
    """Copy --store to --output, which must be new, and count what the copy holds."""
    to_file = "://" not in config.output
    if not is_store(config.output) or "#" in config.output:
        raise UserError(f"--output {config.output}: give NAME.db, or a postgresql URL")
    if to_file and Path(config.output).exists():
        raise UserError(f"--output {config.output}: it is there already; give another name")
    with closing(Store(config.store, must_exist=True)) as store:
        if to_file and store.is_sqlite:
            counts = copy_file(store, Path(config.output))
        elif to_file:
            half = half_name(Path(config.output))
            half.unlink(missing_ok=True)
            counts = copy_rows(store, str(half))
            finish(half, Path(config.output))
        else:
            counts = copy_rows(store, config.output)
        with store.write() as t:
            t.log("backup", None, output=Path(config.output).name, **counts)
    return {"output": config.output, **counts}
