"""What models wrote is shown as text, whatever it is."""

import re
import time
from html.parser import HTMLParser

import pytest

from prefloop.labelling.web.render import TAGS, Renderer, visible
from tests.labelling.web.hostile import hostile_strings


class Elements(HTMLParser):
    """The elements of a page and their attributes, as an independent parser sees them."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))


def test_500_hostile_strings_become_bare_elements():
    """Elements of the allowed kinds only, without any attribute, each within a second."""
    renderer = Renderer()
    for text in hostile_strings():
        start = time.process_time()
        html = renderer.text(text)
        assert time.process_time() - start < 1.0, text[:80]
        assert len(html) < 1_000_000, text[:80]
        html.encode()
        for tag, attributes in Elements(html).found:
            assert tag in TAGS, text[:80]
            assert attributes == [], text[:80]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a** _b_ `c`", "<p><strong>a</strong> <em>b</em> <code>c</code></p>"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
        ("<b>a</b>", "<p>&lt;b&gt;a&lt;/b&gt;</p>"),
        ("[a](http://b)", "<p>[a](http://b)</p>"),
        ("![a](http://b)", "<p>![a](http://b)</p>"),
        ("a\u202eb", "<p>a⟦U+202E⟧b</p>"),
        ("\ud800", "<p>\ufffd</p>"),
        ("```py\nx\n```", "<pre><code>x\n</code></pre>"),
    ],
)
def test_markdown(text, html):
    assert Renderer().text(text).strip() == html


def test_long_texts_are_plain_and_cut_with_a_note():
    plain = Renderer().text("**a** " * 4_000)
    assert plain.startswith("<pre>**a** **a**")
    cut = Renderer().text("x" * 1_000_000)
    assert "[1,000,000 / 100,000]" in cut
    assert len(cut) < 101_000


def test_unseen_marks_are_shown_and_needed_joiners_stay():
    assert visible("a\u200bb\x1b") == "a⟦U+200B⟧b⟦U+001B⟧"
    for text in ("\U0001f469\u200d\U0001f467", "می\u200cخواهم", "tab\tline\n"):
        assert visible(text) == text
    assert not re.search("[\ud800-\udfff]", visible("\ud83d\ude00"))
