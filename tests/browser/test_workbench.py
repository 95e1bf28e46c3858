"""The admin's pages, and several projects on the labeller's, as they stand on the screen."""

import json
import re
from pathlib import Path

import pytest
from benchmarks import paint

from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store.projects import put_project
from prefloop.labelling.store.reading import labellers_named
from prefloop.labelling.web import app
from tests.browser.test_labelling import (
    LOCALES,
    PLAIN,
    WIDTHS,
    check_accessible,
    foreign,
    go_on,
    press,
    ready,
    screen,
    told,
)
from tests.labelling.small import put, rows

SCHEMES = {360: "light", 390: "dark", 1280: "light", 1920: "dark"}
# Bytes of a page with all that it loads and asks for, uncompressed.
SIZE = """["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
# What commands call them, and what the guidelines below say.
UNTRANSLATED = {
    *("English", "rankings", "dpo", "hh", "kto", "audit", "labeller", "majority", "dawid", "skene"),
    *("Prefer", "true", "answers", *PLAIN),
}
PAGES = (
    *("", "/tasks", "/tasks?state=disputed", "/task?id=1", "/quality"),
    *("/charts", "/charts?span=weeks", "/settings"),
)


@pytest.mark.parametrize("width", LOCALES)
def test_all_pages_fit_are_light_and_axe_finds_nothing(serve, enter, tmp_path, width):
    (tmp_path / "rules.md").write_text("Prefer **true** answers.\n" * 30)
    server = serve(rows(2), need=2, guidelines=tmp_path / "rules.md")
    for name, keys in (("ann", "1 2 3"), ("bob", "3 2 1")):
        page = enter(server, name).page
        for _ in range(2):
            ready(page)
            go_on(page, f"f Tab Space Escape {keys} Enter")
    page = enter(
        server, "boss", locale=LOCALES[width], color_scheme=SCHEMES[width], **screen(width)
    ).page
    paths = [f"/admin{path}{'&' if '?' in path else '?'}project=main" for path in PAGES]
    for path in (*paths, "/", "/mine", "/guidelines?project=main&version=1"):
        page.goto(server.url + path)
        check_accessible(page)
        if LOCALES[width] == "ko-KR":
            if path == paths[0]:  # the log holds commands and their settings
                page.locator("main > .scroll").last.evaluate("log => log.remove()")
            assert foreign(page) <= UNTRANSLATED, path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        painted = "() => performance.getEntriesByName('first-contentful-paint').length > 0"
        page.wait_for_function(painted)
        assert 8_000 < page.evaluate(SIZE) < 100_000, path


@pytest.mark.parametrize("width", WIDTHS)
def test_an_admin_settles_a_dispute_and_changes_the_guidelines_by_keyboard(serve, enter, width):
    server = serve(rows(3), need=1)
    judged = {"x": [[0], [1], [2]], "y": [[2], [1], [0]]}
    row = rows(1)[0] | {"prompt": "disputed"}
    put(server.folder, [row | {"tiers": judged[name], "labeller": name} for name in judged])
    ann = enter(server, "ann", **screen(width)).page
    ready(ann)
    page = enter(server, "boss", **screen(width)).page
    page.goto(f"{server.url}/admin")
    page.get_by_role("link", name="Tasks").press("Enter")
    page.get_by_label("State").select_option("disputed")
    page.get_by_role("button", name="Show").press("Enter")
    page.get_by_role("row", name="disputed").get_by_role("link").press("Enter")
    for n, place in enumerate("212"):
        page.get_by_label("Place").nth(n).fill(place)
    page.get_by_role("button", name="Adjudicate").press("Enter")
    page.get_by_text("None.").wait_for()  # no other is disputed
    said = "SELECT tiers FROM annotations n JOIN assignments a ON a.id = n.assignment_id"
    assert server.select(f"{said} WHERE strategy = 'adjudication'") == [("[[1], [0, 2]]",)]
    page.get_by_role("link", name="Settings").press("Enter")
    page.get_by_label("Guidelines").fill("Be **kind**.")
    page.get_by_label("Share of gold tasks").fill("0.25")
    page.get_by_role("button", name="Save").first.press("Enter")
    page.get_by_role("heading", name=re.compile("version 2 .* boss")).wait_for()
    version = page.get_by_role("region", name="version 2")
    assert version.locator("li").all_inner_texts() == ["Share of gold tasks: 0.0 → 0.25"]
    version.get_by_text("Guidelines", exact=True).press("Enter")
    assert version.locator("ins").all_inner_texts() == ["0.25", "Be **kind**."]
    page.get_by_role("link", name="Admin").press("Enter")
    log = page.get_by_role("group", name="Log").locator("tbody tr").all_inner_texts()
    assert [line.split("\t")[1:3] for line in log[:2]] == [
        ["boss", "settings"],
        ["boss", "adjudicate"],
    ]
    assert '"gold_share": [0.0, 0.25]' in log[0]
    press(ann, "1 2 3 Enter")
    told(ann, "The guidelines have changed since your last task: version 2")
    assert ann.get_by_text("Be kind.").is_visible()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_labeller_chooses_between_projects_on_one_page(serve, enter, tmp_path, width):
    server = serve(rows(2))
    put(tmp_path, rows(2, answers=2), project="pairs", mode="pairwise")
    watched = enter(server, "ann", **screen(width))
    page = watched.page
    ready(page)
    chosen = page.locator("#project")
    press(page, "2")
    chosen.select_option("pairs")
    page.get_by_role("heading", name="Choose the better answer").wait_for()
    assert page.url.endswith("/?project=pairs")
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.reload()
    ready(page, 2)
    chosen.select_option("main")
    ready(page)
    assert page.locator("input:checked").count() == 1  # as it was left
    missing = page.goto(f"{server.url}/?project=nope")
    assert missing.status == 404
    assert page.get_by_role("link").all_inner_texts() == ["main", "pairs"]
    check_accessible(page)
    watched.errors.clear()  # the browser notes the page that is not there


def listed(page):
    """The ids in the list of tasks."""
    return page.locator("tbody th[scope=row] a").all_inner_texts()


@pytest.mark.parametrize("width", WIDTHS)
def test_an_admin_finds_tasks_and_opens_them(serve, enter, width):
    """Of three tasks ann has done one, with a flag; the others are in hand."""
    server = serve(rows(3), need=1)
    put(server.folder, [rows(1)[0] | {"prompt": "known", "tiers": [[0], [1], [2]]}], gold=True)
    ann = enter(server, "ann").page
    ready(ann)
    first = ann.locator("#prompt").inner_text().strip()
    press(ann, "f Tab Space Escape 1 2 3 Enter")
    told(ann, "Submitted")
    number = {f"prompt {n}": str(n + 1) for n in range(3)}
    held = sorted({*number.values()} - {number[first]})  # ann's next, and one of the admin's
    page = enter(server, "boss", **screen(width)).page
    page.goto(f"{server.url}/admin/tasks?project=main")
    for label, value, wanted in (
        ("State", "done", [number[first]]),
        ("State", "held", held),
        ("State", "open", []),
        ("State", "any", ["1", "2", "3", "4"]),
        ("Kind", "gold", ["4"]),
    ):
        page.get_by_label(label).select_option(value)
        page.get_by_role("button", name="Show").click()
        assert listed(page) == wanted, value
    page.get_by_label("Kind").select_option("any")
    for label, asked in (("Labeller", "ann"), ("Text", "PROMPT 2"), ("Text", "no such text")):
        page.goto(f"{server.url}/admin/tasks?project=main")
        page.get_by_label(label).first.fill(asked)
        page.get_by_role("button", name="Show").click()
        found = {"ann": [number[first]], "PROMPT 2": ["3"], "no such text": []}[asked]
        assert listed(page) == found, asked
    page.goto(f"{server.url}/admin/tasks?project=main")
    page.get_by_label("with flags or comments").check()
    page.get_by_role("button", name="Show").click()
    page.get_by_role("row", name=first).get_by_role("link").click()
    assert "false" in page.get_by_role("group", name="What labellers said").inner_text()
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_an_admin_sees_charts_and_alarms_chooses_members_and_exports(serve, enter, width):
    """ann and bob do eleven tasks, bob against ann throughout and against gold; both are told."""
    server = serve(rows(11, answers=2), need=2)
    gold = [
        row | {"prompt": "gold", "tiers": [[k] for k in range(5)]} for row in rows(1, answers=5)
    ]
    put(server.folder, gold, gold=True)
    with server.store.write() as t:
        projects = t.projects()[0]["settings"] | {"gold_share": 0.5}
        put_project(t, "main", "ranking", None, projects)
    with server.store.read() as t:
        people = labellers_named(t)
    for name in ("ann", "bob"):
        while task := next_assignment(server.store, people[name]):
            tiers = [[i] for i in range(len(task.shown))]
            said = Judgement(
                tiers if name == "ann" else tiers[::-1], request_id=f"{name}-{task.id}"
            )
            submit(server.store, people[name], task.id, said)
    watched = enter(server, "boss", **screen(width))
    page = watched.page
    page.goto(f"{server.url}/admin?project=main")
    page.get_by_role("link", name="Charts").click()
    page.get_by_text("22 annotations of real tasks.").wait_for()
    chart = page.get_by_role("img", name="Pair agreement on shared tasks")
    assert chart.locator("rect").count() == 0  # they agree on nothing
    assert page.get_by_role("img", name="Annotations", exact=True).locator("rect").count() == 1
    assert page.get_by_role("img", name="Mean seconds a task").count() == 1
    assert page.get_by_role("img", name="Annotations by seconds taken").locator("rect").count() == 1
    for span in ("30 hours", "30 weeks"):
        page.get_by_role("link", name=span).click()
        page.get_by_text("22 annotations of real tasks.").wait_for()
    for name in ("ann", "bob"):  # each labeller's curve has a point where work was done
        curve = page.get_by_role("img", name=f"Annotations: {name}").locator("path")
        assert curve.get_attribute("d").startswith("M")
    page.get_by_role("link", name="Quality").click()
    alarms = page.get_by_role("row", name=re.compile("^bob .*often against gold")).count()
    assert (alarms, page.get_by_role("row", name=re.compile("^ann .*against gold")).count()) == (
        1,
        0,
    )
    page.get_by_role("link", name="Settings").click()
    page.get_by_label("only these").check()
    page.get_by_label("bob").check()
    page.get_by_role("button", name="Save").last.click()
    page.goto(f"{server.url}/admin?project=main")
    page.get_by_text("Only its members see this project.").wait_for()
    page.get_by_label("Form").select_option("dpo")
    with page.expect_download() as got:
        page.get_by_role("button", name="Download").click()
    exported = [json.loads(line) for line in got.value.path().read_text().splitlines()]
    assert len(exported) == 22
    assert got.value.suggested_filename == "dpo.jsonl"
    missing = page.goto(f"{server.url}/admin/tasks?project=nope")
    assert missing.status == 404
    page.get_by_text("There is no project nope").wait_for()
    assert page.get_by_role("link").all_inner_texts() == ["main"]
    watched.errors.clear()  # the browser notes the page that is not there
    ann = enter(server, "ann", **screen(width))
    ann.page.goto(f"{server.url}/?project=main")
    ann.page.get_by_text("There is no project main").wait_for()
    ann.errors.clear()


def test_the_benchmark_of_paint_sees_what_a_page_loads(serve, browser):
    """The labelling page has the style and the script, `/mine` the style alone."""
    server = serve(rows(1))
    seen = {
        path: paint.look(browser, server.url, path, paint.SCREENS["phone"])
        for path in ("/", "/mine")
    }
    static = Path(app.__file__).with_name("static")
    style, script = ((static / name).stat().st_size for name in ("style.css", "label.js"))
    assert style + script < seen["/"][1] < 100_000
    assert style < seen["/mine"][1] < style + script
    assert all(ms > 0 for ms, _ in seen.values())
