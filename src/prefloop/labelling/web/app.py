"""The labelling server: an app factory, the labellers' page and its API. The admin's is admin.py.

FastAPI reads annotations at run time, in functions too, so this module does not postpone them.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from prefloop.errors import UserError
from prefloop.labelling.assign import (
    Assignment,
    Judgement,
    Refused,
    next_assignment,
    reopen,
    save_draft,
    submit,
    take_up,
)
from prefloop.labelling.export import NoProject, project_of
from prefloop.labelling.store import Store, Unavailable
from prefloop.labelling.store.reading import count_of, lesson_of, texts_of
from prefloop.labelling.web.admin import add_admin
from prefloop.labelling.web.own import add_own
from prefloop.labelling.web.render import Renderer
from prefloop.labelling.web.security import (
    COOKIE,
    Guard,
    RateLimit,
    csrf_matches,
    csrf_token,
)
from prefloop.labelling.web.tasks import Number
from prefloop.labelling.web.words import LANGUAGES, pick_language, read_words

STATUS = {
    **{"no-session": 401, "csrf": 403, "not-yours": 403, "forbidden": 403, "too-many": 429},
    "no-project": 404,
}
Position = Annotated[int, Field(ge=0, le=8)]


class Body(BaseModel):
    """What the page sends; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Flag(Body):
    """A flag on an answer (by the place shown) or on the whole task."""

    answer: Position | None
    flag: str = Field(max_length=20)


class Submission(Body):
    """A judgement; tiers and ratings speak of answers by the place shown."""

    assignment: Number
    base_version: Number
    request_id: str = Field(pattern=r"^[\w-]{8,64}$")
    tiers: list[list[Position]] | None = Field(max_length=9)
    ratings: list[Annotated[int, Field(ge=1, le=7)]] | None = Field(default=None, max_length=9)
    strength: int | None = Field(default=None, ge=1, le=3)
    confidence: int | None = Field(default=None, ge=1, le=3)
    all_bad: bool = False
    flags: list[Flag] = Field(default=[], max_length=60)
    comment: str = Field(default="", max_length=4000)
    seconds: float = Field(default=0.0, ge=0, le=1e6)
    guidelines_version: Number  # which ones the page showed


class Chosen(Body):
    """Whose tasks are wanted; none for those of all projects that the labeller sees."""

    project: str | None = Field(default=None, max_length=200)


class Before(Body):
    """Whose forerunner is wanted; none for the last one of all."""

    before: Number | None = None


class Own(Body):
    """A task of the labeller's own."""

    assignment: Number


class Draft(Body):
    """What the page wants to find again after a reload."""

    assignment: Number
    draft: dict[str, Any]


class Site:
    """What every page needs: the store, templates, and who asks."""

    def __init__(
        self, store: Store, session_hours: float, clock: Callable[[], float], *, secure: bool
    ) -> None:
        self.store = store
        self.session_seconds = 3600 * session_hours
        self.secure = secure
        self.renderer = Renderer()
        self.words = read_words()
        self.requests = RateLimit(rate=20, burst=100, clock=clock)
        self.wrong_links = RateLimit(rate=0.2, burst=20, clock=clock)
        self._templates = Environment(
            loader=PackageLoader("prefloop.labelling.web"),
            undefined=StrictUndefined,
            autoescape=True,
        )

    def page(self, request: Request, shown: str, status: int = 200, **context: Any) -> HTMLResponse:
        """A template in the asker's language."""
        language = self.language(request)
        session = request.cookies.get(COOKIE, "")
        shared = {"words": self.words[language], "language": language, "csrf": csrf_token(session)}
        template = self._templates.get_template(shown)
        return HTMLResponse(template.render(**{**context, **shared}), status)

    def message(self, request: Request, key: str, status: int) -> HTMLResponse:
        """A page that says one thing."""
        text = self.words[self.language(request)][key]
        return self.page(request, "message.html", status, text=text)

    def language(self, request: Request) -> str:
        """The asker's language."""
        accepted = request.headers.get("accept-language", "")
        return pick_language(request.cookies.get("prefloop_language"), accepted)

    def labeller(self, request: Request) -> dict[str, Any]:
        """Who asks; Refused without a session, or where a change comes without its token."""
        session = request.cookies.get(COOKIE, "")
        with self.store.read() as t:
            row = t.session(session) if session else None
        if row is None:
            raise Refused("no-session")
        if not self.requests.allows(f"labeller {row['id']}"):
            raise Refused("too-many")
        given = request.headers.get("x-csrf-token", "")
        if request.url.path.startswith("/api/") and not csrf_matches(session, given):
            raise Refused("csrf")
        return dict(row)


def create_app(
    store: Store,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "localhost", "::1"),
    origins: Sequence[str] = (),
    session_hours: float = 24.0,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The server on a store; it answers to the names `hosts` and trusts the pages of `origins`.

    `clock` (seconds) is what limits of rate go by.
    """
    secure = any(origin.startswith("https://") for origin in origins)
    site = Site(store, session_hours, clock, secure=secure)
    app = FastAPI(openapi_url=None)
    _add_pages(app, site)
    _add_api(app, site)
    add_own(app, site)
    add_admin(app, site)
    static = Path(__file__).with_name("static")
    app.mount("/static", StaticFiles(directory=static), name="static")
    app.add_exception_handler(Refused, _refused(site))
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(UserError, _not_there(site))
    app.add_middleware(Guard, hosts=hosts, origins=origins)
    return app


def _not_there(site: Site) -> Callable[[Request, Exception], Response]:
    """A project that is not there, with those that are; or a project with nothing to give."""

    def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, NoProject):
            return site.page(request, "message.html", 404, text=str(error))
        root = "/admin" if request.url.path.startswith("/admin") else "/"
        context: dict[str, Any] = {"name": error.name, "known": error.known, "root": root}
        return site.page(request, "no_project.html", 404, **context)

    return answer


def _refused(site: Site) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        status = STATUS.get(error.reason, 409)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"reason": error.reason}, status)
        keys = {"no-session": "enter", "forbidden": "forbidden", "too-many": "reason-too-many"}
        key = keys.get(error.reason, f"reason-{error.reason}")
        return site.message(request, key, status)

    return answer


def _unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    status = 507 if error.reason == "full" else 503
    return JSONResponse({"reason": error.reason}, status, headers={"Retry-After": "1"})


def _malformed(request: Request, error: Exception) -> Response:
    return JSONResponse({"reason": "malformed"}, 422)


def _add_pages(app: FastAPI, site: Site) -> None:
    @app.get("/enter")
    def enter(request: Request, token: str = "") -> Response:
        """A personal link: its token is exchanged for a session's cookie."""
        client = request.client.host if request.client else ""
        session = secrets.token_urlsafe(32)
        with site.store.write() as t:
            owner = t.open_session(token, session, site.session_seconds)
            if owner is not None:
                t.log("enter", owner["id"], client=client)
        if owner is None:  # only wrong links are limited: many people may share an address
            if not site.wrong_links.allows(client):
                return site.message(request, "reason-too-many", 429)
            with site.store.write() as t:
                t.log("wrong token", None, client=client)
            return site.message(request, "wrong-token", 403)
        answer = RedirectResponse("/", 303)
        flags: dict[str, Any] = {"httponly": True, "samesite": "lax", "secure": site.secure}
        answer.set_cookie(COOKIE, session, max_age=int(site.session_seconds), **flags)
        return answer

    @app.get("/")
    def label(request: Request, project: str | None = None) -> Response:
        labeller = site.labeller(request)
        with site.store.read() as t:
            if project is not None:
                project_of(t, project, labeller["id"])
            seen = t.projects(labeller["id"])
            several = seen if len(seen) > 1 else []
            left = {p["name"]: count_of(t, labeller["id"], p["id"])["left"] for p in several}
        return site.page(request, "label.html", labeller=labeller, left=left, chosen=project)

    @app.get("/language/{name}")
    def language(name: str) -> Response:
        answer = RedirectResponse("/", 303)
        if name in LANGUAGES:
            answer.set_cookie("prefloop_language", name, max_age=31_536_000, samesite="lax")
        return answer


def _add_api(app: FastAPI, site: Site) -> None:
    """Everything here needs a session and its CSRF token (`Site.labeller`)."""
    Labeller = Annotated[dict[str, Any], Depends(site.labeller)]

    @app.post("/api/next")
    def next_task(body: Chosen, labeller: Labeller) -> dict[str, Any]:
        assignment = next_assignment(site.store, labeller["id"], body.project)
        return _as_json(site, labeller["id"], assignment, body.project)

    @app.put("/api/draft")
    def draft(body: Draft, labeller: Labeller) -> dict[str, Any]:
        save_draft(site.store, labeller["id"], body.assignment, body.draft)
        return {}

    @app.post("/api/submit")
    def submit_task(body: Submission, labeller: Labeller) -> dict[str, Any]:
        version = submit(
            site.store, labeller["id"], body.assignment, _judgement(site, body, labeller["id"])
        )
        return {"version": version} | _lesson(site, body.assignment)

    @app.post("/api/undo")
    def undo(body: Before, labeller: Labeller) -> dict[str, Any]:
        return _as_json(site, labeller["id"], reopen(site.store, labeller["id"], body.before))

    @app.post("/api/open")
    def open_own(body: Own, labeller: Labeller) -> dict[str, Any]:
        assignment = take_up(site.store, labeller["id"], body.assignment)
        return _as_json(site, labeller["id"], assignment)

    @app.post("/api/leave")
    def leave(request: Request, labeller: Labeller) -> Response:
        with site.store.write() as t:
            t.close_session(request.cookies[COOKIE])
        answer = JSONResponse({})
        answer.delete_cookie(COOKIE)
        return answer


def _as_json(
    site: Site, labeller_id: int, assignment: Assignment | None, project: str | None = None
) -> dict[str, Any]:
    """What the page shows; it never learns which model wrote an answer. Progress is of one project
    or of all."""
    with site.store.read() as t:
        here = None if project is None else project_of(t, project, labeller_id)["id"]
        answer: dict[str, Any] = {"progress": count_of(t, labeller_id, here), "task": None}
        if assignment is None:
            return answer
        prompt, completions = texts_of(t, assignment.prompt_id, assignment.response_ids)
    render = site.renderer
    place = {position: place for place, position in enumerate(assignment.shown)}
    said = assignment.said and {
        "tiers": assignment.said["tiers"]
        and [[place[i] for i in t] for t in assignment.said["tiers"]],
        "ratings": assignment.said["ratings"]
        and [assignment.said["ratings"][i] for i in assignment.shown],
        **{
            name: assignment.said[name] for name in ("strength", "confidence", "all_bad", "comment")
        },
        "flags": [
            {**flag, "answer": None if flag["answer"] is None else place[flag["answer"]]}
            for flag in assignment.said["flags"]
        ],
    }
    answer["task"] = {
        "assignment": assignment.id,
        "version": assignment.version,
        "project": assignment.project,
        "guidelines_version": assignment.project_version,
        "mode": assignment.mode,
        "practice": assignment.kind == "practice",
        "guidelines": render.text(assignment.guidelines) if assignment.guidelines else "",
        "prompt": render.turns(prompt),
        "answers": [render.turns(completions[i]) for i in assignment.shown],
        "draft": assignment.draft,
        "said": said,
    }
    return answer


def _lesson(site: Site, assignment_id: int) -> dict[str, Any]:
    """After a practice task: the project's own order, by places shown, and why."""
    with site.store.read() as t:
        lesson = lesson_of(t, assignment_id)
    if lesson is None:
        return {}
    tiers = [[lesson["shown"].index(i) for i in tier] for tier in lesson["gold_tiers"]]
    return {"lesson": {"tiers": tiers, "reason": site.renderer.text(lesson["reason"])}}


def _judgement(site: Site, body: Submission, labeller_id: int) -> Judgement:
    """The page's places shown as positions in the task."""
    with site.store.read() as t:
        shown = t.shown_order(body.assignment, labeller_id)
    if not shown:
        raise Refused("not-yours")
    try:
        tiers = body.tiers and [[shown[place] for place in tier] for tier in body.tiers]
        flags = [
            {"flag": f.flag, "answer": None if f.answer is None else shown[f.answer]}
            for f in body.flags
        ]
        ratings = body.ratings and [body.ratings[shown.index(i)] for i in range(len(shown))]
    except (IndexError, ValueError):
        raise Refused("malformed") from None
    return Judgement(
        tiers=tiers,
        ratings=ratings,
        strength=body.strength,
        confidence=body.confidence,
        all_bad=body.all_bad,
        flags=flags,
        comment=body.comment,
        seconds=body.seconds,
        request_id=body.request_id,
        base_version=body.base_version,
        project_version=body.guidelines_version,
    )
