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
