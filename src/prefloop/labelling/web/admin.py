"""The admin's pages: progress, labellers, flags, quality, export. Tasks are tasks.py's, settings,
members and charts project.py's."""

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response

from prefloop.config.checks import validate
from prefloop.config.labelling import Consensus, Form, LabelExportConfig
from prefloop.files import plain
from prefloop.labelling import report
from prefloop.labelling.assign import Refused
from prefloop.labelling.export import project_id_of, project_of, training_rows
from prefloop.labelling.quality import measure
from prefloop.labelling.store import reading as r
from prefloop.labelling.store import workbench as w
from prefloop.labelling.web.own import said_at
from prefloop.labelling.web.project import add_project
from prefloop.labelling.web.security import COOKIE, csrf_matches
from prefloop.labelling.web.tasks import add_tasks, number
from prefloop.records import RowCounts

if TYPE_CHECKING:
    from prefloop.labelling.web.app import Site

SHOWN_FLAGS, SHOWN_DISPUTED = 20, 20
"""Tasks on the overview and the quality page; the list of tasks has them all."""
LABELLERS = 50
"""On one page."""


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
    add_tasks(app, site, admin, form)
    add_project(app, site, admin, form)


def _add_views(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin")
    def overview(
        request: Request, who: Admin, project: str | None = None, people: str = ""
    ) -> Response:
        """A project, the newest where none is named; `people`: the labeller to list on after."""
        with site.store.read() as t:
            listed = t.projects()
            if project is None and not listed:
                return site.message(request, "no-project-none", 404)
            chosen = listed[-1] if project is None else project_of(t, project)
            labellers = r.labellers_of(t, chosen["id"], people, LABELLERS + 1)
            context: dict[str, Any] = {
                "projects": [p["name"] for p in listed],
                "project": chosen["name"],
                "found": chosen,
                "progress": r.progress_of(t, chosen["id"]),
                "labellers": labellers[:LABELLERS],
                "more": labellers[LABELLERS - 1]["name"] if len(labellers) > LABELLERS else None,
                "flagged": w.flagged_of(t, chosen["id"], SHOWN_FLAGS),
                "events": [{**e, "at": said_at(e["at"])} for e in r.events_of(t, 20)],
                "everybody": sorted(r.labellers_named(t)),
            }
        context |= {"forms": get_args(Form), "consensus": get_args(Consensus)}
        return site.page(request, "admin.html", **context)

    @app.get("/admin/quality")
    def quality(request: Request, who: Admin, project: str) -> Response:
        measured = measure(site.store, project)
        with site.store.read() as t:
            disputed = w.Wanted("disputed")
            worst, _ = w.tasks_of(t, project_id_of(t, project), disputed, SHOWN_DISPUTED)
        words = site.words[site.language(request)]
        context: dict[str, Any] = report.context(measured, words)
        return site.page(request, "admin_quality.html", worst=worst, project=project, **context)


def _add_export(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin/export")
    def export(
        who: Admin,
        project: str,
        form: Form = "rankings",
        consensus: Consensus = "labeller",
        margins: bool = False,
        exclude: Annotated[list[str], Query()] = [],  # noqa: B006 - FastAPI copies it
        eval_fraction: float = 0.0,
        part: Literal["train", "eval"] = "train",
    ) -> Response:
        """The rows that `label export` writes, of the training prompts or of the held-out ones."""
        config = LabelExportConfig(
            store=site.store.name, project=project, output=Path(f"{form}.jsonl"), form=form,
            consensus="labeller" if form == "audit" else consensus, label_margins=margins,
            exclude=tuple(exclude), eval_fraction=eval_fraction,
        )  # fmt: skip
        validate(config)
        counts = RowCounts()
        rows = training_rows(site.store, config, counts)[part == "eval"]
        with site.store.write() as t:
            details = {"project": project, "form": form, "consensus": consensus, "rows": len(rows)}
            details |= {"exclude": exclude, "margins": margins, "part": part}
            t.log("export", who["id"], **details, left_out=counts.dropped)
        lines = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows)
        name = f"{form}.eval.jsonl" if part == "eval" else f"{form}.jsonl"
        return Response(
            "".join(f"{line}\n" for line in lines),
            media_type="application/jsonl",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )


def _add_changes(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]
    Fields = Annotated[dict[str, str], Depends(form)]

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
            labeller_id = number(fields.get("labeller", ""))
        except ValueError:
            raise Refused("malformed") from None
        if labeller_id == who["id"]:
            raise Refused("malformed")
        with site.store.write() as t:
            t.set_active(labeller_id, active)
            t.log("access", who["id"], labeller=labeller_id, active=active)
        return RedirectResponse("/admin", 303)
