"""Export: each form by hand, consensus, splits, and what is left out."""

import json
import threading

import pytest

from prefloop import sources
from prefloop.config.labelling import LabelExportConfig
from prefloop.data.formats import load
from prefloop.errors import UserError
from prefloop.files import read_rows
from prefloop.labelling import export
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.forms import margin_of
from prefloop.labelling.store.settling import put_finished
from prefloop.records import RowCounts
from tests.labelling.small import add, in_order, open_store, put, rows


def run(folder, **changes):
    settings = {"store": str(folder / "labels.db"), "output": folder / "out.jsonl", **changes}
    result = export.run(LabelExportConfig(**settings))
    return result, [row for _, row in read_rows(settings["output"])]


def ranked(*orders, prompt="p", answers=("a", "b", "c")):
    """One row for each labeller's order of the same answers."""
    return [
        {"prompt": prompt, "completions": list(answers), "tiers": tiers, "labeller": f"l{number}"}
        for number, tiers in enumerate(orders)
    ]


def test_rankings_are_prefloops_own_form(tmp_path):
    put(tmp_path, ranked([[1], [2, 0]], [[0], [1], [2]]))
    result, found = run(tmp_path)
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert found == [
        row | {"tiers": [[1], [2, 0]], "labeller": "l0"},
        row | {"tiers": [[0], [1], [2]], "labeller": "l1"},
    ]
    assert (result["rows"], result["annotations"], result["left_out"]) == (2, 2, {})
    records = load(str(tmp_path / "out.jsonl"), "preference", RowCounts())
    assert [r.tiers for r in records] == [((1,), (2, 0)), ((0,), (1,), (2,))]


def test_pairs_in_trls_form(tmp_path):
    put(tmp_path, ranked([[1], [2, 0]]))
    _, found = run(tmp_path, form="dpo")
    assert found == [
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]


def test_chats_stay_chats(tmp_path):
    def said(role, content):
        return [{"role": role, "content": content}]

    row = {
        "prompt": said("user", "Hi"),
        "completions": [said("assistant", "Hello"), said("assistant", "What")],
        "tiers": [[0], [1]],
    }
    put(tmp_path, [row])
    _, found = run(tmp_path, form="dpo")
    assert found == [
        {
            "prompt": said("user", "Hi"),
            "chosen": said("assistant", "Hello"),
            "rejected": said("assistant", "What"),
        }
    ]
    _, found = run(tmp_path, form="hh")
    assert found == [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: What",
        }
    ]
    (record,) = load(str(tmp_path / "out.jsonl"), "preference", RowCounts())
    assert record.prompt == "\n\nHuman: Hi\n\nAssistant:"


def test_kto_takes_the_best_and_the_worst(tmp_path):
    put(tmp_path, ranked([[1], [0], [2]]))
    result, found = run(tmp_path, form="kto")
    assert [(row["completion"], row["label"]) for row in found] == [("b", True), ("c", False)]
    assert result["left_out"] == {"answer that is neither desirable nor undesirable": 1}
    assert len(load(str(tmp_path / "out.jsonl"), "unpaired", RowCounts())) == 2


def test_kto_by_ratings_and_all_bad(tmp_path):
    put(tmp_path, [rows(1)[0]], mode="rating")
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    task = next_assignment(store, ann)
    rated = in_order(task, "r", tiers=[[2], [0], [1]], ratings=[4, 3, 7])
    submit(store, ann, task.id, rated)
    _, found = run(tmp_path, form="kto")
    assert [row["label"] for row in found] == [False, True]
    put(tmp_path, [rows(2)[1]], project="other")
    task = next_assignment(store, ann)
    submit(store, ann, task.id, in_order(task, "s", all_bad=True))
    _, found = run(tmp_path, form="kto", project="other")
    assert [row["label"] for row in found] == [False] * 3


def test_what_is_left_out_is_counted(tmp_path):
    put(tmp_path, rows(40), repeat_share=0.3)
    gold = [{"prompt": "gold", "completions": ["x", "y"], "tiers": [[0], [1]]}]
    put(tmp_path, gold, gold=True, gold_share=0.3, repeat_share=0.3)
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    for number in range(4):
        task = next_assignment(store, bob)
        said = in_order(task, f"b{number}") if number else Judgement(None, request_id="b0")
        submit(store, bob, task.id, said)
    while task := next_assignment(store, ann):
        submit(store, ann, task.id, in_order(task, f"a{task.id}"))
    result, found = run(tmp_path, exclude=("bob",))
    left_out = result["left_out"]
    assert left_out["skipped"] == 1
    assert left_out["gold task"] >= 1
    assert left_out["repeated task"] >= 1
    assert left_out["labeller bob excluded"] >= 2
    assert result["annotations"] == result["used"] + sum(left_out.values())
    assert result["used"] == len(found)
    assert {row["labeller"] for row in found} == {"ann"}
    _, log = run(tmp_path, form="audit")
    exported = [e for e in log if e["type"] == "event" and e["action"] == "export"]
    assert exported[0]["detail"]["exclude"] == ["bob"]


def test_majority(tmp_path):
    put(tmp_path, ranked([[0], [1]], [[0], [1]], [[1], [0]], answers=("a", "b")))
    result, found = run(tmp_path, consensus="majority")
    assert [row["tiers"] for row in found] == [[[0], [1]]]
    assert (result["annotations"], result["used"]) == (3, 3)


def test_dawid_skene_weighs_by_accuracy(tmp_path):
    """Two labellers who say the opposite of three others everywhere lose; and where the three do
    not speak, their votes count against what they say."""
    right, wrong = [[0], [1]], [[1], [0]]
    data = []
    for number in range(20):
        prompt, answers = f"p{number}", (f"a{number}", f"b{number}")
        orders = (wrong, wrong, right, right, right)
        data += ranked(*orders, prompt=prompt, answers=answers)
    data += ranked(wrong, wrong, prompt="last", answers=("x", "y"))
    put(tmp_path, data)
    _, found = run(tmp_path, consensus="majority")
    assert [row["tiers"] for row in found] == [right] * 20 + [wrong]
    _, found = run(tmp_path, consensus="dawid-skene")
    assert [row["tiers"] for row in found] == [right] * 21


def test_adjudication_goes_before_the_labellers(tmp_path):
    put(tmp_path, ranked([[0], [1], [2]], [[2], [1], [0]]))
    store = open_store(tmp_path)
    (boss,) = add(store, "boss", role="admin")
    for tiers in ([[1], [0, 2]], [[1], [0], [2]]):
        with store.write() as t:
            assert put_finished(t, 1, boss, "adjudication", tiers)
    result, found = run(tmp_path)
    assert [(row["labeller"], row["tiers"]) for row in found] == [("boss", [[1], [0], [2]])]
    assert result["left_out"] == {"overruled by adjudication": 2}


def test_prompts_are_split_whole(tmp_path):
    data = [
        row for n in range(10) for row in ranked([[0], [1], [2]], [[2], [1], [0]], prompt=f"p{n}")
    ]
    put(tmp_path, data)
    result, train = run(tmp_path, eval_fraction=0.3)
    held_out = [row for _, row in read_rows(tmp_path / "out.eval.jsonl")]
    assert (result["rows"], result["eval_rows"]) == (14, 6)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_audit_tells_everything(tmp_path):
    data = rows(1)[0] | {"model": "runs/sft", "log_probs": [-1.0, -2.0, -3.0], "seed": 5}
    put(tmp_path, [data])
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    task = next_assignment(store, ann)
    submit(store, ann, task.id, in_order(task, "1", comment="\ud800 <b>\x00"))
    submit(store, ann, task.id, in_order(task, "2", tiers=[[0, 1, 2]], base_version=1))
    _, found = run(tmp_path, form="audit")
    first, second = (row for row in found if row["type"] == "annotation")
    assert (first["version"], second["version"]) == (1, 2)
    assert first["responses"][1]["log_prob"] == -2.0
    assert first["responses"][1]["model"] == "runs/sft"
    assert first["comment"] == "? <b>\x00"
    assert first["shown"] == list(task.shown)
    assert [row["action"] for row in found if row["type"] == "event"] == ["import"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"project": "x"}, "it holds main"),
        ({"exclude": ("zoe",)}, "no labeller of that name"),
        ({}, "nothing to use"),
        ({"store": "absent.db"}, "no such file"),
        ({"output": "out.txt"}, "give the name of a .jsonl"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, changes, told):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    put(tmp_path, rows(1))
    changes = {**changes, **({"output": Path("out.txt")} if "output" in changes else {})}
    with pytest.raises(UserError, match=told):
        run(tmp_path, **changes)
    assert not (tmp_path / "out.jsonl").exists()


def test_waiting_ends_with_the_last_label(tmp_path, capsys):
    put(tmp_path, rows(2))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")

    def work():
        while task := next_assignment(store, ann):
            submit(store, ann, task.id, in_order(task, str(task.id)))

    timer = threading.Timer(0.2, work)
    timer.start()
    result, _ = run(tmp_path, wait=True, wait_seconds=0.02)
    timer.join()
    assert result["rows"] == 2
    assert "waiting for labels: 0 of 2, 2 tasks open" in capsys.readouterr().err


def test_a_task_that_all_have_skipped_holds_nothing_up(tmp_path):
    put(tmp_path, rows(2))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    first = next_assignment(store, ann)
    submit(store, ann, first.id, Judgement(None, request_id="s"))
    second = next_assignment(store, ann)
    submit(store, ann, second.id, in_order(second, "r"))
    result, _ = run(tmp_path, wait=True)
    assert result["left_out"] == {"skipped": 1}


def test_admins_need_not_label(tmp_path):
    """Two annotations are needed, and ann is the only labeller: boss holds nothing up."""
    put(tmp_path, rows(1), need=2)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    add(store, "boss", role="admin")
    task = next_assignment(store, ann)
    submit(store, ann, task.id, in_order(task, "r"))
    result, _ = run(tmp_path, wait=True)
    assert result["rows"] == 1


def test_rows_are_plain_json(tmp_path):
    put(tmp_path, ranked([[0], [1], [2]]))
    run(tmp_path)
    assert json.loads((tmp_path / "out.jsonl").read_text())["labeller"] == "l0"


def test_equal_answers_ranked_apart_give_no_pair(tmp_path):
    put(tmp_path, ranked([[0], [1], [2]], answers=("a", "a", "b")))
    result, found = run(tmp_path, form="dpo")
    assert result["left_out"] == {"pair of equal answers": 1}
    assert [(row["chosen"], row["rejected"]) for row in found] == [("a", "b"), ("a", "b")]


UNSAID = {
    "prompt": "p",
    "completions": ["a", "b", ""],
    "finish_reasons": ["length", None, None],
    "tiers": [[1], [0], [2]],
}


def test_a_finish_reason_that_nobody_said_stays_unsaid(tmp_path):
    put(tmp_path, [UNSAID])
    _, (row,) = run(tmp_path)
    assert row["finish_reasons"] == ["length", None, None]
    _, log = run(tmp_path, form="audit")
    assert [one["finish_reason"] for one in log[0]["responses"]] == ["length", None, None]
    # The empty answer may have been typed: training takes one only where it was sampled.
    result, pairs = run(tmp_path, form="dpo")
    assert pairs == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "rejected_finish_reason": "length"}
    ]
    assert result["left_out"] == {"empty answer that nothing says was sampled": 2}
    assert len(load(str(tmp_path / "out.jsonl"), "preference", RowCounts())) == 1
    result, found = run(tmp_path, form="kto")
    assert found == [{"prompt": "p", "completion": "b", "label": True}]
    assert result["left_out"]["empty answer that nothing says was sampled"] == 1


def test_an_empty_answer_with_its_tokens_alone_was_sampled(tmp_path):
    ids = {"completion_ids": [[5], [6], [2]], "tokenizer": "0123456789abcdef"}
    put(tmp_path, [UNSAID | ids | {"finish_reasons": None}])
    result, pairs = run(tmp_path, form="dpo")
    assert (len(pairs), result["left_out"]) == (3, {})
    assert pairs[1] == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "",
        "chosen_ids": [6],
        "rejected_ids": [2],
        "tokenizer": "0123456789abcdef",
    }
    records = load(str(tmp_path / "out.jsonl"), "preference", RowCounts())
    assert [one.ended for one in records[1].sampled] == [None, None]


# --- margins -------------------------------------------------------------------------------------

SAID = [  # strength, confidence, margin by hand
    (None, None, 0.0),
    (1, None, 1 / 3),
    (2, None, 2 / 3),
    (3, None, 1.0),
    (3, 1, 0.0),
    (3, 2, 0.5),
    (1, 3, 1 / 3),
    (None, 2, 1 / 3),
    (None, 3, 2 / 3),
]


@pytest.mark.parametrize(("strength", "confidence", "margin"), SAID)
def test_margins_by_hand(strength, confidence, margin):
    assert margin_of(strength, confidence) == pytest.approx(margin)


def test_strength_and_confidence_reach_exports_and_training_where_asked(tmp_path):
    put(tmp_path, rows(2, answers=2), mode="pairwise")
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    for number, (strength, confidence) in enumerate([(3, 2), (None, None)]):
        task = next_assignment(store, ann)
        said = {"strength": strength, "confidence": confidence}
        submit(store, ann, task.id, in_order(task, f"request-{number}", **said))
    address = str(tmp_path / "labels.db")
    for form in ("rankings", "dpo"):
        for asked, margins in ((False, [None, None]), (True, [None, 0.5])):
            output = tmp_path / f"{form}-{asked}.jsonl"
            config = LabelExportConfig(store=address, output=output, form=form, label_margins=asked)
            export.run(config)
            written = [row.get("margin") for _, row in read_rows(str(output))]
            assert sorted(written, key=str) == sorted(margins, key=str)
    for asked, margins in ((False, [0.0, 0.0]), (True, [0.0, 0.5])):
        found = sources.load(address, "preference", RowCounts(), margins=asked)
        assert sorted(ranking.margin for ranking in found) == margins
    with pytest.raises(UserError, match="--label-margins reads labelling stores"):
        sources.load(str(tmp_path / "dpo-True.jsonl"), "preference", RowCounts(), margins=True)
