"""`prefloop export`: a run's model for others: merged, cast, as a GGUF file, pushed to the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from prefloop import hub
from prefloop.card import Contents, model_card, run_of
from prefloop.config import ExportConfig
from prefloop.errors import UserError, first_line
from prefloop.files import check_folder
from prefloop.models import adapters
from prefloop.models.export import save_model, whole_folder
from prefloop.models.gguf import KINDS, require_convertible, write_gguf
from prefloop.models.load import is_scorer_folder, load_policy, load_scorer, load_tokenizer
from prefloop.models.model import LoadedModel
from prefloop.resume import read_record
from prefloop.runs import model_path

CARD = "README.md"
EMPTY_FORM = "# Model Card for Model ID"  # that PEFT puts beside adapters


def export(config: ExportConfig) -> Path | str:
    """Writes the folder, and pushes it where asked; returns its path, or the repository's URL."""
    # 1. What is there, and whether it can become what is asked for.
    source = _finished(config.run)
    _check(config, source)
    if config.output is not None:
        if os.path.lexists(config.output):
            raise UserError(f"--output {config.output} exists; choose another")
        check_folder(config.output.absolute().parent)
    if config.push_to_hub is not None:
        hub.require_login(config.push_to_hub)
    # 2. The folder; without --output only as long as it is pushed.
    if config.output is None:
        assert config.push_to_hub is not None  # by the settings' own rule
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            _write(config, source, folder)
            mend = "give the same command again, or --output FOLDER to keep what was written"
            return hub.push(folder, config.push_to_hub, config.private, mend)
    _write(config, source, config.output)
    # 3. The hub.
    if config.push_to_hub is not None:
        hub.push(config.output, config.push_to_hub, config.private)
    return config.output


def _finished(path: str) -> str:
    """The model's folder or hub id; UserError for a run that has none yet."""
    adapters.require_there(path)
    record = read_record(Path(path))
    if record is not None and record["status"] != "finished":
        raise UserError(
            f"{path}: the run is {record['status']}, not finished; give its command again first"
        )
    return model_path(path)


def _check(config: ExportConfig, source: str) -> None:
    scorer = is_scorer_folder(source)  # which says where it is no model
    if config.gguf:
        _check_gguf(config, source, scorer)
    if not adapters.is_adapter_folder(source):
        if config.merge:
            raise UserError(f"--merge: {source} holds whole weights, and no adapter; leave it out")
        return
    base = adapters.root_base(source)
    if config.merge:
        return
    if config.dtype != "auto":
        raise UserError(
            f"--dtype {config.dtype}: {source} is an adapter, which stays as it is; give --merge"
        )
    if config.push_to_hub and Path(base).exists():
        raise UserError(
            f"--push-to-hub: {source} is an adapter of {base}, which nobody else can load; give "
            "--merge"
        )


def _check_gguf(config: ExportConfig, source: str, scorer: bool) -> None:
    if scorer:
        raise UserError(f"--gguf: {source} is a reward model, which llama.cpp does not read")
    if adapters.is_adapter_folder(source) and not config.merge:
        raise UserError(f"--gguf: {source} is an adapter; give --merge")
    require_convertible(adapters.root_base(source), load_tokenizer(source))


def _write(config: ExportConfig, source: str, folder: Path) -> None:
    """The whole folder with its card, or nothing."""
    adapter = adapters.is_adapter_folder(source) and not config.merge
    scorer = is_scorer_folder(source)
    run, position, file = run_of(Path(source)), "rendered", ""
    name = config.push_to_hub or folder.name
    try:
        with whole_folder(folder) as place:
            if adapter:
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                cpu = torch.device("cpu")
                model = load_scorer(source, cpu) if scorer else load_policy(source, cpu)
                chosen = None if config.dtype == "auto" else getattr(torch, config.dtype)
                chosen = chosen or model.source_dtype
                if config.gguf:
                    file = f"{name.rpartition('/')[2]}-{KINDS[chosen]}.gguf"
                    _save_gguf(model, place / file, chosen)
                else:
                    save_model(model, place, chosen)
                position = model.score_position if scorer else position
            contents = Contents(name, adapter, scorer, position, file)
            _write_card(place / CARD, config, source, run, contents)
            if os.path.lexists(folder):
                raise UserError(f"--output {folder} exists by now; choose another")
    except OSError as error:
        raise UserError(f"--output {folder}: {first_line(error)}; choose another") from error


def _save_gguf(model: LoadedModel, file: Path, dtype: torch.dtype) -> None:
    """By way of the folder, so that both forms of an export hold the same weights."""
    with tempfile.TemporaryDirectory(dir=file.parent) as plain:
        save_model(model, Path(plain), dtype)
        write_gguf(Path(plain), file)


def _write_card(
    file: Path, config: ExportConfig, source: str, run: Path | None, contents: Contents
) -> None:
    """A run's own; a folder that no run made keeps its card, where it has one and its form."""
    there = Path(source) / CARD
    if (
        run is None
        and not contents.gguf
        and there.exists()
        and EMPTY_FORM not in there.read_text(encoding="utf-8")
    ):
        shutil.copyfile(there, file)
        return
    base = source
    if adapters.is_adapter_folder(source):
        base = adapters.root_base(source)
    file.write_text(model_card(run, str(run or base), contents), encoding="utf-8")
