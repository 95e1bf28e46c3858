"""`prefloop init`: a commented pipeline for a use, with paths to fill in."""

from __future__ import annotations

from pathlib import Path

from prefloop.config import InitConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.files import check_writable, write_atomic

TEMPLATES = Path(__file__).with_name("templates")


def init(config: InitConfig) -> Path:
    """Write the pipeline of a use where nothing is yet."""
    validate(config)
    if config.output.exists():
        raise UserError(f"--output {config.output} exists; choose another")
    check_writable(config.output)
    text = (TEMPLATES / f"{config.use}.yaml").read_text(encoding="utf-8")
    text = text.replace("prefloop run pipeline.yaml", f"prefloop run {config.output}")
    write_atomic(config.output, text)
    return config.output
