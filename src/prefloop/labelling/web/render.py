"""What models wrote -> HTML that does nothing: no scripts, links, images, loads or hidden marks."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

MARKDOWN_CHARACTERS = 20_000
"""Longer texts are shown as plain text: Markdown of a megabyte takes seconds."""
SHOWN_CHARACTERS = 100_000
"""What is shown of a text; the rest is cut, with a line that says so."""
TAGS = set(
    "p br hr em strong s code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th "
    "td b i samp var".split()
)
ATTRIBUTES = {"ol": {"start"}}
"""A list that begins at 3 says so; nothing else has any attribute."""
COLOURED = {  # bare elements, which the style sheet colours inside of code
    Token.Keyword: "b",
    Token.Comment: "i",
    Token.Literal.String: "samp",
    Token.Literal.Number: "var",
}
MATHS = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
"""What opens and closes TeX."""
MATHS_LINES = 50
"""Of one displayed formula: looking for its end takes time."""
# Marks that change the direction of text, or that nobody can see, are shown by their number. The
# joiners that scripts and emoji need (U+200C, U+200D) stay.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
HALVES = re.compile("[\ud800-\udfff]")


class Renderer:
    """Markdown without HTML, links and images, then sanitised again by tag.

    A line break stays one, and TeX stays as it was written: Markdown would take its backslashes,
    stars and underscores for its own marks.
    """

    def __init__(self) -> None:
        options = {"html": False, "maxNesting": 20, "breaks": True, "highlight": _coloured}
        self._markdown = MarkdownIt("commonmark", options).enable("table")
        self._markdown.disable(["image", "link", "autolink", "reference"])
        self._markdown.inline.ruler.before("escape", "maths", _maths)
        stops: RuleOptionsType = {"alt": ["paragraph", "blockquote", "list"]}
        self._markdown.block.ruler.before("fence", "maths", _maths_block, stops)

    def text(self, content: str) -> str:
        """One text as inert HTML."""
        cut = len(content) > SHOWN_CHARACTERS
        seen = visible(content[:SHOWN_CHARACTERS])
        if len(seen) > MARKDOWN_CHARACTERS:
            html = f"<pre>{escape(seen)}</pre>"
        else:
            html = self._markdown.render(seen)
        html = nh3.clean(html, tags=TAGS, attributes=ATTRIBUTES)
        if cut:
            html += f"<p><em>[{len(content):,} / {SHOWN_CHARACTERS:,}]</em></p>"
        return html

    def turns(self, content: Any) -> list[dict[str, str]]:
        """{role, html, raw} of each message of a chat; a plain string has no role.

        `raw` is the text itself, with unseen marks shown.
        """
        said = [{"role": "", "content": content}] if isinstance(content, str) else content
        return [
            {
                "role": visible(one["role"]),
                "html": self.text(one["content"]),
                "raw": visible(one["content"][:SHOWN_CHARACTERS]),
            }
            for one in said
        ]


def _maths(state: StateInline, silent: bool) -> bool:
    r"""TeX inside of a line: \(...\), \[...\], $$...$$, and $...$ that hugs what it holds.

    "$5 and $6" is no TeX: a closing dollar follows no space and comes before no digit.
    """
    for opening, closing in MATHS:
        if not state.src.startswith(opening, state.pos):
            continue
        start = state.pos + len(opening)
        end = state.src.find(closing, start, state.posMax)
        inside = state.src[start:end]
        if end <= start:
            continue
        end += len(closing)
        if opening == "$" and (
            inside != inside.strip() or "\n\n" in inside or state.src[end : end + 1].isdigit()
        ):
            continue
        if not silent:
            _as_written(state, state.src[state.pos : end])
        state.pos = end
        return True
    return False


def _as_written(state: StateInline, written: str) -> None:
    for number, line in enumerate(written.split("\n")):
        if number:
            state.push("hardbreak", "br", 0)
        state.push("text", "", 0).content = line


def _maths_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    r"""TeX on lines of its own, from \[ or $$ to its end: a line of it may begin with + or #."""
    if state.is_code_block(start):
        return False

    def line(number: int) -> str:
        return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]

    first = line(start)
    closing = next((c for o, c in MATHS[:2] if first.startswith(o)), None)
    if closing is None:
        return False
    last, end = start, min(end, start + MATHS_LINES)
    while not line(last).rstrip().endswith(closing) or (last == start and len(first.strip()) < 4):
        last += 1
        if last >= end or state.sCount[last] < state.blkIndent:
            return False
    if not silent:
        state.push("maths_open", "p", 1)
        inline = state.push("inline", "", 0)
        inline.content = "\n".join(line(number) for number in range(start, last + 1))
        inline.map, inline.children = [start, last + 1], []
        state.push("maths_close", "p", -1)
        state.line = last + 1
    return True


def _coloured(code: str, name: str, attributes: str) -> str:
    """Code of a language that is known, its kinds of words in elements of their own."""
    try:
        lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False) if name else None
    except ClassNotFound:
        lexer = None
    if lexer is None:
        return escape(code)
    parts = []
    for kind, words in lexer.get_tokens(code):
        tag = next((tag for of, tag in COLOURED.items() if kind in of), None)
        parts.append(f"<{tag}>{escape(words)}</{tag}>" if tag else escape(words))
    return "".join(parts)


def visible(content: str) -> str:
    """The text with unseen marks shown by their number, and half characters replaced.

    >>> visible("a\\u202eb")
    'a⟦U+202E⟧b'
    """
    content = content.replace("\r\n", "\n")
    whole = HALVES.sub("\ufffd", content)
    return UNSEEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", whole)
