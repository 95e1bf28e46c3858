"""What models wrote -> HTML that does nothing: no scripts, links, images, loads or hidden marks."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt

MARKDOWN_CHARACTERS = 20_000
"""Longer texts are shown as plain text: Markdown of a megabyte takes seconds."""
SHOWN_CHARACTERS = 100_000
"""What is shown of a text; the rest is cut, with a line that says so."""
TAGS = set(
    "p br hr em strong s code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th "
    "td".split()
)
# Marks that change the direction of text, or that nobody can see, are shown by their number. The
# joiners that scripts and emoji need (U+200C, U+200D) stay.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
HALVES = re.compile("[\ud800-\udfff]")


class Renderer:
    """Markdown without HTML, links and images, then sanitised again by tag."""

    def __init__(self) -> None:
        self._markdown = MarkdownIt("commonmark", {"html": False, "maxNesting": 20}).enable("table")
        self._markdown.disable(["image", "link", "autolink", "reference"])

    def text(self, content: str) -> str:
        """One text as inert HTML."""
        cut = len(content) > SHOWN_CHARACTERS
        seen = visible(content[:SHOWN_CHARACTERS])
        if len(seen) > MARKDOWN_CHARACTERS:
            html = f"<pre>{escape(seen)}</pre>"
        else:
            html = self._markdown.render(seen)
        html = nh3.clean(html, tags=TAGS, attributes={})
        if cut:
            html += f"<p><em>[{len(content):,} / {SHOWN_CHARACTERS:,}]</em></p>"
        return html

    def turns(self, content: Any) -> list[dict[str, str]]:
        """{role, html} of each message of a chat; a plain string has no role."""
        if isinstance(content, str):
            return [{"role": "", "html": self.text(content)}]
        return [{"role": visible(m["role"]), "html": self.text(m["content"])} for m in content]


def visible(content: str) -> str:
    """The text with unseen marks shown by their number, and half characters replaced.

    >>> visible("a\\u202eb")
    'a⟦U+202E⟧b'
    """
    content = content.replace("\r\n", "\n")
    whole = HALVES.sub("\ufffd", content)
    return UNSEEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", whole)
