"""How the labellers' page stands on the screen, from a phone to a wide one."""

import pytest

from tests.browser.test_labelling import press, ready, told

WIDTHS = [390, 1280, 1920]
LONG = "\n\n".join(f"Paragraph {n}. " + "Tea is made with care. " * 12 for n in range(20))
CHAT = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]

IN_VIEW = """(selector) => {
  const { top, bottom } = document.querySelector(selector).getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}"""
UNCOVERED = """(card) => {
  card.scrollIntoView({ block: "nearest" });
  const { left, top, bottom, width } = card.getBoundingClientRect();
  const [from, to] = [Math.max(top, 0), Math.min(bottom, innerHeight)];
  return [0.2, 0.5].every((at) =>
    card.contains(document.elementFromPoint(left + width / 2, from + at * (to - from))));
}"""


def screen(width, height=900):
    return {"viewport": {"width": width, "height": 844 if width < 600 else height}}


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
