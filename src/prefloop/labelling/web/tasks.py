"""The admin's list of tasks, one task with all that was said of it, and its adjudication."""

import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import Field

from prefloop.labelling.assign import Refused
from prefloop.labelling.export import project_id_of, project_of
from prefloop.labelling.outside import tiers_of_ranks
from prefloop.labelling.store import Transaction
from prefloop.labelling.store import workbench as w
from prefloop.labelling.store.reading import Annotation, annotations_of, labellers_named, texts_of
from prefloop.labelling.store.settling import put_finished
from prefloop.labelling.web.own import beginning, said_at

if TYPE_CHECKING:
    from prefloop.labelling.web.app import Site

Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""What a database's integer column can be asked for."""
PAGE = 50
"""Tasks on one page of the list."""


def number(text: str) -> int:
    """A `Number` of a form; ValueError for any other text."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def add_tasks(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    """The routes about tasks, for admins only."""
    _add_list(app, site, admin)
    _add_task(app, site, admin, form)


def _add_list(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin/tasks")
    def tasks(
        request: Request,
        who: Admin,
        project: str,
        state: w.State = "any",
        kind: w.Kind = "any",
        flagged: bool = False,
        labeller: Annotated[str, Query(max_length=200)] = "",
        text: Annotated[str, Query(max_length=200)] = "",
        after: Annotated[str, Query(max_length=60)] = "",
    ) -> Response:
        """A page of tasks; `after` is where the page before ended."""
        asked = {"project": project, "state": state, "kind": kind, "text": text}
        asked |= {"labeller": labeller} | ({"flagged": "true"} if flagged else {})
        with site.store.read() as t:
            project_id = project_id_of(t, project)
            people = labellers_named(t)
            by = people.get(labeller)
            if labeller and by is None:
                return site.message(request, "no-labeller", 404)
            wanted = w.Wanted(state, kind, flagged, by, _searchable(text), _place(after))
            rows, place = w.tasks_of(t, project_id, wanted, PAGE)
        context: dict[str, Any] = {
            **{"project": project, "asked": asked, "people": sorted(people)},
            **{"states": get_args(w.State), "kinds": get_args(w.Kind), "most": w.SEARCHED},
            "rows": [{**row, "asked": beginning(row["prompt"])} for row in rows],
            "searched": place is not None and len(rows) < PAGE,
            "next": place and urlencode({**asked, "after": f"{place[0]!r}:{place[1]}"}),
        }
        return site.page(request, "admin_tasks.html", **context)


def _add_task(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]
    Fields = Annotated[dict[str, str], Depends(form)]

    @app.get("/admin/task")
    def task(request: Request, who: Admin, project: str, id: Number) -> Response:
        with site.store.read() as t:
            found = project_of(t, project)
            task_row = w.task_of(t, found["id"], id)
            if task_row is None:
                return site.message(request, "no-task", 404)
            prompt, completions = texts_of(t, task_row["prompt_id"], task_row["response_ids"])
            said = list(annotations_of(t, task_row["project_id"], id, every_version=True))
        rulings = sorted((a for a in said if a.strategy == "adjudication"), key=lambda a: a.created)
        # Those in force are each admin's newest, unless withdrawn; the last of them counts.
        newest = {a.labeller: a for a in rulings}
        standing = [a for a in rulings if newest[a.labeller] is a and a.tiers is not None]
        context: dict[str, Any] = {
            **{"project": project, "task": task_row, "mode": found["mode"]},
            "prompt": site.renderer.turns(prompt),
            "answers": [site.renderer.turns(c) for c in completions],
            "said": [_shown(a) for a in said if _newest(a, said)],
            "rulings": [_shown(a) for a in rulings],
            "places": _shown(standing[-1])["places"] if standing else {},
        }
        return site.page(request, "admin_task.html", **context)

    @app.post("/admin/adjudicate")
    def adjudicate(who: Admin, fields: Fields) -> Response:
        """The admin's own order of a task, which goes before the labellers' at export; or its
        withdrawal."""
        places = None
        try:
            task_id, project = number(fields["task"]), fields["project"]
            with site.store.read() as t:
                task_row = w.task_of(t, project_id_of(t, project), task_id)
            assert task_row is not None
            if fields.get("withdraw") != "yes":
                count = len(task_row["response_ids"])
                places = [number(fields[f"place-{n}"]) for n in range(count)]
        except (KeyError, ValueError, AssertionError):
            raise Refused("malformed") from None
        with site.store.write() as t:
            tiers = None if places is None else tiers_of_ranks(places)
            put_finished(t, task_id, _adjudicator(t, who["name"]), "adjudication", tiers)
            t.log("adjudicate", who["id"], project=project, task=task_id, places=places)
        listed = urlencode({"project": project, "state": "disputed"})
        return RedirectResponse(f"/admin/tasks?{listed}", 303)


def _adjudicator(t: Transaction, admin: str) -> int:
    """Whom an admin's adjudications are by: apart from what the same admin labels as one of all."""
    name = f"{admin} (adjudication)"
    known = t.labeller_named(name)
    if known is not None:
        return int(known["id"])
    by = t.put_labeller(name, "adjudicator", secrets.token_hex(32))
    t.set_active(by, False)  # it has no link
    return by


def _newest(a: Annotation, said: list[Annotation]) -> bool:
    """Whether an annotation is its labeller's last word, and no adjudication."""
    last = max(b.version for b in said if b.labeller == a.labeller)
    return a.strategy != "adjudication" and a.version == last


def _shown(a: Annotation) -> Mapping[str, Any]:
    """An annotation with the place of each answer, 1 for the best; none where it was skipped."""
    places = {i: place for place, tier in enumerate(a.tiers or (), 1) for i in tier}
    return {"a": a, "places": places, "at": said_at(a.created)}


def _searchable(text: str) -> str:
    """What a browser can send and a text can hold."""
    return text.strip().encode(errors="replace").decode()


def _place(after: str) -> tuple[float, int] | None:
    """(disagreement, id) of `after`; None for the first page, Refused for what no page wrote."""
    if not after:
        return None
    found = re.fullmatch(r"([01](?:\.[0-9]+(?:e-[0-9]+)?)?):([0-9]{1,9})", after)
    if found is None:
        raise Refused("malformed")
    return float(found[1]), int(found[2])
