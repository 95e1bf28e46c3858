"""Two people judge compared answers in the browser, blind; a verdict comes of it."""

import pytest

from prefloop.config import PeopleConfig
from prefloop.evaluation.labelled import run
from tests.browser.test_labelling import WIDTHS, press, ready, screen
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


def cells(page, label):
    """The texts of a table's rows."""
    rows = page.get_by_role("region", name=label).locator("tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


@pytest.mark.parametrize("mode", ["ranking", "pairwise"])
@pytest.mark.parametrize("width", WIDTHS)
def test_blind_from_the_first_task_to_the_verdict(serve, enter, tmp_path, width, mode):
    """The judge likes long answers and the reward model short ones; people like Quokka's, which
    are the longest, and Zebra's above Ocelot's, which are as long: the judge is right in 2.5 of 3
    pairs, the reward model in 0.5."""
    answers = {way: [[f"{text}, {n}."] for n in range(2)] for way, text in WAYS.items()}
    folder = compare_folder(
        tmp_path / "secret-compare", answers, reward_model=lambda text: -len(text)
    )
    server = serve(folder, need=2, mode=mode)
    tasks, shown = (2, 3) if mode == "ranking" else (6, 2)  # each pair of each of two prompts
    for name in ("ann", "bob"):
        watched = enter(server, name, **screen(width))
        page, seen = watched.page, []
        page.on("response", lambda got, answered=(answered := []): answered.append(got))
        for done in range(tasks):
            ready(page, shown)
            in_order(page)
            seen += [page.content(), page.evaluate(STORAGE)]
            press(page, "Enter")
            page.locator("#progress", has_text=f"{done + 1} done").wait_for()
        page.wait_for_load_state("networkidle")
        seen += [(got.url, got.headers, got.text()) for got in answered]
        assert len(answered) > 2 * tasks  # tasks and submissions
        page.goto(f"{server.url}/mine")
        seen += [page.content(), *watched.asked]
        assert not any(word in str(seen) for word in (*WAYS, "secret"))
    verdict = run(PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(folder)))
    won = {(p.first, p.second): (p.wins, p.losses, p.labellers) for p in verdict.pairs}
    assert won == {
        ("Zebra", "Quokka"): (0, 4, 2),
        ("Zebra", "Ocelot"): (4, 0, 2),
        ("Quokka", "Ocelot"): (4, 0, 2),
    }
    agreed = verdict.agreement
    assert agreed.people.mean == 1.0
    assert agreed.judge.mean == pytest.approx(2.5 / 3)
    assert agreed.reward_model.mean == pytest.approx(0.5 / 3)
    page.goto((folder / "report.html").as_uri())
    page.get_by_role("heading", name="What people prefer").wait_for()
    for sentence in verdict.sentences:
        assert page.get_by_text(sentence).count() == 1
    # Two prompts count as two judgements: Wilson's lower end is 2 / (2 + 1.96²). Strengths: with a
    # tie added to each pair, s(a) + s(2a) = 9 / 5, where s is the logistic function.
    always, never = "1.00 [0.34, 1.00]", "0.00 [0.00, 0.66]"
    zebra, quokka, ocelot = cells(page, "People's win rates")
    assert zebra == ["Zebra", "–", never, always, "0"]
    assert (quokka[:4], quokka[4][:5]) == (["Quokka", always, "–", always], "1.63 ")
    assert (ocelot[:4], ocelot[4][:5]) == (["Ocelot", never, never, "–"], "-1.63")
    every = cells(page, "People's verdict on every two ways")
    assert [row[:3] for row in every] == [
        ["Zebra : Quokka", "0 – 0 – 4", "0.00"],
        ["Zebra : Ocelot", "4 – 0 – 0", "1.00"],
        ["Quokka : Ocelot", "4 – 0 – 0", "1.00"],
    ]
    assert [row[4:6] for row in every] == [["0.00", "1.00"], ["0.50", "0.50"], ["1.00", "0.00"]]
    for row, pair in zip(every, verdict.pairs, strict=True):
        assert (row[3], row[7]) == (str(pair.length_controlled), str(pair.more))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
