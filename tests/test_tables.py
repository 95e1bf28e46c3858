"""What the `datasets` package reads: saved folders, folders of files, configurations, splits."""

import datetime
import os

import pytest

from prefloop import sources
from prefloop.cli import main
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.records import Conversation, Message, Prompt, Ranking, RowCounts
from prefloop.tables import rows_of

datasets = pytest.importorskip("datasets", reason="needs the extra `datasets`")
CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
TURNS = Conversation((Message("user", "u"), Message("assistant", "a")))


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A working directory with saved sets and a folder of two configurations."""
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"prompt": "p"}, {"prompt": "q"}])
    rows.save_to_disk("one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk("two")
    datasets.DatasetDict(a=rows, b=rows.select([0])).save_to_disk("three")
    rows.to_parquet("owner/name/train-00000-of-00002.parquet")
    rows.to_parquet("owner/name/train-00001-of-00002.parquet")
    for name in ("x/train", "x/held", "y/train"):
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / f"conf/{name}.jsonl", [{"prompt": name}])
    (tmp_path / "conf/README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: train, path: x/train.jsonl}\n"
        "  - {split: held, path: x/held.jsonl}\n"
        "- config_name: y\n  data_files: y/train.jsonl\n---\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ("one", "p q"),
        ("./one", "p q"),
        ("two", "p q"),
        ("two#:test", "q"),
        ("three#:b", "p"),
        ("owner/name", "p q p q"),
        ("conf#x", "x/train"),
        ("conf#x:held", "x/held"),
        ("conf#y", "y/train"),
    ],
)
def test_what_is_read(there, source, prompts):
    found = sources.load(source, "prompt", RowCounts())
    assert [record.prompt for record in found] == prompts.split()
    assert [record.where for record in found] == [f"{source}:{n + 1}" for n in range(len(found))]
    assert sources.load(str(there / source), "prompt", RowCounts()) == found


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("one#:train", "one table without splits; leave :train out"),
        ("one#x", "a saved set has no configurations; leave x out"),
        ("two#x:test", "a saved set has no configurations"),
        ("two#:nope", "splits train, test; choose one of them"),
        ("three", "splits a, b, and none is `train`; name one, as three#:NAME"),
        ("conf", r"datasets cannot load it \(.*configs: \['x', 'y'\]\); check"),
        ("conf#z", "datasets cannot load it .*'z' not found"),
        ("empty", "datasets cannot load it .*data files"),
        ("./absent", "no such file or folder"),
        ("a/b/absent", "no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_one_line(there, source, told):
    (there / "empty").mkdir()
    with pytest.raises(UserError, match=told) as caught:
        sources.load(source, "prompt", RowCounts())
    assert "\n" not in str(caught.value)


def test_a_folder_that_changed_is_read_anew(there):
    assert sources.load("conf#y", "prompt", RowCounts())[0].prompt == "y/train"
    write_jsonl(there / "conf/y/train.jsonl", [{"prompt": "another"}])
    assert sources.load("conf#y", "prompt", RowCounts())[0].prompt == "another"


def test_splits_are_sources_with_weights(there, capsys):
    parts = sources.load_parts(("two#:train=0.7", "two#:test=0.3"), "prompt", RowCounts())
    assert parts == [[Prompt("p"), Prompt("q")], [Prompt("q")]]


@pytest.mark.parametrize("format", [None, "numpy", "torch", "pandas"])
def test_values_are_pythons_whatever_the_sets_format(there, format):
    row = {"prompt": "p", "completions": ["a", "b"], "tiers": [[1], [0]], "n": [1.5, 2.0]}
    row["when"] = datetime.datetime(2026, 1, 2)
    datasets.Dataset.from_list([row]).with_format(format).save_to_disk("rows")
    (where, found), *more = rows_of("rows")
    assert (where, more) == ("rows:1", [])
    assert found == row | {"when": "2026-01-02T00:00:00"}
    (record,) = sources.load("rows", "preference", RowCounts())
    assert record == Ranking("p", ("a", "b"), ((1,), (0,)))


def test_messages_as_a_list_and_as_a_table_of_columns(there):
    datasets.Dataset.from_list([{"messages": CHAT}]).save_to_disk("listed")
    text = datasets.Value("string")
    features = datasets.Features({"messages": datasets.Sequence({"role": text, "content": text})})
    table = {key: [message[key] for message in CHAT] for key in ("role", "content")}
    datasets.Dataset.from_list([{"messages": table}], features=features).save_to_disk("columns")
    for name in ("listed", "columns"):
        assert sources.load(name, "demonstration", RowCounts()) == [TURNS]


def test_label_import_and_check_take_a_folder(there, capsys):
    row = {"prompt": "p", "completions": ["a", "b"]}
    datasets.Dataset.from_list([row]).save_to_disk("answers")
    assert main("label import --store l.db --data answers".split()) == 0
    assert sources.load("l.db", "prompt", RowCounts()) == [Prompt("p")]


@pytest.mark.skipif("HF_HUB_OFFLINE" not in os.environ, reason="needs HF_HUB_OFFLINE")
def test_a_hub_id_that_cannot_be_asked_for_is_told(there):
    with pytest.raises(UserError, match=r"^nobody/nothing: no such folder here, and the hub"):
        sources.load("nobody/nothing#x:train", "prompt", RowCounts())
