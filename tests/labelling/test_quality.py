"""The report, against labellers whose faults are known."""

import random

import pytest
from sqlalchemy import text

from prefloop.cli import main
from prefloop.labelling.agreement import ceiling
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.quality import _flags as flags_of
from prefloop.labelling.quality import measure
from tests.labelling.small import add, in_order, open_store, put, rows


def label(store, labeller, decide, most=1000, seconds=30.0):
    """Hand out and answer; `decide` gets the prompt's number, the task and returns tiers."""
    done = 0
    while done < most and (task := next_assignment(store, labeller)) is not None:
        tiers = decide(task)
        request = f"{labeller}-{task.id}"
        said = Judgement(
            tiers, request_id=request, base_version=task.version, seconds=seconds, flags=()
        )
        submit(store, labeller, task.id, said)
        done += 1


def true_order(task):
    return [[0], [1], [2]]


def as_shown(task):
    return [[i] for i in task.shown]


def test_agreement_by_hand(tmp_path):
    """Two tasks: on one the labellers agree on 3 of 3 pairs, on the other on 0 of 3."""
    put(tmp_path, rows(2), need=2)
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    label(store, ann, true_order)
    first = []

    def half(task):
        first.append(task)
        return true_order(task) if len(first) == 1 else [[2], [1], [0]]

    label(store, bob, half)
    q = measure(store, "main")
    assert (q.annotations, q.shared_tasks) == (4, 2)
    assert str(q.agreement) == "0.50 [0.00, 1.00]"
    assert q.ceiling == ceiling(0.5) == (0.5, 0.5)
    assert [r.agreement for r in q.labellers] == [0.5, 0.5]
    assert q.skip_rate == 0.0


def test_each_fault_is_found_and_nobody_is_dropped(tmp_path):
    """Five labellers of 60 tasks and 20 gold tasks each: careful, careless, lazy, hasty, choosy."""
    put(tmp_path, rows(60), need=5, repeat_share=0.2, gold_share=0.3)
    gold = [
        row | {"prompt": f"gold {n}", "tiers": [[0], [1], [2]]} for n, row in enumerate(rows(20))
    ]
    put(tmp_path, gold, gold=True, repeat_share=0.2, gold_share=0.3)
    store = open_store(tmp_path)
    careful, careless, lazy, hasty, choosy = add(
        store, "careful", "careless", "lazy", "hasty", "choosy"
    )
    rng = random.Random(0)
    label(store, careful, true_order)
    label(store, careless, lambda task: [[i] for i in rng.sample(range(3), 3)])
    label(store, lazy, as_shown)
    label(store, hasty, true_order, seconds=2.0)
    label(store, choosy, lambda task: None if rng.random() < 0.5 else true_order(task))
    q = measure(store, "main")
    records = {r.name: r for r in q.labellers}
    assert records["careful"].flags == ()
    assert records["careful"].gold_accuracy == 1.0
    assert records["careful"].consistency == 1.0
    assert records["careful"].accuracy > 0.95
    assert {
        "often against gold",
        "often against the others",
        "often against own earlier answers",
    } <= (set(records["careless"].flags))
    assert "prefers a place on the page" in records["lazy"].flags
    assert records["lazy"].first_wins == 1.0
    assert records["hasty"].flags == ("often very fast",)
    assert records["choosy"].flags == ("skips much",)
    assert 0.3 < records["choosy"].skip_rate < 0.7
    assert sum(r.annotations for r in q.labellers) == q.annotations
    assert q.alpha.low < q.alpha.mean < q.alpha.high


@pytest.mark.parametrize(
    ("alarm", "units", "value"),
    [
        ("often against gold", "gold pairs", {"gold_accuracy": 0.59}),
        ("often against the others", "shared pairs", {"accuracy": 0.54}),
        ("often against own earlier answers", "repeated pairs", {"consistency": 0.69}),
        ("prefers a place on the page", "served", {"first_wins_p": 0.009}),
        ("often very fast", "served", {"fast": 0.21}),
        ("skips much", "seen", {"skip_rate": 0.31}),
    ],
)
def test_each_alarm_needs_ten_of_what_it_is_taken_from(alarm, units, value):
    """The numbers of docs/labelling.md; each alone, with plenty of all else."""
    names = ("gold_accuracy", "accuracy", "consistency", "first_wins_p", "fast", "skip_rate")
    record = dict.fromkeys(names) | value
    plenty = dict.fromkeys(("gold pairs", "shared pairs", "repeated pairs", "served", "seen"), 1000)
    assert list(flags_of(record, plenty | {units: 10})) == [alarm]
    assert list(flags_of(record, plenty | {units: 9})) == []
    ((name, number),) = value.items()
    limit = round(number + (0.01 if number > 0.4 else -0.01), 2) if name != "first_wins_p" else 0.01
    assert list(flags_of(record | {name: limit}, plenty)) == []


def test_pairs_are_counted_where_they_are(tmp_path):
    """Twelve tasks, of which three are shared: nine shared pairs, though twelve annotations; and
    somebody who skips nine of ten is told though one annotation is there."""
    put(tmp_path, rows(12))
    shared = [row | {"prompt": f"shared {n}"} for n, row in enumerate(rows(3))]
    judged = [
        row | {"tiers": tiers, "labeller": name}
        for row in shared
        for name, tiers in (("x", [[0], [1], [2]]), ("y", [[2], [1], [0]]), ("z", [[0], [1], [2]]))
    ]
    put(tmp_path, judged)
    alone = [
        row | {"prompt": f"alone {n}", "tiers": [[0], [1], [2]], "labeller": "y"}
        for n, row in enumerate(rows(9))
    ]
    put(tmp_path, alone)
    store = open_store(tmp_path)
    (choosy,) = add(store, "choosy")
    for n in range(10):
        task = next_assignment(store, choosy)
        submit(
            store,
            choosy,
            task.id,
            Judgement([[0], [1], [2]] if n == 0 else None, request_id=f"r{n}"),
        )
    flags = {r.name: (r.annotations, r.flags) for r in measure(store, "main").labellers}
    assert flags["y"] == (12, ())
    assert flags["choosy"] == (1, ("skips much",))
    put(tmp_path, [row | {"prompt": "shared 3"} for row in judged[:3]])
    flags = {r.name: r.flags for r in measure(store, "main").labellers}
    assert flags["y"] == ("often against the others",)


def test_length_bias_by_hand(tmp_path):
    """Of three pairs with an order the longer answer wins two; a tie and equal lengths say
    nothing."""
    put(
        tmp_path,
        [
            {"prompt": "a", "completions": ["x", "xx", "xxx"], "tiers": [[2], [0], [1]]},
            {"prompt": "b", "completions": ["x", "xx"], "tiers": [[0, 1]]},
            {"prompt": "c", "completions": ["x", "y"], "tiers": [[0], [1]]},
        ],
    )
    q = measure(open_store(tmp_path), "main")
    assert q.longer_wins.mean == pytest.approx(2 / 3)
    assert q.agreement is None and q.alpha is None
    assert q.first_wins is None  # what was imported was not shown in any order
    assert [(r.name, r.seconds, r.flags) for r in q.labellers] == [("import", None, ())]


def test_flags_and_skips_are_counted(tmp_path):
    put(tmp_path, rows(2))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    task = next_assignment(store, ann)
    flags = [{"answer": 1, "flag": "harmful"}, {"answer": None, "flag": "other"}]
    submit(store, ann, task.id, in_order(task, "a", flags=flags))
    task = next_assignment(store, ann)
    skip = Judgement(None, request_id="b", flags=[{"answer": 0, "flag": "harmful"}])
    submit(store, ann, task.id, skip)
    q = measure(store, "main")
    assert q.flagged_answers == {"harmful": 2, "other": 1}
    assert q.skip_rate == 0.5


def test_the_report_on_terminal_and_page(tmp_path, capsys):
    """Names are shown as they are, in a page as text."""
    put(tmp_path, rows(3), need=2)
    store = open_store(tmp_path)
    for labeller in add(store, "ann [bold]", "<b>bob"):
        label(store, labeller, true_order)
    page = tmp_path / "report.html"
    words = ["label", "report", "--store", str(tmp_path / "labels.db"), "--output", str(page)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ann [bold]" in said
    assert "Krippendorff" in said
    content = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;bob" in content
    assert "1.00 [1.00, 1.00]" in content
    assert "<script" not in content


def test_an_empty_project_and_an_unknown_one(tmp_path, capsys):
    put(tmp_path, rows(1))
    store = open_store(tmp_path)
    assert measure(store, "main").annotations == 0
    with store.read() as t:
        assert t.connection.execute(text("SELECT count(*) FROM annotations")).scalar() == 0
    words = ["label", "report", "--store", str(tmp_path / "labels.db"), "--project", "mian"]
    assert main(words) == 2
    told = "no project mian in the store; it holds main; did you mean main?"
    assert told in capsys.readouterr().err
