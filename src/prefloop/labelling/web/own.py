"""A labeller's own work: a list of what was done and skipped, each to be changed."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import Response

from prefloop.labelling.export import project_of
from prefloop.labelling.store.projects import version_of
from prefloop.labelling.store.reading import count_of, work_of
from prefloop.labelling.web.render import visible

if TYPE_CHECKING:
    from prefloop.labelling.web.app import Site

PAGE = 50
"""Tasks on one page of the list."""
BEGINNING = 120
"""Characters of a prompt that are shown."""


Number = Annotated[int, Query(ge=1, le=2**31 - 1)]


def add_own(app: FastAPI, site: "Site") -> None:
    """The list, newest hand-out first; it says no more of a task than the page said."""
    Labeller = Annotated[dict[str, Any], Depends(site.labeller)]
    Page = Annotated[int, Query(ge=1, le=100_000)]

    @app.get("/guidelines")
    def guidelines(request: Request, labeller: Labeller, project: str, version: Number) -> Response:
        """Guidelines as they stood in one version of a project that the labeller sees."""
        with site.store.read() as t:
            found = version_of(t, project_of(t, project, labeller["id"])["id"], version)
        if found is None:
            return site.message(request, "no-version", 404)
        context: dict[str, Any] = {
            "project": project,
            "version": version,
            "since": said_at(found["created"]),
            "html": site.renderer.text(found["guidelines"]),
        }
        return site.page(request, "guidelines.html", **context)

    @app.get("/mine")
    def mine(
        request: Request, labeller: Labeller, page: Page = 1, skipped: bool = False
    ) -> Response:
        with site.store.read() as t:
            counts = count_of(t, labeller["id"])
            offset = PAGE * (page - 1)
            rows = work_of(t, labeller["id"], skipped, offset, PAGE + 1)
            several = len(t.projects(labeller["id"])) > 1
        words = site.words[site.language(request)]
        context: dict[str, Any] = {
            "rows": [{**row, **_shown(row, words)} for row in rows[:PAGE]],
            "counts": counts,
            "several": several,
            "page": page,
            "more": len(rows) > PAGE,
            "skipped": skipped,
        }
        return site.page(request, "mine.html", **context)


def _shown(row: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, str]:
    """A row of the list in words: how the prompt ends, what was said, and when."""
    short = beginning(row["prompt"])
    facts = [_order(row) if row["tiers"] is not None else words["skipped"]]
    facts += [words[f"strength-{row['strength']}"]] if row["strength"] else []
    facts += [words[f"confidence-{row['confidence']}"]] if row["confidence"] else []
    facts += [words["all-bad"]] if row["all_bad"] else []
    facts += [words[flag["flag"]] for flag in row["flags"]]
    facts += [visible(row["comment"])] if row["comment"] else []
    return {"asked": short, "said": " · ".join(facts), "at": said_at(row["created"])}


def beginning(prompt: Any) -> str:
    """How a prompt, or a chat's last turn, begins."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return visible(asked[:BEGINNING]) + ("…" if len(asked) > BEGINNING else "")


def said_at(seconds: float) -> str:
    """A time of the store (UTC) to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _order(row: Mapping[str, Any]) -> str:
    """Letters as the page showed them, best first: `B > A = C`; ratings as `A 7, B 2`."""
    letters = {position: "ABCDEFGHI"[place] for place, position in enumerate(row["shown"])}
    ratings: Sequence[int] | None = row["ratings"]
    if ratings is not None:
        return ", ".join(f"{letters[i]} {ratings[i]}" for i in row["shown"])
    return " > ".join(" = ".join(sorted(letters[i] for i in tier)) for tier in row["tiers"])
