"""One door for rows: several sources by weight, labelling stores, what is refused."""

import json
from collections import Counter
from itertools import chain

import pytest

from prefloop import SFTConfig, UserError, sources
from prefloop.cli import main
from prefloop.config.resolve import as_dict, build, resolve
from prefloop.data.stream import mixed_order, step_rows
from prefloop.records import Prompt, RowCounts
from tests.labelling.small import put, rows
from tests.training.small import assert_same_run, only_checkpoint, train, write_rows, write_world


def test_an_epoch_draws_by_weight_and_each_row_before_one_comes_again() -> None:
    parts = [0] * 6 + [1] * 2  # 8 rows an epoch: 2 of source 0 and 6 of source 1
    epochs = [mixed_order(parts, (1, 3), 5, epoch) for epoch in range(3)]
    for order in epochs:
        assert Counter(parts[row] for row in order) == {0: 2, 1: 6}
        assert Counter(row for row in order if row >= 6) == {6: 3, 7: 3}
    seen = [row for order in epochs for row in order if row < 6]
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert mixed_order(parts, (1, 3), 6, 0) != epochs[0]


def test_shares_are_rounded_by_largest_remainders() -> None:
    counts = Counter([0, 1, 2][row] for row in mixed_order([0, 1, 2], (5, 3, 2), 0, 0))
    assert counts == {0: 1, 1: 1, 2: 1}  # 1.5, 0.9, 0.6: one row each but for what is left of 1.5
    assert len(mixed_order([0, 0, 0, 1, 1, 1, 1], (1, 2), 0, 0)) == 7


def test_steps_of_a_mixture_can_begin_anywhere() -> None:
    def order(epoch):
        return mixed_order([0] * 5 + [1] * 4, (0.3, 0.7), 1, epoch)

    whole = list(step_rows(9, 4, 3.0, 0, 1, order_of=order))
    assert list(step_rows(9, 4, 3.0, 0, 1, 3, order_of=order)) == whole[3:]
    assert list(chain(*whole))[:9] == order(0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("a.jsonl=0.5", "b.jsonl"), "give each source a weight"),
        (("a.jsonl=0", "b.jsonl=1"), "must be above 0"),
        (("a.jsonl=1", "a.jsonl=2"), "given twice"),
        ((), "empty"),
    ],
)
def test_weights_that_say_nothing_are_refused(given, told) -> None:
    with pytest.raises(UserError, match=told):
        sources.addresses_and_weights(given)


def test_names_that_hold_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=3").touch()
    assert sources.addresses_and_weights("run=3") == (("run=3",), ())
    url = "postgresql://h/x?connect_timeout=5"
    assert sources.addresses_and_weights(url) == ((url,), ())
    assert sources.addresses_and_weights(("l.db#p=2", "x.csv=.5"))[1] == (2.0, 0.5)


def test_one_source_is_told_alike_in_python_yaml_and_flags(tmp_path) -> None:
    given = {"model": "m", "output": "o"}
    one = SFTConfig(model="m", output="o", data=("a.jsonl",))
    assert one.data == SFTConfig(model="m", output="o", data="a.jsonl").data == "a.jsonl"
    assert build(SFTConfig, given | {"data": "a.jsonl"}, "x").data == "a.jsonl"
    several = build(SFTConfig, given | {"data": ["a.jsonl=1", "b.jsonl=2"]}, "x")
    assert several.data == ("a.jsonl=1", "b.jsonl=2")
    assert build(SFTConfig, as_dict(several), "x") == several
    words = ["--model", "m", "--output", "o", "--data", "a.jsonl=1", "b.jsonl=2"]
    assert resolve(SFTConfig, None, words).data == several.data


@pytest.fixture
def two(tmp_path):
    write_world(tmp_path)
    for name in "ab":
        answers = [{"prompt": f"{name}{n}", "completion": f" {n}"} for n in range(6)]
        write_rows(tmp_path / f"{name}.jsonl", answers)
    return tmp_path


def test_a_mixture_trains_and_goes_on_as_if_never_stopped(two) -> None:
    data = (f"{two / 'a.jsonl'}=0.75", f"{two / 'b.jsonl'}=0.25")
    same = {"data": data, "epochs": 2.0, "batch_size": 4, "save_every": 2, "keep_checkpoints": 9}
    train("sft", two, two / "whole", **same)
    only_checkpoint(two / "whole", two / "again", 2)
    train("sft", two, two / "again", **same)
    assert_same_run(two / "whole", two / "again")
    record = json.loads((two / "whole/run.json").read_text())
    assert record["rows"]["data"]["used"] == 12


def test_a_source_of_which_no_row_is_left_is_told(two) -> None:
    write_rows(two / "b.jsonl", [{"prompt": "b" * 500, "completion": " 1"}])
    data = (f"{two / 'a.jsonl'}=1", f"{two / 'b.jsonl'}=1")
    with pytest.raises(UserError, match=r"b\.jsonl: no row of it is left"):
        train("sft", two, two / "run", data=data, truncation="drop", max_length=32)


# --- labelling stores ----------------------------------------------------------------------------


def test_a_store_gives_its_prompts(tmp_path) -> None:
    put(tmp_path, rows(3))
    counts = RowCounts()
    found = sources.load(f"{tmp_path / 'labels.db'}#main", "prompt", counts)
    assert [record.prompt for record in found] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len({record.where for record in found}) == 3
    assert counts.read == 3
    assert all(isinstance(record, Prompt) for record in found)
    chats = sources.load(str(tmp_path / "labels.db"), "prompt", RowCounts(), chat=True)
    assert chats[0].prompt[0].role == "user"


def test_generate_and_ppo_answer_a_stores_prompts(tmp_path) -> None:
    write_world(tmp_path)
    put(tmp_path, rows(3))
    address = f"{tmp_path / 'labels.db'}#main"
    words = ["generate", "--model", tmp_path / "model", "--data", address, "--device", "cpu"]
    words += ["--max-new-tokens", 2, "--output", tmp_path / "out.jsonl"]
    assert main([str(word) for word in words]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    train("ppo", tmp_path, tmp_path / "ppo", data=address, max_steps=1)


def test_one_store_is_imported_into_another(tmp_path) -> None:
    ranked = [row | {"tiers": [[1], [0, 2]], "labeller": "ann"} for row in rows(2)]
    put(tmp_path, ranked)
    address = f"{tmp_path / 'labels.db'}#main"
    words = ["label", "import", "--store", str(tmp_path / "other.db"), "--data", address]
    assert main(words) == 0
    read = [
        sources.load(str(tmp_path / n), "preference", RowCounts())
        for n in ("labels.db", "other.db")
    ]
    assert [(r.prompt, r.tiers) for r in read[0]] == [(r.prompt, r.tiers) for r in read[1]]
    assert read[0][0].tiers == ((1,), (0, 2))


def test_a_store_has_no_demonstrations(tmp_path) -> None:
    put(tmp_path, rows(1))
    with pytest.raises(UserError, match="give a file of demonstrations"):
        sources.load(str(tmp_path / "labels.db"), "demonstration", RowCounts())


@pytest.mark.parametrize(
    "words",
    [
        "label serve --store absent.db",
        "label add-user --store absent.db --name ann",
        "label report --store absent.db",
        "label backup --store absent.db --output copy.db",
        "label export --store absent.db --output x.jsonl",
        "label score --store absent.db --reward-model builtins:len --strategy gap",
        "label import --store new.db --data absent.db",
        "dpo --model model --output run --data absent.db",
        "dpo --model model --output run --data pairs.jsonl --eval-data absent.db#x",
        "generate --model model --data absent.db --max-new-tokens 2",
        "sample --model model --data absent.db#p --output x.jsonl --max-new-tokens 2",
        "compare --sft model --models a=model --judge builtins:len --data absent.db --output cmp",
        "check --model model --data absent.db",
    ],
)
def test_only_import_makes_a_store(tmp_path, monkeypatch, capsys, words) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert "absent.db: no such file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.db*"))
    assert not (tmp_path / "run").exists()
