"""The admin's pages: progress, labellers, flags, quality, disagreements, adjudication, export."""

import json
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, get_args
from urllib.parse import parse_qs, urlencode

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import Field

from prefloop.config.labelling import Consensus, Form
from prefloop.errors import UserError
from prefloop.labelling import report
from prefloop.labelling.assign import Refused
from prefloop.labelling.export import audit, decisions, project_id_of
from prefloop.labelling.forms import form_rows
from prefloop.labelling.outside import tiers_of_ranks
from prefloop.labelling.quality import disagreements, measure
from prefloop.labelling.store import Transaction
from prefloop.labelling.store import reading as r
from prefloop.labelling.web.security import COOKIE, csrf_matches
from prefloop.records import RowCounts

if TYPE_CHECKING:
    from prefloop.labelling.web.app import Site

Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""What a database's integer column can be asked for."""
SHOWN_FLAGS = 100
"""Flagged annotations on the page; the audit export has them all."""


def add_admin(app: FastAPI, site: "Site") -> None:
    """The routes below /admin, for admins only."""

    def admin(request: Request) -> dict[str, Any]:
        labeller = site.labeller(request)
        if labeller["role"] != "admin":
            raise Refused("forbidden")
        return labeller

    async def form(request: Request) -> dict[str, str]:
        """A form's fields; Refused without the session's token."""
        try:
            sent = parse_qs((await request.body()).decode(), errors="strict")
        except ValueError:  # bytes that are not UTF-8, plain or as %FF; or too many fields
            raise Refused("malformed") from None
        fields = {k: v[0] for k, v in sent.items()}
        if not csrf_matches(request.cookies.get(COOKIE, ""), fields.get("csrf", "")):
            raise Refused("csrf")
        return fields

    _add_views(app, site, admin)
    _add_export(app, site, admin)
    _add_changes(app, site, admin, form)


def _project(t: Transaction, name: str | None) -> Mapping[str, Any] | None:
    """The project of that name, else the newest one."""
    listed = t.projects()
    return next((p for p in listed if p["name"] == name), listed[-1] if listed else None)


def _add_views(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin")
    def overview(request: Request, who: Admin, project: str | None = None) -> Response:
        with site.store.read() as t:
            chosen = _project(t, project)
            if chosen is None:
                return site.page(request, "message.html", 404, key="finished")
            flagged = r.flagged_of(t, chosen["id"], SHOWN_FLAGS)
            context: dict[str, Any] = {
                "projects": [p["name"] for p in t.projects()],
                "project": chosen,
                "progress": r.progress_of(t, chosen["id"]),
                "hours": [(_hour(at), n) for at, n in r.throughput_of(t, chosen["id"])],
                "labellers": r.labellers_of(t, chosen["id"]),
                "flagged": flagged,
                "events": [{**e, "at": _hour(e["at"])} for e in r.events_of(t, 20)],
            }
        context |= {"forms": get_args(Form), "consensus": get_args(Consensus)}
        return site.page(request, "admin.html", **context)

    @app.get("/admin/quality")
    def quality(request: Request, who: Admin, project: str) -> Response:
        measured = _or_404(measure, site.store, project)
        if measured is None:
            return site.page(request, "message.html", 404, key="finished")
        worst = disagreements(site.store, project)
        words = site.words[site.language(request)]
        context: dict[str, Any] = report.context(measured, words)
        return site.page(request, "admin_quality.html", worst=worst, project=project, **context)

    @app.get("/admin/task")
    def task(request: Request, who: Admin, project: str, id: Number) -> Response:
        with site.store.read() as t:
            task_row = r.task_of(t, project_id_of(t, project), id)
            if task_row is None:
                return site.page(request, "message.html", 404, key="finished")
            prompt, completions = r.texts_of(t, task_row["prompt_id"], task_row["response_ids"])
            said = list(r.annotations_of(t, task_row["project_id"], id))
        context: dict[str, Any] = {
            "project": project,
            "task": task_row,
            "prompt": site.renderer.turns(prompt),
            "answers": [site.renderer.turns(c) for c in completions],
            "said": [(a, _places(a.tiers)) for a in said],
        }
        return site.page(request, "admin_task.html", **context)


def _add_export(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin/export")
    def export(
        who: Admin, project: str, form: Form = "rankings", consensus: Consensus = "labeller"
    ) -> Response:
        counts = RowCounts()
        if form == "audit":
            rows = audit(site.store, project)
        else:
            decided = decisions(site.store, project, consensus, (), counts)
            rows = [row for d in decided for row in form_rows(form, d, counts)]
        with site.store.write() as t:
            details = {"project": project, "form": form, "consensus": consensus, "rows": len(rows)}
            t.log("export", who["id"], **details, left_out=counts.dropped)
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        name = {"Content-Disposition": f'attachment; filename="{form}.jsonl"'}
        return Response(content, media_type="application/jsonl", headers=name)


def _add_changes(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]
    Fields = Annotated[dict[str, str], Depends(form)]

    @app.post("/admin/adjudicate")
    def adjudicate(who: Admin, fields: Fields) -> Response:
        """The admin's own order of a task, which goes before the labellers' at export."""
        try:
            task_id, project = _number(fields["task"]), fields["project"]
            with site.store.read() as t:
                task_row = r.task_of(t, project_id_of(t, project), task_id)
            assert task_row is not None
            places = [_number(fields[f"place-{n}"]) for n in range(len(task_row["response_ids"]))]
        except (KeyError, ValueError, AssertionError):
            raise Refused("malformed") from None
        name = f"{who['name']} (adjudication)"
        with site.store.write() as t:
            known = t.labeller_named(name)
            by = known["id"] if known else t.put_labeller(name, "labeller", secrets.token_hex(32))
            t.set_active(by, False)  # it has no link
            t.put_finished(task_id, by, "adjudication", tiers_of_ranks(places))
            t.log("adjudicate", who["id"], task=task_id, places=places)
        return RedirectResponse(f"/admin/quality?{urlencode({'project': project})}", 303)

    @app.post("/admin/labellers")
    def add_labeller(request: Request, who: Admin, fields: Fields) -> Response:
        """A new labeller, or a new link of a known one; the link is shown this once."""
        name, role = fields.get("name", "").strip(), fields.get("role", "labeller")
        if not name.isprintable() or not 0 < len(name) <= 100 or role not in ("labeller", "admin"):
            raise Refused("malformed")
        token = secrets.token_urlsafe(32)
        with site.store.write() as t:
            labeller_id = t.put_labeller(name, role, token)
            t.log("add user", who["id"], name=name, role=role, labeller=labeller_id)
        link = f"{request.headers['origin']}/enter?token={token}"
        return site.page(request, "admin_link.html", name=name, link=link)

    @app.post("/admin/access")
    def access(who: Admin, fields: Fields) -> Response:
        """Let a labeller in or shut the door; nobody shuts it on themselves."""
        active = fields.get("active") == "yes"
        try:
            labeller_id = _number(fields.get("labeller", ""))
        except ValueError:
            raise Refused("malformed") from None
        if labeller_id == who["id"]:
            raise Refused("malformed")
        with site.store.write() as t:
            t.set_active(labeller_id, active)
            t.log("access", who["id"], labeller=labeller_id, active=active)
        return RedirectResponse("/admin", 303)


def _number(text: str) -> int:
    """A `Number` of a form; ValueError for any other text."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def _or_404(function: Any, *words: Any) -> Any:
    try:
        return function(*words)
    except UserError:
        return None


def _places(tiers: Any) -> dict[int, int]:
    """The place of each answer, 1 for the best; nothing where the task was skipped."""
    return {i: place for place, tier in enumerate(tiers or (), 1) for i in tier}


def _hour(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
