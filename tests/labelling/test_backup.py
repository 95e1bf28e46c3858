"""A copy of a store that is being written to: one moment's state, whole, and a store itself."""

import sqlite3
import threading

import pytest
from sqlalchemy import text

from prefloop.config.labelling import LabelBackupConfig
from prefloop.errors import UserError
from prefloop.labelling.assign import next_assignment, submit
from prefloop.labelling.backup import run
from prefloop.labelling.export import audit
from prefloop.labelling.store import Store
from prefloop.labelling.store.schema import metadata
from tests.labelling.small import add, in_order, open_store, put, rows

COUNTED = "SELECT count(*) FROM annotations"
AGREES = """SELECT count(*) FROM tasks WHERE done != (
    SELECT count(*) FROM assignments a JOIN annotations n ON n.assignment_id = a.id
    WHERE a.task_id = tasks.id AND a.state = 'done' AND n.version = a.version)"""


def label(store, who, count):
    for number in range(count):
        task = next_assignment(store, who)
        submit(store, who, task.id, in_order(task, f"request-{who}-{number}"))


def everything(store):
    """All rows of all tables but the audit log, which grows with each backup."""
    with store.read() as t:
        return {
            name: t.connection.execute(table.select().order_by(*table.primary_key)).all()
            for name, table in metadata.tables.items()
            if name != "events"
        }


def test_a_copy_while_labels_come_in_is_one_moments_state(tmp_path):
    put(tmp_path, rows(120), need=1)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    label(store, ann, 5)
    stop = threading.Event()

    def work():
        for number in range(5, 115):
            if stop.is_set():
                return
            task = next_assignment(store, ann)
            submit(store, ann, task.id, in_order(task, f"request-{ann}-{number}"))

    worker = threading.Thread(target=work)
    worker.start()
    found = []
    for number in range(3):
        output = tmp_path / f"copy-{number}.db"
        told = run(LabelBackupConfig(store=str(tmp_path / "labels.db"), output=str(output)))
        with sqlite3.connect(f"file:{output}?mode=ro", uri=True) as copy:
            assert copy.execute(AGREES).fetchone() == (0,)
            assert copy.execute(COUNTED).fetchone() == (told["annotations"],)
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        copy.close()
        found.append(told["annotations"])
        assert {told["tasks"], told["labellers"], told["projects"]} == {120, 1}
    stop.set()
    worker.join()
    assert found == sorted(found)
    assert found[0] >= 5
    assert sorted(p.name for p in tmp_path.glob("copy-*.db*"))[0] == "copy-0.db"
    assert not list(tmp_path.glob("*.part"))


def test_a_copy_holds_all_and_can_be_worked_on(tmp_path):
    put(tmp_path, rows(6), guidelines=None)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    label(store, ann, 3)
    run(LabelBackupConfig(store=str(tmp_path / "labels.db"), output=str(tmp_path / "copy.db")))
    copy = Store(str(tmp_path / "copy.db"), must_exist=True)
    assert everything(copy) == everything(store)
    assert audit(copy, "main")[:3] == audit(store, "main")[:3]
    task = next_assignment(copy, ann)
    assert submit(copy, ann, task.id, in_order(task, "request-anew")) == 1
    copy.close()


def test_there_and_back_between_sqlite_and_postgresql(tmp_path, postgres):
    put(tmp_path, rows(6), repeat_share=0.0)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    label(store, ann, 3)
    with store.write() as t:
        t.put_repeat(t.all(text("SELECT * FROM tasks"))[0] | {"response_ids": [1, 2, 3]}, ann)
    address, empty = postgres("filled"), postgres("second")
    told = run(LabelBackupConfig(store=str(tmp_path / "labels.db"), output=address))
    assert (told["tasks"], told["annotations"]) == (7, 3)
    there = Store(address)
    assert everything(there) == everything(store)
    task = next_assignment(there, ann)  # new rows get numbers after the copied ones
    assert submit(there, ann, task.id, in_order(task, "request-anew")) == 1
    back = tmp_path / "back.db"
    assert run(LabelBackupConfig(store=address, output=str(back)))["annotations"] == 4
    run(LabelBackupConfig(store=address, output=empty))
    for copied in (Store(str(back)), Store(empty)):
        assert everything(copied) == everything(there)
        copied.close()
    there.close()
    with pytest.raises(UserError, match="holds a store already"):
        run(LabelBackupConfig(store=str(tmp_path / "labels.db"), output=address))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("labels.db", "there already"),
        ("copy.jsonl", "give NAME.db"),
        ("copy.db#main", "give NAME.db"),
        ("absent/copy.db", "no folder"),
    ],
)
def test_an_output_that_will_not_do_is_told(tmp_path, output, told):
    put(tmp_path, rows(1))
    with pytest.raises(UserError, match=told):
        run(LabelBackupConfig(store=str(tmp_path / "labels.db"), output=str(tmp_path / output)))
    assert [p.name for p in tmp_path.glob("copy*")] == []
