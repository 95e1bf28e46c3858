"""The loop: sampled answers go to the store, labels come back as training rows."""

import json

import pytest

from prefloop import commands
from prefloop.config import SampleConfig
from prefloop.errors import UserError
from prefloop.labelling.assign import next_assignment, submit
from prefloop.labelling.export import read_records
from prefloop.provenance import weights_sha256
from prefloop.records import RowCounts
from tests.labelling.small import add, in_order, open_store, put, rows
from tests.training.small import train, write_world


def label_all(folder):
    store = open_store(folder)
    (ann,) = add(store, "ann")
    while task := next_assignment(store, ann):
        submit(store, ann, task.id, in_order(task, f"request-{task.id}"))
    store.close()


def sample(folder, model="model", **changes):
    settings = {"max_length": 64, "max_new_tokens": 6, "device": "cpu", "samples_per_prompt": 3}
    settings |= {
        "to_labels": f"{folder / 'labels.db'}#loop",
        "data": str(folder / "prompts.jsonl"),
        "output": folder / "samples.jsonl",
        **changes,
    }
    config = SampleConfig(model=str(folder / model), **settings)
    return commands.sample(config)


def test_sample_label_train(tmp_path, capsys):
    """Answers go in with the policy that wrote them; a reward model, DPO and KTO train on what
    comes out."""
    write_world(tmp_path)
    sample(tmp_path)
    prompts = len((tmp_path / "prompts.jsonl").read_text().splitlines())
    assert f'"tasks": {prompts}' in capsys.readouterr().out
    store = open_store(tmp_path)
    with store.read() as t:
        (snapshot,) = t.connection.exec_driver_sql("SELECT model, weights FROM snapshots").all()
    assert snapshot == (str(tmp_path / "model"), weights_sha256(tmp_path / "model"))
    assert len(snapshot[1]) == 64
    store.close()
    label_all(tmp_path)
    address = f"{tmp_path / 'labels.db'}#loop"
    for command, changes in (("reward", {}), ("dpo", {}), ("dpo", {"loss": "kto"})):
        output = tmp_path / f"{command}-{len(changes)}"
        train(command, tmp_path, output, max_steps=1, data=address, **changes)
        record = json.loads((output / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["rows"]["data"]["read"] == prompts


def test_imported_prompts_wait_for_answers(tmp_path, capsys):
    """Prompts alone make no task; `sample` answers those that have none, once."""
    write_world(tmp_path)
    asked = [{"prompt": "Say a.", "topic": "a"}, {"prompt": "Say b."}]
    told = put(tmp_path, [*asked, *rows(1)], project="loop")
    assert (told["rows"], told["prompts"], told["tasks"]) == (3, 2, 1)
    address = f"{tmp_path / 'labels.db'}#loop"
    path = sample(tmp_path, data=address)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in asked]
    assert written[0]["topic"] == "a"
    assert '"tasks": 2' in capsys.readouterr().out
    label_all(tmp_path)
    assert len(read_records(address, "preference", RowCounts())) == 3
    with pytest.raises(UserError, match="no prompt waits for answers"):
        sample(tmp_path, data=address, output=tmp_path / "again.jsonl")
    with pytest.raises(UserError, match=r"absent\.db"):
        sample(tmp_path, data="absent.db", output=tmp_path / "again.jsonl")


def test_sampling_again_keeps_the_projects_settings(tmp_path):
    write_world(tmp_path)
    put(tmp_path, rows(1), project="loop", need=2, gold_share=0.25)
    sample(tmp_path)
    store = open_store(tmp_path)
    with store.read() as t:
        assert t.project("loop")["settings"]["gold_share"] == 0.25
        assert set(t.connection.exec_driver_sql("SELECT need FROM tasks").scalars()) == {2}


def test_bad_stores_are_told_before_sampling(tmp_path):
    """There is no model either, and nobody looks for it."""
    with pytest.raises(UserError, match="no folder"):
        sample(tmp_path, to_labels=str(tmp_path / "absent" / "labels.db"))
    with pytest.raises(UserError, match="people rank 2 to 9 answers"):
        sample(tmp_path, samples_per_prompt=1)


def test_rows_of_a_store(tmp_path):
    put(tmp_path, rows(2))
    label_all(tmp_path)
    counts = RowCounts()
    rankings = read_records(str(tmp_path / "labels.db"), "preference", counts)
    assert [r.tiers for r in rankings] == [((0,), (1,), (2,))] * 2
    assert (counts.read, counts.used) == (2, 0)  # used by whoever makes examples of them
    with pytest.raises(UserError, match="give a file of demonstrations"):
        read_records(str(tmp_path / "labels.db"), "demonstration", RowCounts())
    with pytest.raises(UserError, match="no such file"):
        read_records(str(tmp_path / "other.db"), "preference", RowCounts())
