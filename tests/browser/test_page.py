"""How the labellers' page stands on the screen, from a phone to a wide one."""

import pytest

from prefloop.config.labelling import LabelBackupConfig, LabelExportConfig
from prefloop.files import read_rows
from prefloop.labelling import backup, export
from tests.browser.test_labelling import (
    PLAIN,
    WIDTHS,
    check_accessible,
    drag,
    foreign,
    go_on,
    press,
    ready,
    screen,
    stored,
    told,
)
from tests.labelling.small import open_store, put, rows

LONG = "\n\n".join(f"Paragraph {n}. " + "Tea is made with care. " * 12 for n in range(20))
CHAT = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]

IN_VIEW = """(selector) => {
  const { top, bottom } = document.querySelector(selector).getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}"""
SEEN = """(e) => {
  const { left, bottom, width } = e.getBoundingClientRect();
  return e.contains(document.elementFromPoint(left + width / 2, bottom - 3));
}"""
FLAG_ALL = """async () => {  // before any frame is drawn
  const flags = document.querySelector("#flags");
  flags.querySelectorAll("input:not(:checked)").forEach((flag) => flag.click());
  flags.close();
  await new Promise((done) => flags.addEventListener("close", done, { once: true }));
  const bar = document.querySelector("#bar").getBoundingClientRect();
  return document.querySelectorAll(".answer")[2].getBoundingClientRect().bottom <= bar.top;
}"""
UNCOVERED = """(card) => {
  card.scrollIntoView({ block: "nearest" });
  const { left, top, bottom, width } = card.getBoundingClientRect();
  const [from, to] = [Math.max(top, 0), Math.min(bottom, innerHeight)];
  return [0.2, 0.5].every((at) =>
    card.contains(document.elementFromPoint(left + width / 2, from + at * (to - from))));
}"""


def long_tasks(count=3, answers=4):
    answered = [[{"role": "assistant", "content": f"{k}. {LONG}"}] for k in range(answers)]
    return [
        {"prompt": [*CHAT, {"role": "user", "content": f"Question {n}"}], "completions": answered}
        for n in range(count)
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_each_task_opens_with_its_prompt_in_view(serve, enter, tmp_path, width):
    (tmp_path / "rules.md").write_text(LONG)
    server = serve(long_tasks(), guidelines=tmp_path / "rules.md")
    page = enter(server, "ann", **screen(width)).page
    for _ in range(2):
        ready(page, 4)
        assert page.evaluate(IN_VIEW, "#prompt")
        for card in page.locator(".answer").all():
            assert card.evaluate(UNCOVERED)
        press(page, "1 2 3 4")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        press(page, "Enter")
        told(page, "Submitted")


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_fold_at_one_height_and_unfold_together(serve, enter, width):
    page = enter(serve(long_tasks(1)), "ann", **screen(width)).page
    ready(page, 4)
    heights = "all => all.map((e) => Math.round(e.clientHeight))"
    texts = page.locator(".answer .text")
    assert len(set(folded := texts.evaluate_all(heights))) == 1
    assert texts.evaluate_all("all => all.every((e) => e.scrollHeight > e.clientHeight)")
    press(page, "e")
    assert min(texts.evaluate_all(heights)) > 2 * folded[0]
    assert texts.evaluate_all("all => all.every((e) => e.scrollHeight <= e.clientHeight)")
    page.get_by_role("button", name="Show less: Answer C").click()
    assert texts.evaluate_all(heights) == folded


WRITTEN = "old pond\na frog\n\n|a|b|\n|-|-|\n|1|2|\n\n```py\nif x: 'y'\n```\n\n\\(a_1 * b_1 * c\\)"
CHAT_OF = [{"role": "user", "content": WRITTEN}, {"role": "assistant", "content": WRITTEN}]
LOOK = """all => all.map((turn) => ({
  lines: turn.querySelectorAll("br").length,
  cells: turn.querySelectorAll("th, td").length,
  boxed: getComputedStyle(turn.querySelector("pre code")).borderTopWidth !== "0px",
  colours: new Set([...turn.querySelectorAll("pre code, pre code *")]
    .map((e) => getComputedStyle(e).color)).size,
  tex: turn.innerText.includes("\\\\(a_1 * b_1 * c\\\\)"),
}))"""


@pytest.mark.parametrize("width", WIDTHS)
def test_prompt_turns_and_answers_are_shown_as_written(serve, enter, width):
    answers = [[{"role": "assistant", "content": f"{WRITTEN}{k}"}] for k in "xy"]
    server = serve([{"prompt": [*CHAT_OF, CHAT_OF[0]], "completions": answers}], mode="pairwise")
    page = enter(server, "ann", **screen(width)).page
    ready(page, 2)
    looks = page.locator(".turn").evaluate_all(LOOK)
    assert looks == [{"lines": 1, "cells": 4, "boxed": True, "colours": 3, "tex": True}] * 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    press(page, "r")
    told(page, "as written")
    raw = page.locator(".turn pre").evaluate_all("all => all.map((pre) => pre.textContent)")
    assert raw[:3] == [WRITTEN] * 3
    assert sorted(raw[3:]) == [f"{WRITTEN}x", f"{WRITTEN}y"]
    press(page, "r")
    assert page.locator(".turn").evaluate_all(LOOK) == looks


VALUES = "all => all.map((input) => Number(input.value))"


def values(page):
    """The places chosen, by the place shown; unplaced answers are left out."""
    return page.locator(".answer input:checked").evaluate_all(VALUES)


def bar_order(page):
    """The letters in the bar, place by place."""
    return page.locator("#places [data-place]").evaluate_all(
        "all => all.map((e) => [...e.querySelectorAll('.chip')].map((c) => c.textContent).join(''))"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_tie_is_asked_and_all_bad_undone_takes_its_places_back(serve, enter, width):
    server = serve(rows(2))
    page = enter(server, "ann", **screen(width)).page
    ready(page)
    assert page.get_by_role("heading", name="Rank the answers").is_visible()
    assert "1 = best, 3 = worst" in page.locator("#scale").inner_text()
    submit = page.get_by_role("button", name="Submit")
    press(page, "1 1")
    told(page, "1 again makes B tie")
    assert values(page) == [1]
    assert submit.is_disabled()
    press(page, "a")
    told(page, "All are bad")
    assert values(page) == [1, 2, 2]
    assert submit.is_enabled()
    press(page, "a")
    told(page, "taken back")
    assert values(page) == [1]
    for n, said in ((1, [1]), (1, [1, 1]), (2, [1, 1]), (2, [1, 1, 1])):  # each is asked
        page.locator(f"[name=value-{n}][value='1']").click(force=True)
        assert values(page) == said
    press(page, "Enter")
    told(page, "All answers tie")
    assert stored(server) == []
    press(page, "Enter")
    told(page, "Submitted")
    assert stored(server) == [[[0, 1, 2]]]


@pytest.mark.parametrize("width", WIDTHS)
def test_an_answer_goes_between_others_which_move_along(serve, enter, width):
    server = serve(rows(2, answers=4))
    page = enter(server, "ann", **screen(width)).page
    ready(page, 4)
    press(page, "1 2 3")
    press(page, "Shift+Digit2")  # D before what stands second
    assert bar_order(page) == ["A", "D", "B", "C"]
    told(page, "Answer D: place 2")
    drag(page, "C", page.locator("[data-gap='0']"))
    assert bar_order(page) == ["C", "A", "D", "B"]
    drag(page, "A", page.locator("[data-gap='3']"), held=".answer")
    assert bar_order(page) == ["C", "D", "A", "B"]
    press(page, "k k k k")
    drag(page, "B", page.locator("[data-place='2']"))  # onto D: a tie
    assert bar_order(page) == ["C", "BD", "A", ""]
    page.locator(".answer").nth(3).focus()
    press(page, "ArrowUp")  # out of the tie
    assert bar_order(page) == ["C", "D", "B", "A"]
    press(page, "ArrowUp ArrowDown ArrowDown")
    assert bar_order(page) == ["C", "B", "D", "A"]
    press(page, "Enter")
    told(page, "Submitted")
    assert stored(server) == [[[2], [1], [3], [0]]]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bar_holds_what_submitting_needs_wherever_the_page_is(serve, enter, width):
    server = serve(long_tasks(2))
    page = enter(server, "ann", **screen(width)).page
    ready(page, 4)
    press(page, "e f")
    page.get_by_role("group", name="Answer B").get_by_label("harmful").check()
    page.get_by_role("group", name="The whole task").get_by_label("false").check()
    press(page, "Escape e 1 2 f")
    page.get_by_role("group", name="Answer C").get_by_label("false").check()  # it grows
    press(page, "Escape")
    page.wait_for_function(
        SEEN, arg=page.locator(".answer").nth(2).locator("label").last.element_handle()
    )
    press(page, "e ?")
    assert page.locator("#help").evaluate("help => help.scrollTop") == 0
    press(page, "Escape")
    for at in ("0", "document.body.scrollHeight / 2", "document.body.scrollHeight"):
        page.evaluate(f"scrollTo(0, {at})")
        for selector in ("#submit", "#status", "#places", "#flagged"):
            assert page.evaluate(IN_VIEW, selector), (at, selector)
    assert "harmful" in page.locator(".answer").nth(1).inner_text()
    assert page.locator("#flagged").inner_text() == "⚑ false"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bar = page.locator("#bar").evaluate("bar => bar.clientHeight / innerHeight")
    assert bar < 0.35
    kbd = page.locator("#bar button kbd").evaluate_all("all => all.map((e) => e.textContent)")
    assert kbd == ["Enter", "U", "S", "F"]
    lefts = page.locator(".answer").evaluate_all(
        "all => all.map((e) => Math.round(e.getBoundingClientRect().left))"
    )
    assert lefts[0] == lefts[2] <= lefts[1] == lefts[3]
    assert (lefts[0] < lefts[1]) == (width >= 1200)  # two by two, or one below the other
    ends = page.locator(".answer fieldset").evaluate_all(
        "all => all.map((e) => Math.round(e.getBoundingClientRect().bottom))"
    )
    assert (ends[0] == ends[1]) == (width >= 1200)  # the flag above B's places moves A's along


@pytest.mark.parametrize("keys", ["1", "1 2 3 4 5 6 7 8 9"])
def test_nine_answers_are_all_seen_in_the_bar_of_a_phone(serve, enter, keys):
    """In lines, and a chip goes from one line to another."""
    page = enter(serve(rows(1, answers=9)), "ann", **screen(390)).page
    ready(page, 9)
    press(page, keys)
    boxes = [box.bounding_box() for box in page.locator("#bar .chip, #places [data-place]").all()]
    assert len(boxes) == 18
    assert min(box["x"] for box in boxes) >= 0
    assert max(box["x"] + box["width"] for box in boxes) <= 390
    assert len({round(box["y"]) for box in boxes}) > 2
    assert page.locator("#order").evaluate("e => e.scrollWidth <= e.clientWidth")
    assert page.locator("#bar").evaluate("bar => bar.clientHeight / innerHeight") < 0.4
    drag(page, "A", page.locator("[data-place='9']"))
    assert bar_order(page) == [*([""] * 8), "A"] if keys == "1" else [*"BCDEFGH", "AI", ""]


@pytest.mark.parametrize("width", WIDTHS)
def test_flags_that_make_the_bar_taller_leave_the_answer_clear_of_it(serve, enter, width):
    page = enter(serve(long_tasks(2)), "ann", **screen(width)).page
    ready(page, 4)
    press(page, "1 2 f")
    assert page.evaluate(FLAG_ALL)


MODES = {
    "ranking": ("Rank the answers", "1 = best", "2", "Answer A: place 2."),
    "pairwise": ("Choose the better answer", "Which answer is better", "2", "B is better"),
    "rating": ("Rate the answers", "7 = excellent", "6", "Answer A: 6 of 7."),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_each_mode_has_its_title_scale_and_voice(serve, enter, tmp_path, width):
    server = serve(rows(1), project="ranking")
    for mode in ("pairwise", "rating"):
        put(tmp_path, rows(1), project=mode, mode=mode)
    page = enter(server, "ann", **screen(width)).page
    for mode, (title, scale, keys, said) in MODES.items():
        page.goto(f"{server.url}/?project={mode}")
        ready(page, 2 if mode == "pairwise" else 3)
        assert page.get_by_role("heading", level=1).inner_text() == title
        assert page.title() == title
        assert scale in page.locator("#scale").inner_text()
        press(page, keys)
        told(page, said)
        press(page, "c")
        told(page, "unsure")
        press(page, "Enter")
        told(page, "Submitted" if mode == "pairwise" else "every answer first")


@pytest.mark.parametrize("width", WIDTHS)
def test_practice_teaches_then_own_work_can_be_changed(serve, enter, tmp_path, width):
    server = serve(rows(3))
    taught = {"tiers": [[2], [0, 1]], "reason": "The **third** is true."}
    put(tmp_path, [rows(1)[0] | {"prompt": "practice"} | taught], practice=True)
    page = enter(server, "ann", **screen(width)).page
    ready(page)
    assert page.get_by_text("A practice task").is_visible()
    texts = page.locator(".answer .text").all_inner_texts()
    press(page, "1 2 3 Enter")
    dialog = page.get_by_role("dialog", name="How the project orders these")
    dialog.wait_for()
    assert "The third is true." in dialog.inner_text()
    letter = {text.strip(): "ABC"[n] for n, text in enumerate(texts)}
    best, *rest = (letter[f"answer 0.{k}"] for k in (2, 0, 1))
    order = page.locator("#lesson-theirs").inner_text()
    assert order in (f"{best} > {' = '.join(rest)}", f"{best} > {' = '.join(rest[::-1])}")
    assert page.locator("#lesson-yours").inner_text() == "A > B > C"
    check_accessible(page)
    page.get_by_role("button", name="Go on").click()
    told(page, "Submitted")
    assert page.get_by_text("A practice task").is_hidden()
    assert page.locator("#progress").inner_text() == "0 done by you, 0 skipped, 3 left for you"
    press(page, "3 2 1 Enter")
    page.locator("#progress", has_text="1 done by you, 0 skipped, 2 left").wait_for()
    press(page, "s")
    page.locator("#progress", has_text="1 done by you, 1 skipped, 1 left").wait_for()
    press(page, "u")  # the skipped one
    page.get_by_text("You did this one before").wait_for()
    assert values(page) == []
    press(page, "u")  # the one before it
    page.wait_for_function("() => document.querySelectorAll('.answer input:checked').length === 3")
    assert values(page) == [3, 2, 1]
    page.get_by_role("button", name="Back to what is open").click()
    page.get_by_text("You did this one before").wait_for(state="hidden")
    page.get_by_role("link", name="My work").click()
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    said = page.locator("td:first-of-type").all_inner_texts()
    assert said == ["Skipped.", "C > B > A", "A > B > C (practice)"]
    page.get_by_role("link", name="Skipped").click()
    assert page.locator("td:first-of-type").all_inner_texts() == ["Skipped."]
    page.get_by_role("link", name="All").click()
    page.get_by_role("link", name="Change").nth(1).click()
    ready(page)
    assert values(page) == [3, 2, 1]
    press(page, "1 Shift+Digit1 Enter")
    told(page, "Submitted")
    assert stored(server)[-1] == [[0], [2], [1]]
    assert server.select("SELECT max(version) FROM annotations") == [(2,)]


@pytest.mark.parametrize("width", WIDTHS)
def test_differences_of_near_equal_answers(serve, enter, width):
    """The words that differ stand below the fold, where nobody would see them."""
    answers = ["Boil the water\n" * 30 + f"and wait {n} minutes." for n in ("four", "five")]
    page = enter(
        serve([{"prompt": "Tea?", "completions": answers}], mode="pairwise"), "ann", **screen(width)
    ).page
    ready(page, 2)
    shown = page.locator(".answer .text").all_inner_texts()
    press(page, "v")
    told(page, "compared with answer A")
    texts = page.locator(".answer .text")
    assert texts.evaluate_all("all => all.every((e) => e.scrollHeight <= e.clientHeight)")
    words = [next(w for w in ("four", "five") if w in text) for text in shown]
    assert page.locator("del").all_inner_texts() == [words[0]]
    assert page.locator("ins").all_inner_texts() == [words[1]]
    assert (
        page.locator(".answer .text").first.inner_text().strip()
        == answers[["four", "five"].index(words[0])]
    )
    check_accessible(page)
    press(page, "v")
    assert page.locator("del, ins").count() == 0
    assert page.locator(".answer .text").all_inner_texts() == shown


LIGHT_OR_DARK = {"light": [(360, "en"), (390, "ko"), (1280, "en"), (1920, "ko")]}
LIGHT_OR_DARK["dark"] = [(360, "ko"), (390, "en"), (1280, "ko"), (1920, "en")]


@pytest.mark.parametrize(
    ("width", "locale", "scheme"),
    [(*look, scheme) for scheme, looks in LIGHT_OR_DARK.items() for look in looks],
)
def test_axe_finds_nothing_in_any_mode(serve, enter, tmp_path, width, locale, scheme):
    code = "```py\n# x\nif 1: 'a'\n```\n`b`\n\n|a|\n|-|\n|b|"
    data = [row | {"completions": [code, code + "2"]} for row in rows(1)]
    server = serve(data, mode="rating")
    for mode in ("pairwise", "ranking"):
        put(tmp_path, data, project=mode, mode=mode)
    page = enter(server, "ann", locale=locale, color_scheme=scheme, **screen(width)).page
    for _ in range(3):
        ready(page, 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        press(page, "f")
        page.locator("#flag-boxes input").nth(5).check()
        press(page, "Escape 1 c v")
        check_accessible(page)
        press(page, "v a")
        if width < 600:
            page.locator("#more").click()
        check_accessible(page)
        if locale == "ko":
            assert foreign(page) <= {"English", *MODES, *PLAIN}
        page.locator("#answers").click()
        go_on(page, "Enter")
    page.locator("#controls").wait_for(state="hidden")
    page.goto(server.url + "/mine")
    check_accessible(page)
    if locale == "ko":
        assert foreign(page) <= {*MODES, *PLAIN}


@pytest.mark.parametrize("width", WIDTHS)
def test_how_strong_and_how_sure_becomes_a_margin_and_a_backup_keeps_it(serve, enter, width):
    """`slightly` and `fairly sure` are 1/3 and 1/2 (docs/labelling.md): 1/6. The store is copied
    while it is served; served in its place, the copy shows the labeller the same work."""
    server = serve(rows(2, answers=2), mode="pairwise")
    page = enter(server, "ann", **screen(width)).page
    ready(page, 2)
    press(page, "1 d c c")
    told(page, "fairly sure")
    press(page, "Enter")
    told(page, "Submitted")
    copied, margins = server.folder / "copy", server.folder / "margins.jsonl"
    copied.mkdir()
    store = str(server.folder / "labels.db")
    backup.run(LabelBackupConfig(store=store, output=str(copied / "labels.db")))
    export.run(LabelExportConfig(store=store, output=margins, form="dpo", label_margins=True))
    ((_, row),) = read_rows(margins)
    assert row["margin"] == pytest.approx(1 / 6)
    port = server.port
    server.stop()
    server.store.close()
    server.store = open_store(copied)
    server.start(port)
    page.goto(f"{server.url}/mine")
    assert page.locator("td:first-of-type").all_inner_texts()[0].startswith("A > B")
