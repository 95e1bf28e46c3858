"""People's work in a real browser: rank, tie, skip, undo, reload; keys, mouse, touch, phone."""

import json
import time

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.labelling.small import rows

WIDTHS = [390, 1280, 1920]
LOCALES = {360: "en-GB", 390: "ko-KR", 1280: "en-GB", 1920: "ko-KR"}
LATIN = """() => {
  const texts = [...document.querySelectorAll("body, body *")].flatMap((e) => [
    ...(e.closest("script, .turn, .text, code, textarea") ? [] : e.childNodes),
    ...["aria-label", "title", "placeholder"].map((name) => e.getAttributeNode(name))])
    .filter((n) => n && n.nodeType !== Node.ELEMENT_NODE).map((n) => n.nodeValue);
  return [document.title, ...texts].flatMap((text) => text.match(/[a-z]{2,}/gi) ?? []);
}"""
# Names of ours and of keys, which no language changes.
PLAIN = {
    *("prefloop", "main", "prompt", "ann", "bob", "boss"),
    *("Backspace", "Enter", "Shift", "UTC"),
}
ORDERS = "SELECT n.tiers, a.shown FROM annotations n JOIN assignments a ON a.id = n.assignment_id"


def screen(width, height=900):
    return {"viewport": {"width": width, "height": 844 if width < 600 else height}}


def ready(page, answers=3):
    """Wait for a task."""
    page.locator("#work:not([hidden])").wait_for()
    page.wait_for_function("n => document.querySelectorAll('.answer').length === n", arg=answers)


def told(page, text):
    page.get_by_role("status").filter(has_text=text).wait_for()


def press(page, keys):
    for key in keys.split():
        page.keyboard.press(key)


def go_on(page, keys):
    """Press them, and wait until the page tells another count of what is done."""
    before = page.locator("#progress").inner_text()
    press(page, keys)
    page.wait_for_function(
        "(before) => document.querySelector('#progress').innerText !== before", arg=before
    )


def foreign(page):
    """Words in Latin letters that the page itself says: not texts to judge, code and scripts."""
    return set(page.evaluate(LATIN))


def is_saved(values):
    """Whether a response is that to the draft with these places or ratings."""

    def found(response):
        sent = response.request.post_data if response.url.endswith("/api/draft") else None
        return sent is not None and json.loads(sent)["draft"]["values"] == values

    return found


def stored(server):
    """Tiers by places shown, in the order of submission."""
    found = []
    for tiers, shown in server.select(f"{ORDERS} ORDER BY n.id"):
        place = {position: n for n, position in enumerate(json.loads(shown))}
        found.append(tiers and [[place[i] for i in tier] for tier in json.loads(tiers)])
    return found


def check_accessible(page):
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", WIDTHS)
def test_two_people_at_once(serve, enter, width):
    """They rank, tie, skip and undo, each with tasks of their own; a reload changes nothing."""
    server = serve(rows(6))
    ann, bob = (enter(server, name, **screen(width)).page for name in ("ann", "bob"))
    ready(ann)
    ready(bob)
    first = ann.locator(".answer").all_inner_texts()
    assert first != bob.locator(".answer").all_inner_texts()
    with ann.expect_response(is_saved([2, 1, 3])):
        press(ann, "2 1 3")
    press(bob, "1 1 1")
    ann.evaluate("localStorage.clear()")  # what the server has must do
    ann.reload()
    ready(ann)
    assert ann.locator(".answer").all_inner_texts() == first
    assert ann.locator("input:checked").evaluate_all("all => all.map(x => x.value)") == [
        "2",
        "1",
        "3",
    ]
    press(ann, "Enter")
    told(ann, "Submitted")
    press(bob, "2 Enter")
    told(bob, "Submitted")
    press(ann, "s")
    told(ann, "Skipped")
    press(bob, "u")
    told(bob, "Here it is again")
    assert bob.locator("input:checked").evaluate_all("all => all.map(x => x.value)") == [
        "1",
        "1",
        "2",
    ]
    press(bob, "3 Enter")  # the mark is on the first answer
    told(bob, "Submitted")
    assert stored(server) == [[[1], [0], [2]], [[0, 1], [2]], None, [[1], [2], [0]]]
    assert server.select("SELECT taken, done FROM tasks WHERE done > 0") == [(1, 1), (1, 1)]


@pytest.mark.parametrize("width", WIDTHS)
def test_by_keyboard_alone(serve, enter, width):
    server = serve(rows(4))
    page = enter(server, "ann", **screen(width)).page
    ready(page)
    press(page, "Enter")
    told(page, "Place every answer first")
    press(
        page, "1 2 k k ArrowUp"
    )  # 1, 2, then back to the first: it moves up from 1, which is the top
    assert page.locator("input:checked").count() == 2
    press(page, "j j 3 u 1 1")  # undone, and placed again: a tie with the first
    press(page, "j ArrowDown ArrowDown Backspace 3")
    press(page, "c c a a e f")
    assert page.locator("#flags").is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    press(page, "?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    press(page, "Enter")
    told(page, "Submitted")
    (tiers,) = stored(server)
    assert sorted(n for tier in tiers for n in tier) == [0, 1, 2]
    said = server.select("SELECT confidence, all_bad, flags, seconds FROM annotations")[0]
    assert said[:2] == (2, 0)
    assert json.loads(said[2]) != []
    # Without the shortcuts, by Tab and the arrows of radio groups.
    ready(page)
    for n in range(3):
        page.locator(f"[name=value-{n}]").first.focus()
        page.keyboard.press("Space")
        for _ in range(n):
            page.keyboard.press("ArrowRight")
    page.locator("#submit").focus()
    page.keyboard.press("Enter")
    told(page, "Submitted")
    assert stored(server)[1] == [[0], [1], [2]]


def test_all_bad_places_the_rest_last(serve, enter):
    server = serve(rows(2))
    page = enter(server, "ann").page
    ready(page)
    press(page, "a Enter")
    told(page, "Submitted")
    assert stored(server) == [[[0, 1, 2]]]
    assert server.select("SELECT all_bad FROM annotations") == [(1,)]


def drag(page, letter, slot, held="#bar"):
    """Drag the letter of an answer, held in the bar or (`.answer`) in the answer's head."""
    chip = page.locator(f"{held} .chip", has_text=letter)
    chip.scroll_into_view_if_needed()
    a, b = chip.bounding_box(), slot.bounding_box()
    page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    page.mouse.down()
    page.mouse.move(b["x"] + b["width"] - 4, b["y"] + 10, steps=4)
    page.mouse.up()


def test_by_mouse(serve, enter):
    server = serve(rows(2))
    page = enter(server, "ann").page
    ready(page)
    places = page.locator("#places [data-place]")
    drag(page, "C", places.nth(0))
    drag(page, "A", places.nth(1))
    drag(page, "B", places.nth(1))
    drag(page, "A", page.locator("#order"))
    drag(page, "A", places.nth(2))
    page.get_by_role("button", name="Submit").click()
    told(page, "Submitted")
    assert stored(server) == [[[2], [1], [0]]]


def finger(page, letter, slot):
    """Drag a letter of the bar with a finger, which rests before it lifts: nothing is flung."""
    touch = page.context.new_cdp_session(page)
    a, b = (x.bounding_box() for x in (page.locator("#bar .chip", has_text=letter), slot))
    start = (a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    end = (b["x"] + b["width"] / 2, b["y"] + b["height"] / 2)
    way = [tuple(p + (q - p) * n / 4 for p, q in zip(start, end, strict=True)) for n in range(5)]
    began = time.time() - 5  # the events' own clock: seven steps of half a second
    steps = [
        ("touchStart", way[0]),
        *(("touchMove", at) for at in [*way[1:], end]),
        ("touchEnd", ()),
    ]
    for n, (kind, at) in enumerate(steps):
        points = [{"x": at[0], "y": at[1]}] if at else []
        event = {"type": kind, "touchPoints": points, "timestamp": began + n / 2}
        touch.send("Input.dispatchTouchEvent", event)
    touch.detach()


@pytest.mark.parametrize("width", [360, *WIDTHS])
def test_by_touch(serve, enter, width):
    server = serve(rows(2, answers=4))
    touched = {**screen(width), "has_touch": True, "is_mobile": width < 600}
    page = enter(server, "ann", **touched).page
    ready(page, 4)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for n, value in enumerate("3124"):
        page.locator(f"[name=value-{n}][value='{value}']").tap()
    finger(page, "D", page.locator("[data-gap='0']"))
    told(page, "Answer D: place 1")
    finger(page, "B", page.locator("[data-gap='3']"))
    told(page, "Answer B: place 3")
    assert page.evaluate("scrollX") == 0  # a finger on a letter moves the letter alone
    page.locator("#flag").tap()
    page.get_by_role("group", name="Answer C").get_by_label("harmful").tap()
    page.get_by_role("button", name="Close").tap()
    assert "harmful" in page.locator(".answer").nth(2).inner_text()
    check_accessible(page)
    page.get_by_role("button", name="Submit").tap()
    told(page, "Submitted")
    assert stored(server) == [[[3], [2], [1], [0]]]


@pytest.mark.parametrize("width", WIDTHS)
def test_pairs(serve, enter, width):
    said = {"1": [[0], [1]], "2": [[1], [0]], "3": [[0, 1]], "a": [[0, 1]]}
    server = serve(rows(4, answers=2), mode="pairwise")
    page = enter(server, "ann", **screen(width)).page
    for done, key in enumerate(said, start=1):
        ready(page, 2)
        press(page, f"{key} d d Enter")
        if key == "3":  # a tie of all is asked once
            told(page, "All answers tie")
            press(page, "Enter")
        page.locator("#progress", has_text=f"{done} done").wait_for()
    assert stored(server) == [*said.values()]
    stands = "SELECT strength, all_bad FROM annotations ORDER BY id"
    assert server.select(stands) == [(2, key == "a") for key in said]


@pytest.mark.parametrize("width", WIDTHS)
def test_ratings(serve, enter, width):
    server = serve(rows(2), mode="rating")
    page = enter(server, "ann", **screen(width)).page
    ready(page)
    press(page, "7 2 2 Enter")
    told(page, "Submitted")
    assert stored(server) == [[[0], [1, 2]]]
    (ratings,), (shown,) = (
        server.select("SELECT ratings FROM annotations"),
        server.select("SELECT shown FROM assignments WHERE state = 'done'"),
    )
    by_place = [json.loads(ratings[0])[i] for i in json.loads(shown[0])]
    assert by_place == [7, 2, 2]
    check_accessible(page)


@pytest.mark.parametrize(("width", "locale"), LOCALES.items())
def test_axe_finds_nothing(serve, enter, tmp_path, locale, width):
    (tmp_path / "rules.md").write_text("Prefer **true** answers.\n\n- short\n- kind")
    server = serve(rows(3, answers=9), guidelines=tmp_path / "rules.md")
    page = enter(server, "boss", locale=locale, viewport={"width": width, "height": 900}).page
    ready(page, 9)
    assert page.locator("html").get_attribute("lang") == locale[:2]
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for key, dialog in (("f", "#flags"), ("?", "#help")):
        page.keyboard.press(key)
        page.locator(dialog).wait_for()
        check_accessible(page)
        page.keyboard.press("Escape")
    press(page, "1 2 3 4 5 6 7 8 9")
    last = page.locator("[data-place='9'] .chip")
    last.wait_for()
    order, chip = page.locator("#order").bounding_box(), last.bounding_box()
    assert order["x"] <= chip["x"] <= order["x"] + order["width"] - chip["width"]
    press(page, "Enter")
    page.locator("#progress", has_text="1").wait_for()
    for path in ("/admin", "/admin/quality?project=main", "/admin/task?project=main&id=1"):
        page.goto(server.url + path)
        check_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_done_survives_a_server_that_stops(serve, enter, width):
    server = serve(rows(2))
    watched = enter(server, "ann", **screen(width))
    page = watched.page
    ready(page)
    port = server.port
    server.stop()
    press(page, "3 2 1 Enter")
    told(page, "Your work is kept here")
    server.start(port)
    told(page, "Submitted")
    assert stored(server) == [[[2], [1], [0]]]
    watched.errors.clear()  # the browser notes each connection refused


@pytest.mark.parametrize("width", WIDTHS)
def test_a_session_that_ends_keeps_the_draft(serve, enter, width):
    server = serve(rows(1))
    watched = enter(server, "ann", **screen(width))
    page = watched.page
    ready(page)
    with page.expect_response(is_saved([3, 2, None])):
        press(page, "3 2")
    with server.store.write() as t:
        t.connection.exec_driver_sql("DELETE FROM sessions")
    press(page, "1 Enter")
    told(page, "Your session has ended")
    page.goto(f"{server.url}/enter?token=token-ann")
    ready(page)
    assert page.locator("input:checked").count() == 3  # the last key too: the browser kept it
    press(page, "Enter")
    told(page, "Nothing is left")
    assert stored(server) == [[[2], [1], [0]]]
    watched.errors.clear()  # the browser notes the refused request


@pytest.mark.parametrize("width", WIDTHS)
def test_two_tabs(serve, enter, width):
    """The second tab's submission of the same task is refused; it goes on with what is open."""
    server = serve(rows(2))
    watched = enter(server, "ann", **screen(width))
    one = watched.page
    ready(one)
    two = one.context.new_page()
    two.goto(server.url)
    ready(two)
    press(one, "1 2 3 Enter")
    told(one, "Submitted")
    press(two, "3 2 1 Enter")
    told(two, "submitted already")
    assert stored(server) == [[[0], [1], [2]]]
    ready(two)
    watched.errors.clear()
