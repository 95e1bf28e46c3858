"""`prefloop fetch-data`: the rows of a use, from public data, split without leaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prefloop.config import FetchDataConfig
from prefloop.files import check_folder, write_atomic
from prefloop.recipes import chat_data, sentiment_data, style_data, text_data

USES: dict[str, Callable[[Path], dict[str, object]]] = {
    "chat": chat_data.write,
    "mqm": text_data.write_mqm,
    "sentiment": sentiment_data.write,
    "style": style_data.write,
    "summary": text_data.write_summary,
    "translation": text_data.write_translation,
}


def fetch_data(config: FetchDataConfig) -> dict[str, object]:
    """Write the use's rows to `config.output`, and what they are to data.json there."""
    check_folder(config.output)
    facts = USES[config.use](config.output)
    write_atomic(config.output / "data.json", json.dumps(facts, indent=2) + "\n")
    return facts
