"""What models and files say, made fit for a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""The text with control characters written out, line breaks and tabs but.

    Raw, they could move the cursor, clear the screen, or set the title and the clipboard.

    >>> shown("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def as_is(text: str) -> Text:
    """The same for rich's tables and titles, which would read `[bold]` as their own markup."""
    from rich.text import Text

    return Text(shown(text))
