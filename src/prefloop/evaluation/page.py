"""What the report pages share: one file each, nothing to load, and what models wrote is data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefloop.evaluation.figures import Picture

TEMPLATES = files("prefloop.evaluation") / "templates"


def render_page(template: str, **contents: object) -> str:
    """The whole page as HTML. Its policy lets no script run but its own, and loads nothing."""
    environment = Environment(
        loader=PackageLoader("prefloop.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = {name: _read(f"{name}.js") for name in ("theme", "answers")}
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in scripts.values())
    return environment.get_template(template).render(
        style=Markup(_read("page.css")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}",
        **contents,
    )


class Numbered:
    """Draws pictures with ids of their own; of one page, one."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count(1)

    def __call__(self, pictures: Iterable[Picture]) -> list[Markup]:
        """Each as SVG."""
        return [Markup(picture.svg(next(self._numbers))) for picture in pictures]


def embedded(data: object) -> Markup:
    r"""JSON for a script element: no text in it can end the element, or be no text at all.

    >>> embedded("</script>\ud800")
    Markup('"\\u003c/script>\\ud800"')
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(re.sub("[\ud800-\udfff\u2028\u2029\x7f-\x9f]", _written_out, text))


def _written_out(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
