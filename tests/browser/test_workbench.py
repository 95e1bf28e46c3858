"""The admin's pages, and several projects on the labeller's, as they stand on the screen."""

import re

import pytest

from tests.browser.test_labelling import check_accessible, press, ready, told
from tests.browser.test_page import WIDTHS, screen
from tests.labelling.small import put, rows

LOCALES = {390: "ko-KR", 1280: "en-GB", 1920: "ko-KR"}
SCHEMES = {390: "dark", 1280: "light", 1920: "dark"}
PAGES = (
    *("", "/tasks", "/tasks?state=disputed", "/task?id=1", "/quality"),
    *("/charts", "/charts?span=weeks", "/settings"),
)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_admins_pages_fit_and_axe_finds_nothing(serve, enter, tmp_path, width):
    (tmp_path / "rules.md").write_text("Prefer **true** answers.\n" * 30)
    server = serve(rows(2), need=2, guidelines=tmp_path / "rules.md")
    for name, keys in (("ann", "1 2 3"), ("bob", "3 2 1")):
        page = enter(server, name).page
        for _ in range(2):
            ready(page)
            press(page, f"f Tab Space Escape {keys} Enter")
            page.wait_for_timeout(300)
    page = enter(
        server, "boss", locale=LOCALES[width], color_scheme=SCHEMES[width], **screen(width)
    ).page
    for path in PAGES:
        page.goto(f"{server.url}/admin{path}{'&' if '?' in path else '?'}project=main")
        check_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        painted = "performance.getEntriesByName('first-contentful-paint').length"
        page.wait_for_function(painted)


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
    page.get_by_role("button", name="Save").first.press("Enter")
    page.get_by_role("heading", name=re.compile("version 2 .* boss")).wait_for()
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
