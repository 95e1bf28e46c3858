"""The admin's workbench through a client: tasks, settings, members, charts, export, other people's
projects; the browser is tests/browser."""

import json
import re

import pytest
from sqlalchemy import text

from prefloop.config.labelling import LabelExportConfig
from prefloop.labelling import export
from prefloop.labelling.export import audit
from prefloop.labelling.store import workbench
from prefloop.labelling.store.projects import put_project
from prefloop.labelling.store.reading import progress_of
from prefloop.labelling.web.app import create_app
from tests.labelling.small import Clock, add, open_store, put, rows
from tests.labelling.web.test_app import Page, form

KOREAN = "주전자를 데운다"
SETTINGS = {
    "need": "1", "overlap": "0.0", "overlap_need": "2", "gold_share": "0.1", "repeat_share": "0",
    "strategy": "random", "random_share": "0.2", "lease_minutes": "30",
}  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def made(tmp_path, request):
    """(store, app): seven tasks of `main`, one in Korean, and two of `other`, that bob alone sees;
    ann, bob, and boss the admin."""
    address = str(tmp_path / "labels.db")
    if request.param == "postgresql":
        address = request.getfixturevalue("postgres")(f"bench{abs(hash(tmp_path))}")
    korean = {"prompt": f"100%_{KOREAN}", "completions": ["a", "b", 'say "tea"']}
    put(tmp_path, [*rows(6), korean], address=address, need=2, guidelines=None)
    others = [row | {"prompt": f"unseen-task {n}"} for n, row in enumerate(rows(2))]
    put(tmp_path, others, address=address, project="other", members=("bob",))
    store = open_store(tmp_path, Clock(), address)
    add(store, "ann", "bob")
    add(store, "boss", role="admin")
    return store, create_app(store, hosts=["testserver"])


def work(page, most=20, **changes):
    """Rank what is handed out as it is shown, or as `changes` say."""
    done = []
    while len(done) < most and (task := page.task()) is not None:
        page.submit(task, **{"tiers": [[0], [1], [2]], **changes})
        done.append(task)
    return done


def listed(boss, **asked):
    """Task ids of the list's pages, one after the other."""
    found, path = [], None
    while True:
        answer = boss.client.get(path or "/admin/tasks", params=None if path else asked)
        assert answer.status_code == 200, answer.text
        found.append(
            [int(n) for n in re.findall(r"/admin/task\?project=\w+&amp;id=(\d+)", answer.text)]
        )
        following = re.search(r'href="(/admin/tasks\?[^"]*)" rel="next"', answer.text)
        if following is None:
            return found
        path = following[1].replace("&amp;", "&")


# --- tasks ---------------------------------------------------------------------------------------


def test_tasks_are_found_by_state_flag_labeller_and_text(made):
    store, app = made
    ann, bob, boss = (Page(app, name) for name in ("ann", "bob", "boss"))
    first = ann.task()
    ann.submit(first, [[0], [1], [2]], flags=[{"answer": 0, "flag": "false"}])
    held = ann.task()
    with store.read() as t:
        ids = {
            row["assignment"]: row["task"]
            for row in t.all(text("SELECT id assignment, task_id task FROM assignments"))
        }
    flagged, open_ = ids[first["assignment"]], ids[held["assignment"]]
    here = {"project": "main"}
    assert listed(boss, **here) == [[1, 2, 3, 4, 5, 6, 7]]
    assert listed(boss, **here, flagged="true") == [[flagged]]
    assert listed(boss, **here, labeller="ann") == [[flagged]]
    assert listed(boss, **here, state="held") == [[open_]]
    assert listed(boss, **here, state="done") == [[]]
    assert listed(boss, **here, text="PROMPT 3") == [[4]]
    assert listed(boss, **here, text=KOREAN) == [[7]]
    assert listed(boss, **here, text="100%_") == [[7]]  # no pattern's marks
    assert listed(boss, **here, text="0%") == [[7]]
    assert listed(boss, **here, text='say "tea"') == [[7]]  # in an answer
    assert listed(boss, **here, text="unseen-task") == [[]]  # another project's
    assert listed(boss, project="other", kind="gold") == [[]]
    assert work(bob)  # the same seven, and the other two
    assert listed(boss, **here, state="done") == [[flagged]]
    for odd in ({"after": "x"}, {"after": "2:1"}):
        assert boss.client.get("/admin/tasks", params=here | odd).status_code == 409
    for odd in ({"state": "x"}, {"kind": "x"}):
        assert boss.client.get("/admin/tasks", params=here | odd).status_code == 422
    assert boss.client.get("/admin/tasks", params=here | {"labeller": "zoe"}).status_code == 404
    assert boss.client.get("/admin/tasks", params=here | {"text": "\x00"}).status_code == 200
    assert boss.client.get("/admin/task?project=other&id=1").status_code == 404


def test_disputed_tasks_come_worst_first_until_they_are_adjudicated(made):
    """One labeller ranks as the tasks have the answers; the other turns two tasks round and one in
    part, so that they agree on no pair of two tasks and on two of three pairs of the third."""
    store, app = made
    by_task = {2: [[2], [1], [0]], 5: [[2], [1], [0]], 3: [[0], [2], [1]]}
    for name in ("ann", "bob"):
        page = Page(app, name)
        while task := page.task():
            with store.read() as t:
                who = t.labeller_named(name)["id"]
                shown = t.shown_order(task["assignment"], who)
                number = t.assignment(task["assignment"], who)["task_id"]
            order = by_task.get(number, [[0], [1], [2]]) if name == "bob" else [[0], [1], [2]]
            page.submit(task, [[shown.index(i) for i in tier] for tier in order])
    boss = Page(app, "boss")
    assert listed(boss, project="main", state="disputed") == [[2, 5, 3]]
    with store.read() as t:
        wanted = workbench.Wanted("disputed")
        pages = []
        while True:
            found, after = workbench.tasks_of(t, 1, wanted, 1)
            pages.append([(row["id"], row["disagreement"]) for row in found])
            if after is None:
                break
            wanted = workbench.Wanted("disputed", after=after)
    assert pages == [[(2, 1.0)], [(5, 1.0)], [(3, 0.333333333)]]
    places = {"place-0": 1, "place-1": 1, "place-2": 2}
    form(boss, "/admin/adjudicate", task=2, project="main", **places)
    assert listed(boss, project="main", state="disputed") == [[5, 3]]
    assert listed(boss, project="main", state="adjudicated") == [[2]]
    # Another admin overrules; the last word counts, each version stays, and the page tells them.
    add(store, "chief", role="admin")
    store.clock.now += 60
    form(
        Page(app, "chief"), "/admin/adjudicate", task=2, project="main", **(places | {"place-0": 3})
    )
    store.clock.now += 60
    form(boss, "/admin/adjudicate", task=2, project="main", **(places | {"place-1": 2}))
    text = boss.client.get("/admin/task?project=main&id=2").text
    rulings = re.findall(
        r"<th scope=\"row\">(\w+) \(adjudication\), version (\d)</th><td>([^<]*)<", text
    )
    assert rulings == [
        ("boss", "1", "1: 1, 2: 1, 3: 2"),
        ("chief", "1", "1: 3, 2: 1, 3: 2"),
        ("boss", "2", "1: 1, 2: 2, 3: 2"),
    ]
    ruled = [row for row in exported(boss) if row["labeller"] == "boss (adjudication)"]
    assert [row["tiers"] for row in ruled] == [[[0], [1, 2]]]
    assert len(exported(boss)) == 13 + 2  # six tasks by both, this one by its adjudication; other
    # Withdrawn, the one before it stands; then none does, and the labellers' count again.
    form(boss, "/admin/adjudicate", task=2, project="main", withdraw="yes")
    assert [r["tiers"] for r in exported(boss) if "adj" in r["labeller"]] == [[[1], [2], [0]]]
    form(Page(app, "chief"), "/admin/adjudicate", task=2, project="main", withdraw="yes")
    assert len(exported(boss)) == 14 + 2
    assert listed(boss, project="main", state="disputed") == [[2, 5, 3]]


def exported(boss, **asked):
    found = []
    for project in ("main", "other"):
        answer = boss.client.get("/admin/export", params={"project": project} | asked)
        found += [json.loads(line) for line in answer.text.splitlines()]
    return found


def test_a_list_goes_on_from_page_to_page_and_a_search_from_where_it_stopped(tmp_path, monkeypatch):
    put(tmp_path, rows(130, answers=2))
    store = open_store(tmp_path)
    add(store, "boss", role="admin")
    boss = Page(create_app(store, hosts=["testserver"]), "boss")
    pages = listed(boss, project="main")
    assert [len(page) for page in pages] == [50, 50, 30]
    assert [n for page in pages for n in page] == list(range(1, 131))
    monkeypatch.setattr(workbench, "SEARCHED", 60)
    pages = listed(boss, project="main", text="prompt 12")
    assert pages == [[13], [], [*range(121, 131)]]  # each 60 tasks further


# --- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"form": "dpo", "margins": "true"}, {"form": "dpo", "label_margins": True}),
        (
            {"consensus": "majority", "exclude": "bob"},
            {"consensus": "majority", "exclude": ("bob",)},
        ),
        ({"eval_fraction": "0.4"}, {"eval_fraction": 0.4}),
        ({"form": "kto", "consensus": "dawid-skene"}, {"form": "kto", "consensus": "dawid-skene"}),
    ],
)
def test_the_page_exports_what_the_command_exports(tmp_path, asked, settings):
    put(tmp_path, rows(6), need=2)
    store = open_store(tmp_path)
    add(store, "ann", "bob")
    add(store, "boss", role="admin")
    app = create_app(store, hosts=["testserver"])
    work(Page(app, "ann"), confidence=2)
    work(Page(app, "bob"), tiers=[[0, 1], [2]])
    boss, output = Page(app, "boss"), tmp_path / "out.jsonl"
    answer = boss.client.get("/admin/export", params={"project": "main"} | asked)
    export.run(LabelExportConfig(store=str(tmp_path / "labels.db"), output=output, **settings))
    assert answer.content == output.read_bytes()
    if "eval_fraction" in asked:
        held_out = boss.client.get(
            "/admin/export", params={"project": "main", "part": "eval"} | asked
        )
        assert held_out.content == (tmp_path / "out.eval.jsonl").read_bytes() != b""


def test_an_export_that_will_not_do_is_told(made):
    boss = Page(made[1], "boss")
    work(boss, 1)
    answer = boss.client.get("/admin/export?project=main&form=hh&margins=true")
    assert answer.status_code == 404
    assert "--label-margins" in answer.text


# --- settings and guidelines ---------------------------------------------------------------------


def test_settings_are_versioned_logged_and_say_what_a_labeller_worked_under(made):
    store, app = made
    ann, boss = Page(app, "ann"), Page(app, "boss")
    task = ann.task()
    assert task["guidelines_version"] == 1
    ann.submit(task, [[0], [1], [2]])
    shown = ann.task()  # with the first version's guidelines still on the screen
    store.clock.now += 3600
    new = SETTINGS | {"need": "2", "gold_share": "0.25", "guidelines": "Be\r\n\r\n**true**"}
    answer = form(boss, "/admin/settings", project="main", version="1", **new)
    assert "version 2" in answer.text
    assert "Share of gold tasks: <del>0.0</del> → <ins>0.25</ins>" in answer.text
    assert "<ins>**true**</ins>" in answer.text
    ann.submit(shown, [[0], [1], [2]])
    task = ann.task()
    assert (task["guidelines_version"], task["guidelines"]) == (
        2,
        "<p>Be</p>\n<p><strong>true</strong></p>\n",
    )
    ann.submit(task, [[0], [1], [2]])
    assert re.findall(r"version=(\d)", ann.client.get("/mine").text) == ["2", "1", "1"]
    text = ann.client.get("/guidelines?project=main&version=2").text
    assert "<strong>true</strong>" in text
    assert ann.client.get("/guidelines?project=main&version=3").status_code == 404
    found = audit(store, "main")
    assert [row["project_version"] for row in found if row["type"] == "annotation"].count(2) == 1
    versions = [(r["version"], r["by"], r["guidelines"]) for r in found if r["type"] == "project"]
    assert versions == [(1, None, ""), (2, "boss", "Be\n\n**true**")]
    (event,) = [r for r in found if r.get("action") == "settings"]
    assert (event["name"], event["at"]) == ("boss", store.clock.now)
    assert event["detail"]["changed"] == {
        "gold_share": [0.0, 0.25],
        "guidelines": ["", "Be\n\n**true**"],
    }
    # Nothing changed: no version. A later one that the page had not seen: nothing is overwritten.
    form(boss, "/admin/settings", project="main", version="2", **new)
    stale = form(boss, "/admin/settings", project="main", version="1", **(new | {"need": "5"}))
    assert stale.status_code == 422
    assert "Somebody else has changed" in stale.text
    assert 'value="5"' in stale.text  # what was typed is kept
    with store.read() as t:
        assert [(p["version"], p["settings"]["need"]) for p in t.projects()] == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"need": "0"}, "must be above 0"),
        ({"need": "1.5"}, "give a number"),
        ({"gold_share": "0.6"}, "in [0, 0.5]"),
        ({"random_share": "0.1"}, "in [0.2, 1]"),
        ({"lease_minutes": "nan"}, "finite"),
        ({"strategy": "best"}, "strategy"),
        ({"strategy": "gap"}, "prefloop label score"),
    ],
)
def test_settings_that_will_not_do_are_told_and_change_nothing(made, changes, told):
    store, app = made
    boss = Page(app, "boss")
    answer = form(
        boss, "/admin/settings", project="main", version="1", guidelines="x", **(SETTINGS | changes)
    )
    assert answer.status_code == 422
    assert told in re.search(r'role="alert"[^>]*>([^<]*)<', answer.text)[1]
    with store.read() as t:
        assert t.projects()[0]["version"] == 1
    assert form(boss, "/admin/settings", project="main", version="1").status_code == 409


def test_long_guidelines_can_be_saved(made):
    boss = Page(made[1], "boss")
    long = "주전자를 데운다. " * 3000
    answer = form(boss, "/admin/settings", project="main", version="1", guidelines=long, **SETTINGS)
    assert answer.status_code == 200
    with made[0].read() as t:
        assert t.projects()[0]["guidelines"] == long


def test_an_import_that_changes_settings_says_so(tmp_path):
    put(tmp_path, rows(1))
    told = put(tmp_path, rows(2), need=3)
    assert told["changed"] == {"need": [1, 3]}
    assert "changed" not in put(tmp_path, rows(3), need=3)
    with open_store(tmp_path).read() as t:
        assert t.projects()[0]["version"] == 2


# --- who sees a project --------------------------------------------------------------------------


def test_a_labeller_gets_nothing_of_a_project_of_others_by_any_url(made):
    """`other` is bob's alone: to ann it is as if it were not there."""
    _, app = made
    ann, bob = Page(app, "ann"), Page(app, "bob")
    task = bob.post("/api/next", {"project": "other"}).json()["task"]
    assert "unseen-task" in json.dumps(task["prompt"])
    bob.submit(task, [[0], [1], [2]], comment="secret-comment")
    open_ = bob.post("/api/next", {"project": "other"}).json()["task"]
    own = {"project": "other"}
    answers = [
        ann.client.get("/", params=own),
        ann.client.get("/guidelines", params=own | {"version": 1}),
        ann.post("/api/next", own),
        *(ann.post("/api/open", {"assignment": one["assignment"]}) for one in (task, open_)),
        *(ann.submit(one, [[0], [1], [2]], request_id="another-id") for one in (task, open_)),
        ann.client.put(
            "/api/draft", json={"assignment": open_["assignment"], "draft": {}}, headers=ann.headers
        ),
    ]
    assert [a.status_code for a in answers] == [404, 404, 404, 403, 403, 403, 403, 403]
    nope = ann.client.get("/", params={"project": "nope"})
    assert nope.text.replace("nope", "other") == answers[0].text  # as one that does not exist
    admin = [
        f"{path}?project=other&id=8&version=1"
        for path in ("", "/tasks", "/task", "/quality", "/charts", "/settings", "/export")
    ]
    answers += [ann.client.get(f"/admin{path}") for path in admin]
    for path in ("adjudicate", "settings", "members", "labellers", "access"):
        answers.append(form(ann, f"/admin/{path}", project="other", task="8", name="x"))
    assert {a.status_code for a in answers[8:]} == {403}
    answers += [ann.client.get(path) for path in ("/", "/mine", "/mine?skipped=true")]
    done = work(ann)
    answers += [ann.post("/api/undo"), ann.post("/api/next")]
    said = "\n".join([json.dumps(done), *(a.text for a in answers)])
    assert "unseen-task" not in said
    assert "secret-comment" not in said
    assert len(done) == 7
    assert answers[-1].json()["progress"] == {"done": 7, "skipped": 0, "left": 0}
    assert "<select" not in answers[-5].text  # one project: nothing to choose


def test_who_is_no_member_any_more_gives_back_what_is_in_hand_and_sees_nothing(made):
    store, app = made
    ann, bob, boss = (Page(app, name) for name in ("ann", "bob", "boss"))
    own = {"project": "other"}
    done = bob.post("/api/next", own).json()["task"]
    bob.submit(done, [[0], [1], [2]])
    held = bob.post("/api/next", own).json()["task"]
    with store.read() as t:
        ann_id = t.labeller_named("ann")["id"]
        assert progress_of(t, 2).unsettled == 1  # bob may be given it; ann may not
    answer = form(
        boss, "/admin/members", project="other", seen="members", **{f"member-{ann_id}": "on"}
    )
    assert answer.status_code == 200
    assert bob.post("/api/next", own).status_code == 404
    refused = [
        bob.submit(held, [[0], [1], [2]]),
        bob.submit(done, [[2], [1], [0]], base_version=1, request_id="said-anew"),
        bob.post("/api/open", {"assignment": done["assignment"]}),
    ]
    assert [a.status_code for a in refused] == [403] * 3
    assert "unseen-task" not in bob.client.get("/mine").text
    assert bob.post("/api/undo").json()["task"] is None
    with store.read() as t:
        task = workbench.tasks_of(t, 2, workbench.Wanted(), 10)[0]
        assert sorted((row["taken"], row["done"]) for row in task) == [(0, 0), (1, 1)]
    assert "unseen-task" in json.dumps(ann.post("/api/next", own).json())
    logged = [e["detail"] for e in audit(store, "other") if e.get("action") == "members"][-1]
    assert (logged["added"], logged["removed"]) == (["ann"], ["bob"])
    form(boss, "/admin/members", project="other", seen="all")
    assert "unseen-task" in bob.client.get("/mine").text  # what was said had stayed
    for odd in (
        {"seen": "x"},
        {"seen": "members", "member-99": "on"},
        {"seen": "members", "member-x": "on"},
    ):
        assert form(boss, "/admin/members", project="other", **odd).status_code == 409


def test_several_projects_on_one_page(made):
    _, app = made
    bob = Page(app, "bob")
    text = bob.client.get("/").text
    assert re.findall(r"<option[^>]*>([^<]*)<", text) == [
        "All projects", "main (7 left)", "other (2 left)",
    ]  # fmt: skip
    one = bob.task()
    assert one["project"] == "main"  # of all, the oldest first
    other = bob.post("/api/next", {"project": "other"}).json()
    assert (other["task"]["project"], other["progress"]["left"]) == ("other", 2)
    back = bob.post("/api/next", {"project": "main"}).json()
    assert (back["task"], back["progress"]["left"]) == (one, 7)  # it had stayed in hand
    assert bob.client.get("/?project=other").text.count("selected") == 1


def test_members_are_named_at_import_before_anybody_sees_a_task(tmp_path):
    put(tmp_path, rows(1), members=("ann",))
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    with store.write() as t:
        assert [[p["name"] for p in t.projects(who)] for who in (ann, bob)] == [["main"], []]
        settings = t.projects()[0]["settings"]
        put_project(t, "main", "ranking", None, settings, [bob])  # one more
    put(tmp_path, rows(2))  # nobody named: as it was
    with store.read() as t:
        assert [[p["name"] for p in t.projects(who)] for who in (ann, bob)] == [["main"], ["main"]]


# --- charts --------------------------------------------------------------------------------------


def test_days_are_summed_by_hand(made):
    """ann does two tasks on one day and one on the next, bob the first two of them a day later: the
    first alike, the second with one of three pairs apart."""
    store, app = made
    ann, bob = Page(app, "ann"), Page(app, "bob")
    start = store.clock.now
    for day, seconds in ((0, 4.0), (0, 30.0), (1, 200.0)):
        store.clock.now = start + 86_400 * day
        ann = Page(app, "ann")
        rank(store, "ann", ann, [[0], [1], [2]], seconds)
    store.clock.now = start + 86_400
    bob = Page(app, "bob")
    for tiers in ([[0], [1], [2]], [[0], [2], [1]]):
        rank(store, "bob", bob, tiers, 10.0)
    first = int(start // 86_400)
    with store.read() as t:
        found = workbench.days_of(t, 1, 30)
        later = workbench.days_of(t, 1, 0)
    assert later == []
    names = (
        "labeller",
        "point",
        "annotations",
        "seconds",
        "shared",
        "pace_5",
        "pace_40",
        "pace_160",
    )
    assert [tuple(row[name] for name in names) for row in found] == [
        ("ann", first, 2, 34.0, 2, 1, 2, 2),
        ("ann", first + 1, 1, 200.0, 0, 0, 0, 0),
        ("bob", first + 1, 2, 20.0, 2, 0, 2, 2),
    ]
    assert [row["agreed"] for row in found] == pytest.approx([1 + 2 / 3, 0.0, 1 + 2 / 3])
    text = Page(app, "boss").client.get("/admin/charts?project=main").text
    assert "5 annotations of real tasks." in text
    titles = re.findall(r"<title>([\d-]+): ([\d.]+)</title>", text)
    one, two = (f"2027-01-{15 + n}" for n in (0, 1))
    assert titles == [
        *((one, "2"), (two, "3")),
        *((one, "0.83"), (two, "0.83")),
        *((one, "17"), (two, "73")),
    ]
    assert re.findall(r"<title>((?:≤|&gt;) \d+): (\d)</title>", text) == [
        ("≤ 5", "1"), ("≤ 10", "2"), ("≤ 40", "1"), ("&gt; 160", "1"),
    ]  # fmt: skip
    for span in ("hours", "weeks"):
        assert (
            Page(app, "boss").client.get(f"/admin/charts?project=main&span={span}").status_code
            == 200
        )
    assert Page(app, "boss").client.get("/admin/charts?project=main&span=x").status_code == 422


def rank(store, name, page, tiers, seconds):
    """In the order of the task, whatever order is shown."""
    task = page.task()
    with store.read() as t:
        shown = t.shown_order(task["assignment"], t.labeller_named(name)["id"])
    answer = page.submit(task, [[shown.index(i) for i in tier] for tier in tiers], seconds=seconds)
    assert answer.status_code == 200


# --- pages ---------------------------------------------------------------------------------------

PAGES = [
    *("", "/tasks", "/quality", "/charts", "/charts?span=weeks", "/settings"),
    *("/tasks?state=disputed", "/task?id=1"),
]


def test_admin_pages_are_light_speak_korean_and_have_no_inline_code(tmp_path):
    """With 52 labellers who all did something, 60 tasks, and guidelines of many versions."""
    put(tmp_path, rows(60, answers=2), need=52, lease_minutes=1000)
    store = open_store(tmp_path)
    names = [f"labeller-{n}" for n in range(52)]
    add(store, *names)
    add(store, "boss", role="admin")
    app = create_app(store, hosts=["testserver"])
    for number, name in enumerate(names):
        flags = [{"answer": 0, "flag": "harmful"}] if number < 22 else []
        work(
            Page(app, name), 1, tiers=[[number % 2], [1 - number % 2]], flags=flags, comment="<b>x"
        )
    boss = Page(app, "boss")
    for version in range(1, 13):
        guidelines = "\n".join(f"rule {version} {n}" for n in range(40))
        new = SETTINGS | {"guidelines": guidelines}
        assert (
            form(boss, "/admin/settings", project="main", version=version, **new).status_code == 200
        )
    boss.client.cookies.set("prefloop_language", "ko")
    for path in PAGES:
        url = f"/admin{path}{'&' if '?' in path else '?'}project=main"
        answer = boss.client.get(url)
        assert answer.status_code == 200
        loaded = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text))
        size = len(answer.content) + sum(len(boss.client.get(x).content) for x in loaded)
        assert size < 100_000, url
        assert not re.search(
            r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", answer.text
        )
        assert "<b>x" not in answer.text
        heads = re.findall(
            r"<(?:h1|h2|th|button|label|summary|legend|figcaption|a)[^<>]*>\s*([^<>]+?)\s*<",
            answer.text.split("<caption")[0],
        )
        english = {h for h in heads if re.fullmatch(r"[A-Za-z ]{4,}", h)} - {
            "main",
            "boss",
            "prefloop",
        }
        assert english == set(), url
    text = boss.client.get("/admin?project=main").text
    assert len(re.findall("/admin/access", text)) == 50
    more = re.search(r'href="(/admin\?[^"]*people=[^"]*)"', text)[1].replace("&amp;", "&")
    assert len(re.findall("/admin/access", boss.client.get(more).text)) == 3
    assert boss.client.get("/admin/settings?project=main&before=4").text.count("<h3>") == 3
