"""The server through a client: sessions, refusals, what is stored; the browser is tests/browser."""

import json
import re
import sqlite3

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from prefloop.config.labelling import LabelAddUserConfig, LabelImportConfig, LabelServeConfig
from prefloop.errors import UserError
from prefloop.labelling import users
from prefloop.labelling.export import decisions
from prefloop.labelling.quality import measure
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import work_of
from prefloop.labelling.web.app import create_app
from prefloop.labelling.web.security import MOST_BYTES, RateLimit
from prefloop.labelling.web.server import names_and_origins
from prefloop.labelling.web.words import LANGUAGES, read_words
from prefloop.records import RowCounts
from tests.labelling.small import Clock, add, open_store, put, rows

ORIGIN = "http://testserver"


class Page:
    """One labeller's browser."""

    def __init__(self, app, name, **settings):
        self.client = TestClient(app, **settings)
        self.answer = self.client.get(f"/enter?token=token-{name}")
        found = re.search(r'name="csrf" content="(\w+)"', self.answer.text)
        self.headers = {"X-CSRF-Token": found[1], "Origin": ORIGIN}
        self.csrf = found[1]

    def post(self, path, body=None, **headers):
        sent = {**self.headers, **headers}
        return self.client.post(path, json=body or {}, headers=sent)

    def task(self):
        return self.post("/api/next").json()["task"]

    def submit(self, task, tiers, **changes):
        body = {
            "assignment": task["assignment"],
            "base_version": task["version"],
            "guidelines_version": task["guidelines_version"],
            "request_id": f"request-{task['assignment']}-{task['version']}",
            "tiers": tiers,
        }
        return self.post("/api/submit", {**body, **changes})


@pytest.fixture
def made(tmp_path):
    """(store, app) with six tasks of three answers, and ann, bob, and boss the admin."""
    data = [row | {"model": "runs/secret-policy"} for row in rows(6)]
    put(tmp_path, data)
    store = open_store(tmp_path)
    add(store, "ann", "bob")
    add(store, "boss", role="admin")
    yield store, create_app(store, hosts=["testserver"])
    store.close()


def reason(answer):
    return answer.status_code, answer.json()["reason"]


# --- who may -------------------------------------------------------------------------------------


def test_a_personal_link_opens_a_session(made):
    _, app = made
    client = TestClient(app, follow_redirects=False)
    assert client.get("/").status_code == 401
    answer = client.get("/enter?token=token-ann")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert client.get("/").status_code == 200


def test_behind_https_the_cookie_is_secure(made):
    store, _ = made
    app = create_app(store, hosts=["x.org"], origins=["https://x.org"])
    client = TestClient(app, base_url="https://x.org", follow_redirects=False)
    assert "Secure" in client.get("/enter?token=token-ann").headers["set-cookie"]


@pytest.mark.parametrize("token", ["", "wrong", "token-ann "])
def test_a_wrong_token_is_told_and_logged(made, token):
    store, app = made
    answer = TestClient(app).get("/enter", params={"token": token})
    assert answer.status_code == 403
    assert "not valid" in answer.text
    with store.read() as t:
        assert t.connection.exec_driver_sql("SELECT action FROM events").all()[-1] == (
            "wrong token",
        )


def test_guessing_tokens_is_slowed_down(made):
    app = create_app(made[0], hosts=["testserver"], clock=Clock(0.0))
    client = TestClient(app)
    codes = [client.get(f"/enter?token={n}").status_code for n in range(21)]
    assert codes == [403] * 20 + [429]
    assert client.get("/enter?token=token-ann").status_code == 200


def test_an_expired_session_is_told(tmp_path):
    clock = Clock()
    put(tmp_path, rows(1))
    store = open_store(tmp_path, clock)
    add(store, "ann")
    page = Page(create_app(store, hosts=["testserver"], session_hours=1.0), "ann")
    task = page.task()
    clock.now += 3601
    assert reason(page.submit(task, [[0], [1], [2]])) == (401, "no-session")
    assert page.client.get("/").status_code == 401


def test_changes_need_the_sessions_token_and_our_origin(made):
    _, app = made
    page = Page(app, "ann")
    assert reason(page.post("/api/next", **{"X-CSRF-Token": "0" * 64})) == (403, "csrf")
    assert reason(page.post("/api/next", **{"X-CSRF-Token": b"\xe9"})) == (403, "csrf")
    assert reason(page.post("/api/next", **{"X-CSRF-Token": Page(app, "bob").csrf})) == (
        403,
        "csrf",
    )
    for origin in ("http://evil.invalid", "null", "http://testserver.evil.invalid", ""):
        assert reason(page.post("/api/next", Origin=origin)) == (403, "foreign-origin")
    form = {"csrf": page.csrf}
    assert page.client.post("/admin/labellers", data=form).status_code == 403


def test_other_host_names_are_refused(made):
    _, app = made
    client = TestClient(app, base_url="http://evil.invalid")
    assert reason(client.get("/")) == (400, "wrong-host")


def test_large_and_lengthless_requests_are_refused(made):
    _, app = made
    page = Page(app, "ann")
    assert reason(page.post("/api/draft", {"x": "y" * MOST_BYTES})) == (413, "too-large")
    answer = page.client.post("/api/next", content=iter([b"{}"]), headers=page.headers)
    assert reason(answer) == (411, "no-length")


def test_too_many_requests_are_refused(made):
    """100 at once (opening the page was one of them), then 20 a second; each labeller alone."""
    clock = Clock(0.0)
    app = create_app(made[0], hosts=["testserver"], clock=clock)
    page = Page(app, "ann")
    codes = [page.post("/api/undo").status_code for _ in range(100)]
    assert codes == [200] * 99 + [429]
    assert Page(app, "bob").post("/api/undo").status_code == 200
    clock.now = 0.05
    assert page.post("/api/undo").status_code == 200
    assert reason(page.post("/api/undo")) == (429, "too-many")


def test_the_rate_limit_by_hand():
    now = [0.0]
    limit = RateLimit(rate=2, burst=3, clock=lambda: now[0])
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("b")
    now[0] = 0.5
    assert [limit.allows("a") for _ in range(2)] == [True, False]


@pytest.mark.parametrize("path", ["/", "/absent", "/static/label.js", "/enter?token=x", "/admin"])
def test_every_answer_has_the_headers(made, path):
    _, app = made
    headers = TestClient(app).get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


def test_the_pages_have_no_inline_code(made):
    _, app = made
    page = Page(app, "boss")
    task = page.task()
    page.submit(task, [[0], [1], [2]])
    for path in ("/", "/admin", "/admin/quality?project=main", "/admin/task?project=main&id=1"):
        text = page.client.get(path).text
        assert page.client.get(path).status_code == 200
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", text), (
            path
        )


# --- labelling -----------------------------------------------------------------------------------


def test_the_page_is_blind_to_the_model(made):
    _, app = made
    told = Page(app, "ann").post("/api/next").text
    assert "secret-policy" not in told
    assert set(json.loads(told)["task"]) == {
        *("assignment", "version", "mode", "guidelines", "prompt", "answers", "draft", "said"),
        *("practice", "project", "guidelines_version"),
    }


def test_places_shown_are_stored_as_the_tasks_positions(made):
    store, app = made
    page = Page(app, "ann")
    task = page.task()
    flags = [{"answer": 0, "flag": "false"}, {"answer": None, "flag": "other"}]
    assert page.submit(task, [[2], [0, 1]], flags=flags, comment="x").json() == {"version": 1}
    with store.read() as t:
        (row,) = t.connection.exec_driver_sql(
            "SELECT shown, tiers, flags FROM annotations n JOIN assignments a "
            "ON a.id = n.assignment_id"
        ).all()
    shown, tiers, stored = map(json.loads, row)
    assert tiers == [[shown[2]], [shown[0], shown[1]]]
    assert stored[0] == {"flag": "false", "answer": shown[0]}
    again = page.post("/api/undo").json()["task"]
    assert again["said"]["tiers"] == [[2], [0, 1]]
    assert again["said"]["flags"] == flags
    assert (again["assignment"], again["version"]) == (task["assignment"], 1)


def test_a_reload_gives_the_same_task_and_the_draft(made):
    _, app = made
    page = Page(app, "ann")
    task = page.task()
    draft = {"assignment": task["assignment"], "draft": {"values": [1, None, 2]}}
    assert page.client.put("/api/draft", json=draft, headers=page.headers).status_code == 200
    again = page.task()
    assert again == task | {"draft": {"values": [1, None, 2]}}


def test_two_tabs(made):
    _, app = made
    page = Page(app, "ann")
    task = page.task()
    first = page.submit(task, [[0], [1], [2]])
    assert page.submit(task, [[0], [1], [2]]).json() == first.json()  # the same request again
    other_tab = page.submit(task, [[2], [1], [0]], request_id="another-tab")
    assert reason(other_tab) == (409, "already-submitted")


def test_another_labellers_task(made):
    _, app = made
    task = Page(app, "ann").task()
    assert reason(Page(app, "bob").submit(task, [[0], [1], [2]])) == (403, "not-yours")


@pytest.mark.parametrize(
    "changes",
    [
        {"tiers": [[0], [1]]},
        {"tiers": [[0], [1], [3]]},
        {"tiers": [[0], [1], [-1]]},
        {"tiers": "012"},
        {"request_id": "x"},
        {"request_id": "<script>aaaa"},
        {"confidence": 4},
        {"seconds": -1},
        {"unknown": 1},
        {"flags": [{"answer": 7, "flag": "false"}]},
        {"flags": [{"answer": 0, "flag": "rude"}]},
        {"comment": "x" * 4001},
    ],
)
def test_malformed_submissions_are_refused(made, changes):
    store, app = made
    page = Page(app, "ann")
    task = page.task()
    answer = page.submit(task, **{"tiers": [[0], [1], [2]], **changes})
    assert answer.status_code in (409, 422)
    assert answer.json()["reason"] == "malformed"
    with store.read() as t:
        assert t.connection.exec_driver_sql("SELECT count(*) FROM annotations").scalar() == 0


def test_the_end_and_what_comes_after(made, tmp_path):
    _, app = made
    page = Page(app, "ann")
    while task := page.task():
        page.submit(task, [[0], [1], [2]])
    assert page.post("/api/next").json()["progress"] == {"done": 6, "skipped": 0, "left": 0}
    put(tmp_path, rows(7))  # the file's new row becomes a task while the server runs
    assert page.task() is not None


def practice_rows():
    taught = {"tiers": [[2], [0, 1]], "reason": "The **third** is true."}
    return [row | {"prompt": "practice"} | taught for row in rows(1)]


def test_practice_opens_the_first_session_and_then_tells_the_projects_order(made, tmp_path):
    store, app = made
    put(tmp_path, practice_rows(), practice=True)
    page = Page(app, "ann")
    for done in range(7):
        task = page.task()
        assert task["practice"] == (done == 0)
        told = page.submit(task, [[0], [1], [2]]).json()
        with store.read() as t:
            shown = t.shown_order(task["assignment"], 1)
        if task["practice"]:
            assert "The third" not in json.dumps(task)
            place = {position: n for n, position in enumerate(shown)}
            known = [[place[2]], [place[0], place[1]]]
            assert told["lesson"] == {
                "tiers": known, "reason": "<p>The <strong>third</strong> is true.</p>\n"
            }  # fmt: skip
        else:
            assert told == {"version": 1}
    assert page.post("/api/next").json()["progress"] == {"done": 6, "skipped": 0, "left": 0}
    assert Page(app, "bob").task()["practice"]  # each labeller once


def test_practice_is_neither_exported_nor_measured(made, tmp_path):
    store, app = made
    put(tmp_path, practice_rows(), practice=True)
    page = Page(app, "ann")
    for _ in range(2):
        page.submit(page.task(), [[0], [1], [2]])
    counts = RowCounts()
    assert len(decisions(store, "main", "labeller", (), counts)) == 1
    assert counts.dropped == {"practice task": 1}
    assert measure(store, "main").annotations == 1


@pytest.mark.parametrize(
    ("row", "changes", "told"),
    [
        ({"tiers": [[0], [1], [2]]}, {"practice": True}, "needs `reason`"),
        ({"reason": "x"}, {"practice": True}, "practice row needs `tiers`"),
        ({"tiers": [[0], [1], [2]], "reason": " "}, {"practice": True}, "needs `reason`"),
    ],
)
def test_practice_that_teaches_nothing_is_refused(tmp_path, row, changes, told):
    with pytest.raises(UserError, match=told):
        put(tmp_path, rows(1, **row), **changes)


def test_rows_cannot_both_test_and_teach():
    config = LabelImportConfig(store="labels.db", data="rows.jsonl", gold=True, practice=True)
    assert [problem for problem in config.problems() if "give one" in problem]


def test_own_work_is_listed_and_each_task_can_be_changed(made):
    _, app = made
    page = Page(app, "ann")
    tasks = []
    for tiers in ([[1], [0, 2]], None, [[0], [1], [2]]):
        tasks.append(page.task())
        page.submit(tasks[-1], tiers, confidence=2, comment="<b>")
    text = page.client.get("/mine").text
    said = re.findall(r"<td dir=\"auto\">(.*?)</td>", text)
    tail = " · fairly sure · &lt;b&gt;"
    assert said == [f"A &gt; B &gt; C{tail}", f"Skipped.{tail}", f"B &gt; A = C{tail}"]
    skipped = page.client.get("/mine?skipped=true").text
    links = re.findall(r'href="/\?assignment=(\d+)"', skipped)
    assert links == [str(tasks[1]["assignment"])]
    assert "2 done by you, 1 skipped, 3 left for you" in text
    # The first is opened and said anew; so is the skipped one, as nobody has taken it meanwhile.
    for task, version in ((tasks[0], 1), (tasks[1], 1)):
        again = page.post("/api/open", {"assignment": task["assignment"]}).json()["task"]
        assert (again["answers"], again["version"]) == (task["answers"], version)
        assert page.submit(again, [[2], [1], [0]]).json() == {"version": 2}
    text = page.client.get("/mine").text
    assert text.count("C &gt; B &gt; A (version 2)") == 2
    assert "Nothing yet" in page.client.get("/mine?skipped=true").text
    other = Page(app, "bob")
    assert "answer" not in other.client.get("/mine").text
    assert reason(other.post("/api/open", {"assignment": tasks[0]["assignment"]})) == (
        403,
        "not-yours",
    )


def test_undo_goes_back_as_far_as_there_is_work(made):
    _, app = made
    page = Page(app, "ann")
    done = []
    for _ in range(3):
        task = page.task()
        page.submit(task, [[0], [1], [2]])
        done.append(task["assignment"])
    found, before = [], None
    while task := page.post("/api/undo", {"before": before}).json()["task"]:
        found.append(before := task["assignment"])
    assert found == done[::-1]


def test_the_list_has_pages(made):
    store, app = made
    page = Page(app, "ann")
    for _ in range(3):
        page.submit(page.task(), [[0], [1], [2]])
    with store.read() as t:
        pages = [work_of(t, 1, False, offset, 2) for offset in (0, 2, 4)]
    assert [len(rows) for rows in pages] == [2, 1, 0]
    assert page.client.get("/mine?page=2").status_code == 200
    assert page.client.get("/mine?page=0").status_code == 422


def test_leaving_ends_the_session(made):
    _, app = made
    page = Page(app, "ann")
    assert page.post("/api/leave").status_code == 200
    assert page.post("/api/next").status_code in (401, 403)
    assert page.client.get("/").status_code == 401


def test_a_locked_database_is_told_and_loses_nothing(made, tmp_path):
    _, app = made
    page = Page(app, "ann")
    task = page.task()
    other = sqlite3.connect(tmp_path / "labels.db", isolation_level=None)
    short = Store(str(tmp_path / "labels.db"), busy_seconds=0.1)
    impatient = Page(create_app(short, hosts=["testserver"]), "ann")
    other.execute("BEGIN IMMEDIATE")
    answer = impatient.submit(task, [[0], [1], [2]])
    assert reason(answer) == (503, "busy")
    assert answer.headers["retry-after"] == "1"
    other.execute("COMMIT")
    assert impatient.submit(task, [[0], [1], [2]]).json() == {"version": 1}
    short.close()


@pytest.mark.usefixtures("made")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    """The database may not grow: what cannot be saved is refused, and goes in when it may."""
    small = Store(str(tmp_path / "labels.db"))
    page = Page(create_app(small, hosts=["testserver"]), "ann")
    task = page.task()
    draft = {"assignment": task["assignment"], "draft": {"text": "x" * 60_000}}

    def limit(pages):
        with small.read() as t:
            used = t.connection.exec_driver_sql("PRAGMA page_count").scalar()
        small.engine.dispose()

        @event.listens_for(small.engine, "connect")
        def set_limit(connection, record):
            connection.execute(f"PRAGMA max_page_count = {used + pages}")

    limit(0)
    answer = page.client.put("/api/draft", json=draft, headers=page.headers)
    assert reason(answer) == (507, "full")
    limit(10_000)
    assert page.client.put("/api/draft", json=draft, headers=page.headers).status_code == 200
    assert page.task()["draft"] == draft["draft"]
    small.close()


# --- languages -----------------------------------------------------------------------------------


def test_both_languages_say_everything():
    words = read_words()
    assert set(words) == set(LANGUAGES)
    assert words["en"].keys() == words["ko"].keys()
    for key in words["en"]:
        holes = [re.findall(r"\{\w+\}", words[name][key]) for name in LANGUAGES]
        assert sorted(holes[0]) == sorted(holes[1]), key


def test_the_pages_words_exist():
    """Every word that the script and the templates name."""
    from importlib.resources import files

    folder = files("prefloop.labelling.web")
    texts = [p.read_text("utf-8") for p in (folder / "templates").iterdir()]
    texts.append((folder / "static" / "label.js").read_text("utf-8"))
    named = set(re.findall(r'words(?:\.|\[")([\w-]+)', "\n".join(texts)))
    known = set(read_words()["en"])
    assert len(named) > 30
    begun = {name for name in named if name.endswith("-")}  # what follows is a value's
    assert {name for name in begun if not any(word.startswith(name) for word in known)} == set()
    assert named - begun <= known


def test_every_page_is_under_100_kb_with_what_it_loads(made):
    """Uncompressed; the largest is the labellers', in Korean."""
    _, app = made
    page = Page(app, "boss")
    for _ in range(3):
        page.submit(page.task(), [[0], [1], [2]])
    for path in ("/", "/mine", "/admin", "/admin/quality?project=main"):
        answer = page.client.get(path, headers={"Accept-Language": "ko"})
        loaded = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text))
        assert "/static/style.css" in loaded
        size = len(answer.content) + sum(len(page.client.get(x).content) for x in loaded)
        assert size < 100_000, path


def test_the_quality_page_speaks_korean_too(made):
    _, app = made
    for name in ("ann", "bob"):
        page = Page(app, name)
        page.submit(page.task(), [[0], [1], [2]])
    page = Page(app, "boss")
    text = page.client.get("/admin/quality?project=main", headers={"Accept-Language": "ko"}).text
    cells = re.findall(r"<(?:td|th|caption|h2)[^>]*>([^<]*)<", text)
    words = {word for cell in cells for word in re.findall("[A-Za-z]+", cell)}
    assert words <= {"main", "ann", "bob", "boss", "p"}  # names, and the p of a test
    assert "쌍별 일치도" in cells


def test_the_language_follows_the_browser_and_can_be_chosen(made):
    _, app = made
    page = Page(app, "ann")
    korean = page.client.get("/", headers={"Accept-Language": "ko-KR,ko;q=0.9"})
    assert 'lang="ko"' in korean.text
    assert "답변 평가하기" in korean.text
    assert 'lang="en"' in page.client.get("/").text
    assert 'html lang="ko"' in page.client.get("/language/ko").text
    assert 'html lang="ko"' in page.client.get("/").text


# --- admins --------------------------------------------------------------------------------------


def test_admin_pages_are_for_admins(made):
    _, app = made
    page = Page(app, "ann")
    for path in ("/admin", "/admin/quality?project=main", "/admin/export?project=main"):
        assert page.client.get(path).status_code == 403
    form = {"csrf": page.csrf, "name": "eve", "role": "admin"}
    answer = page.client.post("/admin/labellers", data=form, headers={"Origin": ORIGIN})
    assert answer.status_code == 403


def form(page, path, **fields):
    data = {"csrf": page.csrf, **fields}
    return page.client.post(path, data=data, headers={"Origin": ORIGIN})


def test_an_admin_adds_labellers_and_shuts_them_out(made):
    store, app = made
    boss = Page(app, "boss")
    answer = form(boss, "/admin/labellers", name="cat <b>", role="labeller")
    link = re.search(r'id="link">([^<]+)<', answer.text)[1]
    assert link.startswith(f"{ORIGIN}/enter?token=")
    assert "cat &lt;b&gt;" in answer.text
    cat = TestClient(app)
    assert cat.get(link.removeprefix(ORIGIN)).status_code == 200
    with store.read() as t:
        cat_id = t.labeller_named("cat <b>")["id"]
        boss_id = t.labeller_named("boss")["id"]
    assert form(boss, "/admin/access", labeller=cat_id, active="no").status_code == 200
    assert cat.get("/").status_code == 401
    assert form(boss, "/admin/access", labeller=boss_id, active="no").status_code == 409
    assert boss.client.post("/admin/access", headers={"Origin": ORIGIN}).status_code == 403


def test_export_and_its_log(made):
    store, app = made
    boss = Page(app, "boss")
    assert boss.client.get("/admin/export?project=main").status_code == 404  # nothing yet
    boss.submit(boss.task(), [[0], [1], [2]])
    answer = boss.client.get("/admin/export?project=main&form=dpo")
    assert "attachment" in answer.headers["content-disposition"]
    assert len(answer.text.splitlines()) == 3
    assert boss.client.get("/admin/export?project=main&form=audit").status_code == 200
    assert boss.client.get("/admin/export?project=main&form=zip").status_code == 422
    with store.read() as t:
        found = t.connection.exec_driver_sql(
            "SELECT name, action FROM events e JOIN labellers l ON l.id = e.labeller_id"
        ).all()
    assert found.count(("boss", "export")) == 2


def test_disagreements_and_adjudication(tmp_path):
    data = [
        rows(1)[0] | {"tiers": tiers, "labeller": name}
        for name, tiers in (("x", [[0], [1], [2]]), ("y", [[2], [1], [0]]))
    ]
    put(tmp_path, data)
    store = open_store(tmp_path)
    add(store, "boss", role="admin")
    boss = Page(create_app(store, hosts=["testserver"]), "boss")
    quality = boss.client.get("/admin/quality?project=main").text
    assert "/admin/task?project=main&amp;id=1" in quality
    places = {"place-0": 2, "place-1": 1, "place-2": 2}
    answer = form(boss, "/admin/adjudicate", task=1, project="main", **places)
    assert "/admin/task?" not in answer.text  # it is settled
    export = boss.client.get("/admin/export?project=main").text
    assert json.loads(export)["tiers"] == [[1], [0, 2]]
    assert form(boss, "/admin/adjudicate", task=1, project="main").status_code == 409
    assert form(boss, "/admin/adjudicate", task=9, project="main", **places).status_code == 409


@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 10**30])
def test_numbers_beyond_the_database_are_malformed(made, number):
    _, app = made
    page, boss = Page(app, "ann"), Page(app, "boss")
    task = page.task() | {"assignment": number}
    assert reason(page.submit(task, [[0], [1], [2]])) == (422, "malformed")
    body = {"assignment": number, "draft": {}}
    assert page.client.put("/api/draft", json=body, headers=page.headers).status_code == 422
    assert boss.client.get(f"/admin/task?project=main&id={number}").status_code == 422
    places = {"place-0": 1, "place-1": 1, "place-2": 2}
    answer = form(boss, "/admin/adjudicate", task=number, project="main", **places)
    assert answer.status_code == 409
    assert form(boss, "/admin/access", labeller=number, active="no").status_code == 409


@pytest.mark.parametrize("path", ["adjudicate", "labellers", "access"])
@pytest.mark.parametrize(
    "body", [b"csrf=%s&name=\xff", b"csrf=%s&name=%%FF", b"csrf=%s&labeller=" + b"9" * 5000]
)
def test_forms_of_strange_bytes_are_malformed(made, path, body):
    boss = Page(made[1], "boss")
    kind = {"Origin": ORIGIN, "Content-Type": "application/x-www-form-urlencoded"}
    sent = body % boss.csrf.encode()
    answer = boss.client.post(f"/admin/{path}", content=sent, headers=kind)
    assert answer.status_code == 409


def test_flags_reach_the_admin(made):
    _, app = made
    ann = Page(app, "ann")
    task = ann.task()
    ann.submit(task, None, flags=[{"answer": 0, "flag": "harmful"}], comment="<i>no</i>")
    text = Page(app, "boss").client.get("/admin").text
    assert "harmful" in text
    assert "&lt;i&gt;no&lt;/i&gt;" in text


def test_admin_requests_for_what_is_not_there(made):
    """A project or a labeller that does not exist is the asker's mistake, not the server's."""
    _, app = made
    boss = Page(app, "boss")
    for path in ("task?project=nope&id=1", "quality?project=nope", "export?project=nope"):
        assert boss.client.get(f"/admin/{path}").status_code == 404, path
    answer = boss.client.get("/admin/task?project=nope&id=1")
    assert "There is no project nope" in answer.text
    assert re.findall(r'href="(/admin[^"]*)"', answer.text) == ["/admin?project=main"]
    assert boss.client.get("/admin?project=nope").status_code == 404
    for fields in ({"labeller": "x"}, {"labeller": ""}, {}):
        assert 400 <= form(boss, "/admin/access", active="no", **fields).status_code < 500


def test_admin_pages_speak_korean(made):
    """No English word is left of those that the pages take from the dictionary."""
    _, app = made
    ann, boss = Page(app, "ann"), Page(app, "boss")
    task = ann.task()
    ann.submit(task, None, flags=[{"answer": 0, "flag": "harmful"}], comment="")
    boss.client.cookies.set("prefloop_language", "ko")
    words = read_words()
    id = re.search(r"id=(\d+)", boss.client.get("/admin").text)[1]
    for path in ("/admin", "/admin/quality?project=main", f"/admin/task?project=main&id={id}"):
        text = boss.client.get(path).text
        assert 'html lang="ko"' in text
        shown = re.findall(
            r"<(?:h1|h2|th|button|label|a)[^<>]*>([^<>]+)<", text.split("<caption")[0]
        )
        assert not {words["en"][key] for key in words["en"]} & {word.strip() for word in shown}
    assert words["ko"]["harmful"] in boss.client.get("/admin").text


# --- commands ------------------------------------------------------------------------------------


def test_add_user_prints_a_link_that_works(tmp_path):
    put(tmp_path, rows(1))
    store = str(tmp_path / "labels.db")
    link = users.run(LabelAddUserConfig(store=store, name="ann", url="http://testserver/"))
    app = create_app(Store(store), hosts=["testserver"])
    assert TestClient(app).get(link.removeprefix("http://testserver")).status_code == 200
    again = users.run(LabelAddUserConfig(store=store, name="ann"))
    assert again != link
    assert TestClient(app).get(link.removeprefix("http://testserver")).status_code == 403
    with pytest.raises(UserError, match="printable"):
        users.run(LabelAddUserConfig(store=store, name="a\x00"))


def test_hosts_and_origins():
    def told(**settings):
        return names_and_origins(LabelServeConfig(store="x", **settings))

    assert told() == (["127.0.0.1", "localhost", "::1", "127.0.0.1"], [])
    hosts, origins = told(host="0.0.0.0", public_url="https://labels.example.org")
    assert hosts[-1] == "labels.example.org"
    assert origins == ["https://labels.example.org"]
    with pytest.raises(UserError, match="give --public-url"):
        told(host="::")
    with pytest.raises(UserError, match="without a path"):
        told(public_url="https://x.org/labels")
