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
    """Elements of the allowed kinds only, without any attribute, each within seconds."""
    renderer = Renderer()
    for text in hostile_strings():
        start = time.process_time()
        html = renderer.text(text)
        assert time.process_time() - start < 5.0, text[:80]
        assert len(html) < 1_000_000, text[:80]
        html.encode()
        for tag, attributes in Elements(html).found:
            assert tag in TAGS, text[:80]
            assert [name for name, value in attributes if not value.isdigit()] == [], text[:80]
            assert not attributes or (tag, attributes[0][0]) == ("ol", "start"), text[:80]


CODE = "<b>if</b> <var>1</var>: <samp>'</samp><samp>&lt;</samp><samp>'</samp>"
TABLE = """<table>
<thead>
<tr>
<th>a</th>
</tr>
</thead>
<tbody>
<tr>
<td>b</td>
</tr>
</tbody>
</table>"""


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
        ("```py\nif 1: '<'\n```", f"<pre><code>{CODE}\n</code></pre>"),
        ("```nonsense\nif 1\n```", "<pre><code>if 1\n</code></pre>"),
        ("old pond\na frog\nsplash", "<p>old pond<br>\na frog<br>\nsplash</p>"),
        ("3. c\n4. d", '<ol start="3">\n<li>c</li>\n<li>d</li>\n</ol>'),
        ("1. a\n2. b", "<ol>\n<li>a</li>\n<li>b</li>\n</ol>"),
        ("|a|\n|-|\n|b|", TABLE),
        # TeX is left as it is, where Markdown would take its marks for its own.
        (r"\(a_1 * b_1 * c\) *x*", r"<p>\(a_1 * b_1 * c\) <em>x</em></p>"),
        (r"$a_i*b$ and $$x_i*y$$", "<p>$a_i*b$ and $$x_i*y$$</p>"),
        ("\\[\na * b\n+ c * d\n\\]\nx", "<p>\\[<br>\na * b<br>\n+ c * d<br>\n\\]</p>\n<p>x</p>"),
        ("$$\n# x_1\n$$", "<p>$$<br>\n# x_1<br>\n$$</p>"),
        ("$5 *or* $6", "<p>$5 <em>or</em> $6</p>"),
        ("`$a$` \\[ no end", "<p><code>$a$</code> [ no end</p>"),
    ],
)
def test_markdown(text, html):
    assert Renderer().text(text).strip() == html


@pytest.mark.parametrize(
    "text",
    ["$" * 20_000, r"\(" * 10_000, "\\[\n" * 6_000, "$$ x\n" * 4_000, "```py\n" + "(" * 19_000],
)
def test_much_unfinished_tex_and_code_take_no_time(text):
    start = time.process_time()
    Renderer().text(text)
    assert time.process_time() - start < 2.0


def test_all_turns_of_an_answer_are_there_with_what_was_written():
    said = [{"role": "assistant", "content": "a\n*b*"}, {"role": "tool", "content": "c\u202e"}]
    assert Renderer().turns(said) == [
        {"role": "assistant", "html": "<p>a<br>\n<em>b</em></p>\n", "raw": "a\n*b*"},
        {"role": "tool", "html": "<p>c⟦U+202E⟧</p>\n", "raw": "c⟦U+202E⟧"},
    ]


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
