"""The pages of compare and report in a browser: three widths, light and dark, hostile words."""

import json
from dataclasses import replace

import pytest

from prefloop.config import ReportConfig
from prefloop.evaluation.comparison import Comparison, Point
from prefloop.evaluation.pairs import Scored, all_pairs
from prefloop.evaluation.report import render
from prefloop.evaluation.run_report import run
from tests.browser.test_labelling import WIDTHS, check_accessible, screen
from tests.evaluation.test_report import answered, near, way
from tests.evaluation.test_run_report import make_run
from tests.labelling.web.hostile import hostile_strings

PROMPTS = 45
ATTACKS = [text for text in hostile_strings() if len(text) < 20_000]


def page_of(prompts=PROMPTS):
    """DPO gains n - 20 on prompt n, PPO loses 1 on each; every text is an attack."""
    ways = (way("SFT", 0.0, 0.0), way("PPO <b>", -1.0, 3.0), way("DPO", 2.0, 4.0))
    scores = {"SFT": 0.0, "PPO <b>": -1.0}
    rows, by_way = [], {}
    for one in ways:
        judged = [scores.get(one.name, n - 20.0) for n in range(prompts)]
        by_way[one.name] = judged
        for n, judge in enumerate(judged):
            attack = ATTACKS[(3 * n + len(by_way)) % len(ATTACKS)]
            more = {"truncated": [n == 7 and one.name == "DPO"], "judge": [judge]}
            rows.append(answered(one.name, f"prompt {n}: {ATTACKS[n]}", attack, **more))
    scored = [Scored(n, [[[s] for s in j]], [[[9.0] for _ in j]]) for n, j in by_way.items()]
    points = [Point("DPO", 1, n, 1.0 * n, 0.5 * n, near(0.2 * n)) for n in range(4)]
    found = Comparison(
        ways=ways,
        prompts=prompts,
        frontier=((1, 0.0, 0.0), (2, 0.19, 0.4)),
        reward_run=None,
        settings={"judge": ATTACKS[3], "models": []},
        verdicts=all_pairs(scored),
        sentences=(f"PPO {ATTACKS[5]}", "DPO is better."),
        checkpoints=tuple(points),
    )
    return render(replace(found, notes=(ATTACKS[0],)), rows)


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(html, width, scheme)`: the page from a file, free of errors and of requests."""
    contexts = []

    def show(html, width, scheme="light"):
        file = tmp_path / "page.html"
        file.write_bytes(html.encode("utf-8", "surrogatepass"))
        context = browser.new_context(color_scheme=scheme, **screen(width))
        page, wrong, asked = context.new_page(), [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        contexts.append((context, file.as_uri(), wrong, asked))
        return page

    yield show
    for context, url, wrong, asked in contexts:
        context.close()
        assert wrong == []
        assert set(asked) == {url}


def check_whole(page, width):
    """Nothing ran, nothing is wider than the screen, and axe finds nothing."""
    assert page.evaluate("window.hacked ?? null") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    check_accessible(page)


@pytest.mark.parametrize(
    ("width", "scheme"), [*zip((360, *WIDTHS), ("dark", "light", "dark", "light"), strict=True)]
)
def test_hostile_answers_are_found_sorted_and_inert(opened, width, scheme):
    page = opened(page_of(), width, scheme)
    check_whole(page, width)
    told = page.get_by_role("status")
    heads = page.locator("#answers-list h3")
    assert told.inner_text() == "Prompts 1 to 20 of 45"
    page.get_by_role("navigation", name="Pages", exact=True).get_by_text("Next").click()
    page.get_by_role("navigation", name="Pages", exact=True).get_by_text("Next").click()
    assert told.inner_text() == "Prompts 41 to 45 of 45"
    assert heads.all_inner_texts() == [f"Prompt {n}" for n in range(41, 46)]
    page.get_by_label("Order").select_option("down")  # of DPO against SFT: n - 20
    assert heads.all_inner_texts()[:2] == ["Prompt 1", "Prompt 2"]
    page.get_by_label("Prompts where it").select_option("win")
    assert told.inner_text() == "Prompts 1 to 20 of 24 that fit, of 45 in all"
    assert heads.first.inner_text() == "Prompt 22"
    page.get_by_label("Prompts where it").select_option("tie")
    assert heads.all_inner_texts() == ["Prompt 21"]
    page.get_by_label("Prompts where it").select_option("all")
    page.get_by_label("With a sign").select_option("cut")
    assert heads.all_inner_texts() == ["Prompt 8"]
    assert "· cut" in page.locator("#answers-list").inner_text()
    page.get_by_label("With a sign").select_option("")
    page.get_by_label("Search").fill("PROMPT 33: ")
    assert heads.all_inner_texts() == ["Prompt 34"]
    page.get_by_role("checkbox", name="SFT").uncheck()
    assert page.locator("#answers-list .answers > div").count() == 2
    page.get_by_label("Search").fill("in no text at all")
    assert told.inner_text() == "No prompt fits; ask for less"
    assert page.evaluate("window.hacked ?? null") is None
    assert (
        page.evaluate("document.querySelectorAll('#answers-list *[onerror], iframe').length") == 0
    )


def test_the_readers_theme_goes_before_the_systems_and_paper_is_light(opened):
    page = opened(page_of(3), 1280, "dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = [page.evaluate(colour)]
    for name in ("light", "dark", "auto"):
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == f"Theme: {name}"
        seen.append(page.evaluate(colour))
    dark, light = seen[:2]
    assert seen == [dark, light, dark, dark]
    assert dark != light
    page.emulate_media(media="print")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    assert page.locator("#look").is_hidden()
    page.emulate_media(media="screen")
    page.locator("#theme").click()
    page.reload()
    assert page.locator("#theme").inner_text() == "Theme: light"


@pytest.mark.parametrize(
    ("width", "scheme"), [*zip((360, *WIDTHS), ("light", "dark", "light", "dark"), strict=True)]
)
def test_the_page_of_runs_fits(opened, tmp_path, width, scheme):
    found = json.loads(json.dumps({"name": ATTACKS[0], "step": 2, "text": ATTACKS[4]}))
    made = [
        make_run(
            tmp_path / f"{ATTACKS[1][:40].replace('/', '')}{n}",
            health=[found],
            settings={"seed": n},
        )
        for n in range(2)
    ]
    html = run(ReportConfig(runs=tuple(map(str, made)), output=tmp_path / "r.html")).read_text()
    page = opened(html, width, scheme)
    page.locator("summary").first.click()
    check_whole(page, width)
