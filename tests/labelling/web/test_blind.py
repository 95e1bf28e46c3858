"""Whoever judges compared answers cannot learn which way wrote which."""

import json
import re
from collections import Counter

import pytest
from starlette.routing import Route

from prefloop.labelling.store import key_of
from prefloop.labelling.web.app import create_app
from tests.labelling.small import add, compare_folder, open_store, put
from tests.labelling.web.test_app import Page

WAYS = ("Zebra", "Quokka", "Ocelot")
TASKS = 60


@pytest.fixture(params=["ranking", "pairwise"])
def made(request, tmp_path):
    """(app, by text the way that wrote it) of three ways' answers, in one mode."""
    count = TASKS if request.param == "ranking" else TASKS // 3
    texts = {w: [[f"text {7 * n + 3 * k}"] for n in range(count)] for k, w in enumerate(WAYS)}
    texts = {w: [[f"{t} of {n}"] for n, (t,) in enumerate(rows)] for w, rows in texts.items()}
    folder = compare_folder(tmp_path / "secret-compare", texts)
    put(tmp_path, folder, mode=request.param)
    store = open_store(tmp_path)
    add(store, "ann")
    add(store, "boss", role="admin")
    wrote = {text: way for way, rows in texts.items() for (text,) in rows}
    # Every request may come at once: the limits of rate go by a clock of the test's own.
    times = iter(range(10**6))
    yield create_app(store, hosts=["testserver"], clock=lambda: float(next(times))), wrote
    store.close()


def test_no_route_tells_a_labeller_which_way_wrote_what(made):
    app, wrote = made
    page = Page(app, "ann")
    seen, places = [page.answer.text], Counter()
    # 1. All work: what comes, a draft, a judgement, the same undone and opened again.
    while task := page.task():
        texts = [re.sub("<.*?>", "", answer[0]["html"]).strip() for answer in task["answers"]]
        seen.append(json.dumps(task))
        places.update((wrote[text], place) for place, text in enumerate(texts))
        assert task.keys() == {
            *("assignment", "version", "mode", "practice", "guidelines", "prompt", "answers"),
            *("draft", "said", "project", "guidelines_version"),
        }
        assert all(turn.keys() == {"role", "html", "raw"} for a in task["answers"] for turn in a)
        own = {"assignment": task["assignment"]}
        flags = [{"answer": 0, "flag": "other"}]
        said = page.submit(task, [[i] for i in range(len(texts))], flags=flags)
        seen += [page.client.put("/api/draft", json=own | {"draft": {}}, headers=page.headers).text]
        again = page.post("/api/open", own).json()["task"]
        assert [a[0]["raw"] for a in again["answers"]] == texts  # a fixed order, the same each time
        seen += [said.text, json.dumps(again), page.post("/api/undo").text]
    assert sum(places.values()) == len(seen[1::5]) * len(texts) == len(texts) * TASKS
    # 2. Every route there is, whatever it answers.
    for route in app.routes:
        paths = ["/static/label.js"] if not isinstance(route, Route) else [route.path]
        for path in [p.replace("{name}", "en") for p in paths]:
            for query in ("", "?project=main&id=1", "?skipped=true"):
                got = page.client.get(path + query)
                assert not path.startswith("/admin") or got.status_code in (403, 405)
                seen += [got.text, str(got.headers), str(got.url)]
    # 3. No name, no folder, no hash of a text.
    told = "\n".join(seen).lower()
    assert [word for word in (*WAYS, "secret") if word.lower() in told] == []
    assert not any(key_of(*words) in told for t in wrote for words in ((t,), ("real", t)))
    # 4. Each way stands in each place equally often.
    assert_uniform(places)


def test_the_admin_who_adjudicates_is_blind_too(made):
    app, wrote = made
    page, places = Page(app, "boss"), Counter()
    for task in range(1, TASKS + 1):
        told = page.client.get(f"/admin/task?project=main&id={task}")
        assert told.status_code == 200
        assert not any(way in told.text for way in WAYS)
        texts = list(dict.fromkeys(re.findall(r"text \d+ of \d+", told.text)))
        places.update((wrote[text], place) for place, text in enumerate(texts))
    assert_uniform(places)


def assert_uniform(places):
    """Within 4 standard deviations, over (way, place)."""
    size = len({place for _, place in places})
    assert len(places) == size * len(WAYS)
    expected = sum(places.values()) / len(places)
    deviation = (expected * (1 - 1 / size)) ** 0.5
    assert all(abs(n - expected) < 4 * deviation for n in places.values()), places
