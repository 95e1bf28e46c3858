"""What the labelling page says: words.en.json and words.ko.json, by language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

LANGUAGES = ("en", "ko")


def read_words() -> dict[str, Mapping[str, str]]:
    """The words of each language; `reason-...` are what a refusal says."""
    folder = files("prefloop.labelling.web")
    return {n: json.loads((folder / f"words.{n}.json").read_text("utf-8")) for n in LANGUAGES}


def pick_language(cookie: str | None, accepted: str) -> str:
    """The language chosen before, else the first of the browser's that the page speaks.

    >>> pick_language(None, "fr,ko-KR;q=0.9,en;q=0.8")
    'ko'
    """
    if cookie in LANGUAGES:
        return str(cookie)
    for item in accepted.split(","):
        name = item.split(";")[0].strip()[:2].lower()
        if name in LANGUAGES:
            return name
    return "en"
