"""Import: rows of `sample`, rankings, pairs, other tools' exports; what is dropped is counted."""

import json

import pytest
from sqlalchemy import text

from prefloop.config.labelling import LabelImportConfig
from prefloop.errors import UserError
from prefloop.labelling import imports
from prefloop.labelling.imports import uncertainty_and_gap
from tests.labelling.small import NO_EXTRAS, open_store, put, rows


def select(folder, query):
    store = open_store(folder)
    with store.read() as t:
        found = t.connection.execute(text(query)).all()
    store.close()
    return found


def put_file(folder, name, content, **changes):
    (folder / name).write_text(content, encoding="utf-8")
    settings = {"store": str(folder / "labels.db"), **NO_EXTRAS, **changes}
    return imports.run(LabelImportConfig(data=str(folder / name), **settings))


def judged(folder):
    return select(
        folder,
        "SELECT l.name, n.tiers FROM annotations n JOIN assignments a ON a.id = n.assignment_id "
        "JOIN labellers l ON l.id = a.labeller_id ORDER BY n.id",
    )


def test_rows_of_sample_keep_how_they_were_made(tmp_path):
    row = {
        "prompt": "Name a colour.",
        "topic": "colours",
        "completions": [" Blue.", " Mud."],
        "finish_reasons": ["stop", "length"],
        "log_probs": [-1.5, -7.25],
        "model": "runs/sft",
        "weights": "ab" * 32,
        "seed": 3,
        "sampling": {"temperature": 0.7},
    }
    told = {"project": "main", "rows": 1, "tasks": 1, "prompts": 0, "dropped": {}}
    assert put(tmp_path, [row]) == told
    assert select(
        tmp_path,
        "SELECT completion, log_prob, finish_reason, seed, sampling, model, weights "
        "FROM responses JOIN snapshots s ON s.id = snapshot_id ORDER BY responses.id",
    ) == [
        ('" Blue."', -1.5, "stop", 3, '{"temperature": 0.7}', "runs/sft", "ab" * 32),
        ('" Mud."', -7.25, "length", 3, '{"temperature": 0.7}', "runs/sft", "ab" * 32),
    ]
    assert select(tmp_path, "SELECT prompt, extra FROM prompts") == [
        ('"Name a colour."', '{"topic": "colours"}')
    ]


def test_the_same_rows_again_add_nothing(tmp_path):
    put(tmp_path, rows(3))
    again = put(tmp_path, rows(3))
    assert again["tasks"] == 0
    assert again["dropped"] == {"task that is there already": 3}
    assert select(tmp_path, "SELECT count(*) FROM responses") == [(9,)]


def test_new_answers_to_a_known_prompt_are_a_new_task(tmp_path):
    put(tmp_path, rows(1))
    put(tmp_path, [rows(1)[0] | {"completions": [" x", " y"]}])
    assert select(tmp_path, "SELECT count(*), count(DISTINCT prompt_id) FROM tasks") == [(2, 1)]


def test_rankings_and_pairs_come_in_as_annotations(tmp_path):
    ranked = rows(1)[0] | {"tiers": [[2], [0, 1]], "labeller": "ann"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    chat = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "What?"}],
    }
    put(tmp_path, [ranked, pair, chat])
    assert judged(tmp_path) == [
        ("ann", "[[2], [0, 1]]"),
        ("import", "[[0], [1]]"),
        ("import", "[[0], [1]]"),
    ]
    assert select(tmp_path, "SELECT need, taken, done FROM tasks") == [(1, 1, 1)] * 3
    again = put(tmp_path, [ranked, rows(1)[0] | {"tiers": [[0], [1], [2]], "labeller": "bob"}])
    assert again["dropped"] == {"task that is there already": 1}
    assert judged(tmp_path)[-1] == ("bob", "[[0], [1], [2]]")
    found = select(tmp_path, "SELECT need, taken, done FROM tasks ORDER BY id")
    assert found == [(2, 2, 2), (1, 1, 1), (1, 1, 1)]  # `need` makes room
    assert select(tmp_path, "SELECT DISTINCT active FROM labellers") == [(0,)]


def test_equal_answers_are_shown_once(tmp_path):
    data = [
        {"prompt": "p", "completions": ["a", "b", "a"]},
        {"prompt": "q", "completions": ["a", "a"]},
    ]
    result = put(tmp_path, data)
    assert result["tasks"] == 1
    assert result["dropped"] == {
        "answer equal to another one": 2,
        "row whose answers are all equal": 1,
    }


def test_in_pairwise_mode_each_pair_is_a_task(tmp_path):
    ranked = rows(1)[0] | {"tiers": [[2], [0, 1]]}
    assert put(tmp_path, [ranked], mode="pairwise")["tasks"] == 3
    assert [tiers for _, tiers in judged(tmp_path)] == ["[[0, 1]]", "[[1], [0]]", "[[1], [0]]"]


def test_uncertainty_and_gap_by_hand():
    """Two models and three answers. Differences of pairs: (1, 3), (2, 2), (1, -1); their standard
    deviations 1, 0, 1. Mean scores 0, -2, -2."""
    models = [[0.0, -1.0, -2.0], [0.0, -3.0, -2.0]]
    assert uncertainty_and_gap(models) == (pytest.approx(2 / 3), 2.0)
    assert uncertainty_and_gap([]) == (0.0, 0.0)


def test_parquet_rows(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows(2)), tmp_path / "rows.parquet")
    config = LabelImportConfig(
        store=str(tmp_path / "labels.db"), data=str(tmp_path / "rows.parquet")
    )
    assert imports.run(config)["tasks"] == 2


ARGILLA = {
    "fields": {"prompt": "Name a colour.", "reply-1": "Blue.", "reply-2": "Mud.", "reply-3": "5"},
    "metadata": {},
}


def test_argilla_nested_exports(tmp_path):
    ranks = [{"value": f"reply-{n}", "rank": rank} for n, rank in ((1, 1), (2, 2), (3, 1))]
    second = {
        **ARGILLA,
        "responses": {
            "order": [
                {"value": ranks, "user_id": "u1", "status": "submitted"},
                {"value": ["reply-3", "reply-1", "reply-2"], "user_id": "u2"},
                {"value": ranks, "user_id": "u3", "status": "discarded"},
            ],
            "comment": [{"value": "fine", "user_id": "u1"}],
        },
    }
    first = {
        "fields": {**ARGILLA["fields"], "prompt": "Another"},
        "responses": [
            {"user_id": "u1", "status": "submitted", "values": {"order": {"value": ranks}}}
        ],
    }
    result = put_file(tmp_path, "argilla.json", json.dumps([second, first]))
    assert result["tasks"] == 2
    assert result["dropped"] == {"discarded response": 1}
    assert judged(tmp_path) == [
        ("u1", "[[0, 2], [1]]"),
        ("u2", "[[2], [0], [1]]"),
        ("u1", "[[0, 2], [1]]"),
    ]


def test_argilla_flat_exports(tmp_path):
    row = {
        "prompt": "Name a colour.",
        "reply-1": "Blue.",
        "reply-2": "Mud.",
        "order.responses": [["reply-2", "reply-1"]],
        "order.responses.users": ["u1"],
        "order.responses.status": ["submitted"],
    }
    put_file(tmp_path, "argilla.jsonl", json.dumps(row))
    assert judged(tmp_path) == [("u1", "[[1], [0]]")]


def test_label_studio_exports(tmp_path):
    pair = {
        "id": 1,
        "data": {"prompt": "Name a colour.", "answer1": "Blue.", "answer2": "Mud."},
        "annotations": [
            {
                "completed_by": {"email": "ann@example.org"},
                "result": [{"type": "pairwise", "value": {"selected": "right"}}],
            },
            {"completed_by": 7, "was_cancelled": True, "result": []},
        ],
    }
    items = [{"id": "x", "body": "one"}, {"id": "y", "body": "two"}, {"id": "z", "body": "three"}]
    ranked = {
        "id": 2,
        "data": {"prompt": "Count.", "items": items},
        "annotations": [
            {
                "completed_by": 7,
                "result": [{"type": "ranker", "value": {"ranker": {"rank": ["z", "x", "y"]}}}],
            }
        ],
    }
    result = put_file(tmp_path, "studio.json", json.dumps([pair, ranked]))
    assert result["dropped"] == {"annotation without a decision": 1}
    assert judged(tmp_path) == [("ann@example.org", "[[1], [0]]"), ("7", "[[2], [0], [1]]")]


BUCKETS = {
    "data": {"prompt": "p", "items": [{"id": "x", "body": "a"}, {"id": "y", "body": "b"}]},
    "annotations": [
        {"result": [{"type": "ranker", "value": {"ranker": {"good": ["x"], "bad": ["y"]}}}]}
    ],
}


@pytest.mark.parametrize(
    ("row", "changes", "told"),
    [
        ({"prompt": "p", "completion": "a"}, {}, "preference rows need"),
        ({"instruction": "p"}, {}, "preference rows need"),
        ({"prompt": "p"}, {"gold": True}, "a gold row needs"),
        ({"prompt": "p", "completions": ["a"]}, {}, "1 answers; labellers rank 2 to 9"),
        ({"prompt": "p", "completions": [str(n) for n in range(10)]}, {}, "10 answers"),
        ({"prompt": "p", "completions": ["a", "b"], "log_probs": 5}, {}, "`log_probs` must"),
        (
            {"prompt": "p", "completions": ["a", "b"], "log_probs": [1.0]},
            {},
            "`log_probs` must hold one",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1.0]}, {}, "must hold 2 numbers"),
        ({"prompt": "p", "completions": ["a", "b"], "judged": [{"x": 1}]}, {}, "`judged` must be"),
        ({"prompt": "p", "completions": ["a", "b"], "judged": "[1]"}, {}, "`judged` must be"),
        (
            {"prompt": "p", "completions": ["a", "b"], "priority": "high"},
            {},
            "`priority` is 'high'",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "seed": 1.5}, {}, "`seed` is 1.5"),
        ({"prompt": "p", "completions": ["a", "b"], "seed": 10**12}, {}, "`seed` is 10"),
        (
            {"prompt": "p", "completions": ["a", "b"], "model": {"a": 1}},
            {},
            "`model` must be a text",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "weights": "a" * 65}, {}, "`weights` must be"),
        (
            {"prompt": "p", "completions": ["a", "b"], "log_probs": ["x", 1]},
            {},
            "`log_probs` holds",
        ),
        ({"prompt": "p", "completions": ["a", "b"]}, {"strategy": "gap"}, "needs `scores`"),
        (
            {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0]},
            {"strategy": "uncertainty"},
            "two reward models",
        ),
        ({"prompt": "p", "completions": ["a", "b"]}, {"gold": True}, "needs `tiers`"),
        ({"prompt": "p", "completions": ["a", "\ud800"]}, {}, "half a character"),
        (BUCKETS, {}, "Ranker without buckets"),
        ({"fields": {"prompt": "p", "a": "x"}, "responses": []}, {}, "at least two text fields"),
    ],
)
def test_faulty_rows_are_told_with_their_line(tmp_path, row, changes, told):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*" + told):
        put_file(tmp_path, "rows.jsonl", json.dumps(row), **changes)
    assert not (tmp_path / "labels.db").exists()


def test_a_fault_in_the_last_row_leaves_nothing(tmp_path):
    put(tmp_path, rows(1))
    with pytest.raises(UserError, match="is a ranking project"):
        put(tmp_path, rows(5), mode="pairwise")
    assert select(tmp_path, "SELECT count(*) FROM tasks") == [(1,)]


def test_guidelines_are_kept_and_changed(tmp_path):
    (tmp_path / "rules.md").write_text("Be kind.")
    put(tmp_path, rows(1), guidelines=tmp_path / "rules.md")
    put(tmp_path, rows(2))
    assert select(tmp_path, "SELECT guidelines FROM projects") == [("Be kind.",)]
    with pytest.raises(UserError, match="--guidelines"):
        put(tmp_path, rows(1), guidelines=tmp_path / "absent.md")
