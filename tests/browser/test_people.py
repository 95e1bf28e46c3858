"""Two people judge compared answers in the browser, blind; a verdict comes of it."""

import pytest

from prefloop.config import PeopleConfig
from prefloop.evaluation.labelled import run
from tests.browser.test_labelling import press, ready
from tests.browser.test_page import WIDTHS, screen
from tests.labelling.small import compare_folder

GOOD, FAIR, BAD = "Tea is made with care", "Tea is made", "Tea tea tea"
WAYS = {"Zebra": FAIR, "Quokka": GOOD, "Ocelot": BAD}  # who wrote what of each prompt
STORAGE = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"


def in_order(page):
    """A place for each answer, or the better of two, by texts alone, as the page shows them."""
    texts = page.locator(".answer").all_inner_texts()
    places = [1 if GOOD in text else 2 if FAIR in text else 3 for text in texts]
    if len(places) == 2:
        places = [1 if places[0] < places[1] else 2]
    press(page, " ".join(map(str, places)))


@pytest.mark.parametrize(
    ("width", "mode"), [*((width, "ranking") for width in WIDTHS), (390, "pairwise")]
)
def test_blind_from_the_first_task_to_the_verdict(serve, enter, tmp_path, width, mode):
    answers = {way: [[f"{text}, {n}."] for n in range(3)] for way, text in WAYS.items()}
    folder = compare_folder(tmp_path / "secret-compare", answers)
    server = serve(folder, need=2, mode=mode)
    tasks, shown = (3, 3) if mode == "ranking" else (9, 2)  # each pair of each of three prompts
    for name in ("ann", "bob"):
        watched = enter(server, name, **screen(width))
        page, seen = watched.page, []
        page.on("response", lambda got, seen=seen: seen.append((got.url, str(got.headers))))
        for done in range(tasks):
            ready(page, shown)
            in_order(page)
            seen += [page.content(), page.evaluate(STORAGE)]
            press(page, "Enter")
            page.locator("#progress", has_text=f"{done + 1} done").wait_for()
        page.goto(f"{server.url}/mine")
        seen += [page.content(), *watched.asked]
        assert not any(word in str(seen) for word in (*WAYS, "secret"))
    verdict = run(PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(folder)))
    won = {(p.first, p.second): (p.wins, p.losses, p.labellers) for p in verdict.pairs}
    assert won == {
        ("Zebra", "Quokka"): (0, 6, 2),
        ("Zebra", "Ocelot"): (6, 0, 2),
        ("Quokka", "Ocelot"): (6, 0, 2),
    }
    assert verdict.agreement.people.mean == 1.0
    page.goto((folder / "report.html").as_uri())
    page.get_by_role("heading", name="What people prefer").wait_for()
    assert page.get_by_text(verdict.sentences[0]).count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
