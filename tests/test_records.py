"""Records: weak orders, JSON forms, reading files line by line, atomic writing."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from prefloop.errors import UserError
from prefloop.files import check_writable, read_rows, write_atomic, write_jsonl
from prefloop.records import (
    Comparison,
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    RowCounts,
    Unpaired,
    ranking_to_json,
    to_json,
)


def test_ranking_with_a_tie_gives_the_strict_pairs() -> None:
    ranking = Ranking("p", ("a", "b", "c", "d"), ((1,), (3, 0), (2,)))
    assert ranking.pairs() == [(1, 3), (1, 0), (1, 2), (3, 2), (0, 2)]
    assert ranking.tied_pairs() == 1
    assert ranking_to_json(ranking)["tiers"] == [[1], [3, 0], [2]]


@pytest.mark.parametrize("tiers", [((0,),), ((0,), (1,), (1,)), ((0, 2),), ((0,), (), (1,)), ()])
def test_tiers_must_be_a_partition(tiers: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(UserError, match=r"^rows:3: `tiers` .* must name each of the 2 completions"):
        Ranking("p", ("a", "b"), tiers, "rows:3")


def test_comparison_is_a_ranking_of_two_and_refuses_equal_answers() -> None:
    ranking = Comparison("p", "good", "bad", "f:1").as_ranking()
    assert ranking == Ranking("p", ("good", "bad"), ((0,), (1,)))
    assert ranking.where == "f:1"
    with pytest.raises(UserError, match=r"^f:1: `chosen` and `rejected` are equal"):
        Comparison("p", "same", "same", "f:1")


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (Prompt("p", extra={"id": 7}), {"prompt": "p", "id": 7}),
        (Demonstration("p", "a"), {"prompt": "p", "completion": "a"}),
        (
            Conversation((Message("user", "u"), Message("assistant", "a"))),
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        ),
        (Comparison("p", "a", "b"), {"prompt": "p", "chosen": "a", "rejected": "b"}),
        (Unpaired("p", "a", False), {"prompt": "p", "completion": "a", "label": False}),
        (
            Ranking((Message("user", "u"),), ((Message("assistant", "a"),),), ((0,),)),
            {
                "prompt": [{"role": "user", "content": "u"}],
                "completions": [[{"role": "assistant", "content": "a"}]],
                "tiers": [[0]],
            },
        ),
    ],
)
def test_records_as_json(record: Record, row: dict[str, object]) -> None:
    assert to_json(record) == row


def test_row_counts() -> None:
    counts = RowCounts(read=10, used=7, truncated=2, tied_pairs=3)
    for reason in ("too long", "too long", "tied"):
        counts.drop(reason)
    assert counts.summary() == (
        "read 10 rows, used 7 (2 truncated, 3 tied pairs), dropped 2 (too long), 1 (tied)"
    )
    assert counts.as_dict() == {
        "read": 10,
        "used": 7,
        "truncated": 2,
        "tied_pairs": 3,
        "dropped": {"too long": 2, "tied": 1},
        "noted": {},
    }


# --- reading -------------------------------------------------------------------------------------


def test_jsonl_plain_packed_and_with_byte_order_mark(tmp_path: Path) -> None:
    text = '{"prompt": "가"}\n\n{"prompt": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name in ("a.jsonl", "b.jsonl.gz"):
        path = str(tmp_path / name)
        rows = [(f"{path}:1", {"prompt": "가"}), (f"{path}:3", {"prompt": "b"})]
        assert list(read_rows(path)) == rows


def test_csv_names_the_first_line_of_a_row_that_spans_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"one\ntwo",x\ny,"a ""b"", c"\n')
    assert list(read_rows(path)) == [
        (f"{path}:2", {"prompt": "one\ntwo", "completion": "x"}),
        (f"{path}:4", {"prompt": "y", "completion": 'a "b", c'}),
    ]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "p", "tiers": [[1], [0]]}, {"prompt": "q", "tiers": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert list(read_rows(path)) == [(f"{path}:1", rows[0]), (f"{path}:2", rows[1])]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r":2: malformed JSON \(.*column .*\); each line must"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r":2: a JSON list; each line must be one JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xb0\xa1"}\n', r":2: byte 0xb0 at column 8 is not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"[" * 99999, r":1: malformed JSON"),
        ("a.jsonl", b'{"a": ' + b"1" * 9999 + b"}", r":1: malformed JSON"),
        ("a.csv", b"a,b\n1,2\n3\n", r":3: 1 cells under 2 columns \(a, b\)"),
        ("a.csv", b"a,b\n1,\xff\n", r":2: byte 0xff at column 3 is not UTF-8"),
        ("a.csv", b'a,b\n1,"2\n', r":2: malformed CSV"),
        ("a.csv", b"a,a\n1,2\n", r":1: a column stands twice"),
        ("a.parquet", b"PAR1 no", r"a.parquet: malformed Parquet"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12],
            r"a.jsonl.gz: cannot be read",
        ),
        ("a.txt", b"[]", r"a.txt: unknown kind of file; use .jsonl, .jsonl.gz, .json, .csv"),
        ("a.json", b'{"a": 1}', r"a.json: a JSON object; give one list of objects"),
        ("a.json", b'[{"a": 1}, 2]', r"a.json:2: a JSON number"),
        ("a.json", b"[{", r"a.json: malformed JSON"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(
    tmp_path: Path, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl: no such file"):
        list(read_rows("nowhere.jsonl"))


# --- writing -------------------------------------------------------------------------------------


def test_write_jsonl_reads_back_and_is_the_same_bytes_twice(tmp_path: Path) -> None:
    rows = [{"prompt": "가\n"}, {"prompt": "b"}]
    for name in ("a.jsonl", "sub/b.jsonl.gz"):
        write_jsonl(tmp_path / name, rows)
        first = (tmp_path / name).read_bytes()
        assert [row for _, row in read_rows(tmp_path / name)] == rows
        write_jsonl(tmp_path / name, rows)
        assert (tmp_path / name).read_bytes() == first
    assert "가" in (tmp_path / "a.jsonl").read_text()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_atomic(path, "old")

    def rows() -> object:
        yield {"fine": 1}
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_jsonl(path, rows())  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_write_atomic_gives_ordinary_permissions(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", json.dumps({}))
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_devices_and_folders_are_not_written_over(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(UserError, match="not a file"):
            write_atomic(path, "x")
    assert not Path("/dev/null").is_file()


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"


@pytest.mark.parametrize("name", ["file/x.jsonl", "a" * 300, "nul\0"])
def test_paths_that_cannot_be_are_told_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another"):
        check_writable(tmp_path / name)


def test_a_long_csv_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\n" + "a" * 200_000 + "\n")
    ((_, row),) = read_rows(tmp_path / "rows.csv")
    assert len(row["prompt"]) == 200_000
