"""The admin's pages of one project: its settings and guidelines, its members, its charts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from difflib import unified_diff
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlencode

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from prefloop.config.checks import problems
from prefloop.config.labelling import LabelImportConfig, Strategy
from prefloop.config.resolve import build
from prefloop.errors import UserError
from prefloop.labelling.assign import Refused
from prefloop.labelling.export import project_of
from prefloop.labelling.store import workbench as w
from prefloop.labelling.store.projects import (
    change_project,
    locked_project,
    members_of,
    set_members,
    versions_of,
)
from prefloop.labelling.store.reading import labellers_named
from prefloop.labelling.store.schema import PACES
from prefloop.labelling.web.own import said_at
from prefloop.labelling.web.tasks import Number, number

if TYPE_CHECKING:
    from prefloop.labelling.web.app import Site

Span = Literal["hours", "days", "weeks"]
SPANS: Mapping[Span, tuple[int, str]] = {
    "hours": (3600, "%m-%d %H:00"), "days": (86_400, "%Y-%m-%d"), "weeks": (604_800, "%Y-%m-%d")
}  # fmt: skip
POINTS = 30
"""Hours, days or weeks of a chart."""
CURVES = 60
"""Labellers whose curves are drawn: those who did most."""
CHARTS = {"annotations": "%d", "agreement": "%.2f", "seconds": "%.0f"}
VERSIONS = 10
"""Versions on one page of the history."""
CHANGED_LINES = 200
"""Of one version's guidelines."""
EDITED = (
    *("need", "overlap", "overlap_need", "gold_share", "repeat_share"),
    *("strategy", "random_share", "lease_minutes"),
)
"""Settings that the page changes; the seed stays, as tasks were drawn by it."""


def add_project(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    """The routes about one project, for admins only."""
    _add_settings(app, site, admin, form)
    _add_members(app, site, admin, form)
    _add_charts(app, site, admin)


def _add_settings(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]
    Fields = Annotated[dict[str, str], Depends(form)]

    @app.get("/admin/settings")
    def settings(
        request: Request, who: Admin, project: str, before: Number | None = None
    ) -> Response:
        return _page(site, request, project, before, {}, "")

    @app.post("/admin/settings")
    def change(request: Request, who: Admin, fields: Fields) -> Response:
        """The next version; what will not do is told above the form, which keeps what was typed."""
        name = fields.get("project", "")
        guidelines = fields.get("guidelines", "").replace("\r\n", "\n")
        if "\x00" in guidelines or not set(EDITED) <= fields.keys():
            raise Refused("malformed")
        try:
            chosen = _checked({name: fields[name] for name in EDITED})
        except UserError as error:
            words = site.words[site.language(request)]
            wrong = words["settings-wrong"].format(problem=error)
            return _page(site, request, name, None, fields, wrong)
        with site.store.write() as t:
            project_of(t, name)
            found = locked_project(t, name)
            assert found is not None
            stale = fields.get("version") != str(found["version"])
            unscored = chosen["strategy"] != "random" and not w.has_scores(
                t, found["id"], chosen["strategy"]
            )
            if not (stale or unscored):
                change_project(t, found, who["id"], guidelines, {**found["settings"], **chosen})
        if stale or unscored:
            words = site.words[site.language(request)]
            wrong = words["settings-stale" if stale else "settings-unscored"]
            typed = {k: v for k, v in fields.items() if k != "version"}
            return _page(site, request, name, None, typed, wrong)
        return RedirectResponse(f"/admin/settings?{urlencode({'project': name})}", 303)


def _add_members(app: FastAPI, site: "Site", admin: Any, form: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]
    Fields = Annotated[dict[str, str], Depends(form)]

    @app.post("/admin/members")
    def change_members(who: Admin, fields: Fields) -> Response:
        """Who sees a project: everybody, or those ticked."""
        name = fields.get("project", "")
        with site.store.write() as t:
            project_id = project_of(t, name)["id"]
            known = set(labellers_named(t).values())
            try:
                ticked = {number(k[7:]) for k in fields if k.startswith("member-")}
                everybody = {"all": True, "members": False}[fields.get("seen", "")]
            except (KeyError, ValueError):
                raise Refused("malformed") from None
            if not ticked <= known:
                raise Refused("malformed")
            set_members(t, project_id, who["id"], None if everybody else ticked)
        return RedirectResponse(f"/admin/settings?{urlencode({'project': name})}#members", 303)


def _page(
    site: "Site",
    request: Request,
    project: str,
    before: int | None,
    typed: Mapping[str, str],
    wrong: str,
) -> Response:
    with site.store.read() as t:
        found = project_of(t, project)
        listed = versions_of(t, found["id"], VERSIONS + 1, before)
        people, members = labellers_named(t), members_of(t, found["id"])
    known = {
        **found["settings"],
        "guidelines": found["guidelines"],
        "version": found["version"],
    }
    pairs = zip(listed[:VERSIONS], [*listed[1:], None], strict=False)
    context: dict[str, Any] = {
        **{"project": project, "found": found, "wrong": wrong, "values": {**known, **typed}},
        **{"strategies": get_args(Strategy), "people": sorted(people.items())},
        **{"members": members, "edited": EDITED},
        "versions": [_version(new, old) for new, old in pairs],
        "older": listed[VERSIONS - 1]["version"] if len(listed) > VERSIONS else None,
    }
    return site.page(request, "admin_settings.html", 422 if wrong else 200, **context)


def _checked(typed: Mapping[str, str]) -> dict[str, Any]:
    """Settings as `label import` would take them; UserError for what it would refuse."""
    kinds = {"need": int, "overlap_need": int, "strategy": str}
    values: dict[str, Any] = {}
    for name, text in typed.items():
        try:
            values[name] = kinds.get(name, float)(text.strip())
        except ValueError:
            raise UserError(f"{name} is {text!r}; give a number") from None
    config = build(LabelImportConfig, {"store": "x", "data": "x", **values}, "settings")
    for problem in problems(config):
        raise UserError(problem)
    return values


def _version(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """One version with what it changed: settings from and to, and lines of the guidelines."""
    changed, lines = [], list[str]()
    if old is not None:
        names = {**old["settings"], **new["settings"]}
        changed = [
            (name, old["settings"].get(name), new["settings"].get(name))
            for name in names
            if old["settings"].get(name) != new["settings"].get(name)
        ]
        before, after = old["guidelines"].splitlines(), new["guidelines"].splitlines()
        lines = list(unified_diff(before, after, lineterm="", n=1))[2:]
    more = max(0, len(lines) - CHANGED_LINES)
    kept = [(line[:1], line[1:]) for line in lines[:CHANGED_LINES] if line[:1] != "@"]
    return {**new, "at": said_at(new["created"]), "changed": changed, "lines": kept, "more": more}


# --- charts --------------------------------------------------------------------------------------


def _add_charts(app: FastAPI, site: "Site", admin: Any) -> None:
    Admin = Annotated[dict[str, Any], Depends(admin)]

    @app.get("/admin/charts")
    def charts(request: Request, who: Admin, project: str, span: Span = "days") -> Response:
        by, form = SPANS[span]
        with site.store.read() as t:
            here = project_of(t, project)["id"]
            if span == "hours":
                rows = w.hours_of(t, here, POINTS)
            else:
                rows = w.days_of(t, here, POINTS, by // 86_400)
            last = int(t.now // by)
        points = range(last - POINTS + 1, last + 1)
        curves = defaultdict[str, list[Mapping[str, Any]]](list)
        for row in rows:
            curves[row["labeller"]].append(row)
        people = [{"name": name, **_curve(said, points)} for name, said in curves.items()]
        people.sort(key=lambda one: (-one["total"], one["name"]))
        names = [datetime.fromtimestamp(n * by, UTC).strftime(form) for n in points]
        context: dict[str, Any] = {
            **{"project": project, "span": span, "spans": list(SPANS), "names": names},
            **{
                "people": people[:CURVES],
                "rest": len(people[CURVES:]),
                "all": _curve(rows, points),
            },
        }
        every = context["all"]
        lines = {name: list(zip(names, every[name], strict=True)) for name in CHARTS}
        lines["paces"] = _paces(rows)
        context["charts"] = [
            (name, line, _most(name, line), CHARTS.get(name, "%d")) for name, line in lines.items()
        ]
        return site.page(request, "admin_charts.html", **context)


def _curve(rows: Sequence[Mapping[str, Any]], points: Sequence[int]) -> dict[str, Any]:
    """Annotations, mean seconds and agreement at each point, and over all of them."""
    sums = {n: dict.fromkeys(("annotations", "seconds", "shared", "agreed"), 0.0) for n in points}
    for row in rows:
        for name in sums.get(int(row["point"]), ()):
            sums[int(row["point"])][name] += float(row[name])
    total = {name: sum(one[name] for one in sums.values()) for name in next(iter(sums.values()))}
    return {
        "annotations": [int(one["annotations"]) for one in sums.values()],
        "seconds": [_mean(one, "seconds", "annotations") for one in sums.values()],
        "agreement": [_mean(one, "agreed", "shared") for one in sums.values()],
        "total": int(total["annotations"]),
        "pace": _mean(total, "seconds", "annotations"),
        "agreed": _mean(total, "agreed", "shared"),
    }


def _most(name: str, line: Sequence[tuple[str, float | None]]) -> float:
    """What a full bar stands for."""
    return 1.0 if name == "agreement" else max((value or 0 for _, value in line)) or 1


def _mean(one: Mapping[str, float], total: str, count: str) -> float | None:
    return one[total] / one[count] if one[count] else None


def _paces(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """How many annotations took how many seconds."""
    upto = [sum(int(row[f"pace_{p}"]) for row in rows) for p in PACES]
    every = sum(int(row["annotations"]) for row in rows)
    names = [f"≤ {p}" for p in PACES] + [f"> {PACES[-1]}"]
    counts = [b - a for a, b in zip([0, *upto], [*upto, every], strict=True)]
    return list(zip(names, counts, strict=True))
