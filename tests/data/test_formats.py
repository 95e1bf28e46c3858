"""Every input form, and what is told of rows that are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from prefloop.data.formats import Kind, load
from prefloop.data.split import split_by_prompt
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.records import (
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    RowCounts,
    Unpaired,
    to_json,
)

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless.jsonl.gz"
USER = {"role": "user", "content": "u"}
USER2 = {"role": "user", "content": "v"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, kind: Kind, *rows: dict[str, Any]) -> tuple[list[Any], RowCounts]:
    counts = RowCounts()
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return load(str(tmp_path / "rows.jsonl"), kind, counts), counts


U, V, A, B = (
    Message("user", "u"),
    Message("user", "v"),
    *(Message("assistant", text) for text in "ab"),
)


@pytest.mark.parametrize(
    ("kind", "row", "records"),
    [
        ("demonstration", {"prompt": "p", "completion": "a"}, [Demonstration("p", "a")]),
        (
            "demonstration",
            {"prompt": [USER], "completion": [said("a")]},
            [Demonstration((U,), (A,))],
        ),
        ("demonstration", {"messages": [USER, said("a")]}, [Conversation((U, A))]),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            [Ranking("p", ("a", "b"), ((0,), (1,)))],
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [said("a")], "rejected": [said("b")]},
            [Ranking((U,), ((A,), (B,)), ((0,), (1,)))],
        ),
        # implicit prompts: messages, and a transcript whose answers begin alike
        (
            "preference",
            {"chosen": [USER, said("a"), USER2, said("a")]}
            | {"rejected": [USER, said("a"), USER2, said("b")]},
            [Ranking((U, A, V), ((A,), (B,)), ((0,), (1,)))],
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: no, a"}
            | {"rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: no, b"},
            [
                Ranking(
                    "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:",
                    (" no, a", " no, b"),
                    ((0,), (1,)),
                )
            ],
        ),
        # the prompt stands in its column and again before the answers (as in UltraFeedback)
        (
            "preference",
            {"prompt": "u", "chosen": [USER, said("a")], "rejected": [USER, said("b")]},
            [Ranking((U,), ((A,), (B,)), ((0,), (1,)))],
        ),
        (
            "preference",
            {"prompt": "p", "completions": ["a", "b", ""], "tiers": [[1], [2, 0]]},
            [Ranking("p", ("a", "b", ""), ((1,), (2, 0)))],
        ),
        (
            "preference",
            {"prompt": [USER], "completions": ["a", "b"], "tiers": [[1], [0]]},
            [Ranking((U,), ((A,), (B,)), ((1,), (0,)))],
        ),
        ("unpaired", {"prompt": "p", "completion": "a", "label": 0}, [Unpaired("p", "a", False)]),
        (
            "unpaired",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            [Unpaired("p", "a", True), Unpaired("p", "b", False)],
        ),
        ("prompt", {"prompt": "p", "id": 1}, [Prompt("p")]),
        ("prompt", {"prompt": [USER]}, [Prompt((U,))]),
        ("prompt", {"chosen": [USER, said("a")], "rejected": [USER, said("b")]}, [Prompt((U,))]),
    ],
)
def test_forms(tmp_path: Path, kind: Kind, row: dict[str, Any], records: list[Any]) -> None:
    found, counts = read(tmp_path, kind, row)
    assert found == records
    assert counts.read == len(records)
    assert all(record.where == f"{tmp_path}/rows.jsonl:1" for record in found)


def test_other_columns_go_along_with_a_prompt(tmp_path: Path) -> None:
    (prompt,), _ = read(tmp_path, "prompt", {"id": 7, "prompt": "p", "topic": None})
    assert prompt.extra == {"id": 7, "topic": None}


def test_csv_holds_lists_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completions,tiers\np,"[""a"", ""b""]","[[1], [0]]"\n')
    assert load(str(path), "preference", RowCounts()) == [Ranking("p", ("a", "b"), ((1,), (0,)))]
    path.write_text("prompt,completion,label\np,a,True\nq,b,0\n")
    assert load(str(path), "unpaired", RowCounts()) == [
        Unpaired("p", "a", True),
        Unpaired("q", "b", False),
    ]


def test_parquet_holds_messages_and_nulls(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"messages": [{**USER, "tool_calls": None}, {**said("a"), "tool_calls": None}]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    records = load(str(tmp_path / "a.parquet"), "demonstration", RowCounts())
    assert records == [Conversation((U, A))]


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        (
            "preference",
            {"question": "p", "good": "a"},
            "columns `question`, `good`; preference rows",
        ),
        (
            "demonstration",
            {"prompt": "p", "completion": None},
            r"`completion` \(null\); demonstration rows",
        ),
        ("demonstration", {"text": "p"}, "need `prompt`.`completion`, or `messages`"),
        ("preference", {"prompt": "p", "completions": ["a", "b"]}, "`prompt`.`completions`.`tiers"),
        (
            "demonstration",
            {"prompt": "p", "completion": 3},
            "`completion` is of type number; it must be",
        ),
        ("demonstration", {"prompt": {}, "completion": "a"}, "`prompt` is of type object"),
        ("demonstration", {"prompt": "p", "completion": " \n"}, "`completion` is an empty answer"),
        ("preference", {"prompt": "p", "chosen": "", "rejected": "b"}, "`chosen` is an empty"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "are equal"),
        ("preference", {"chosen": [USER, said("a")], "rejected": [USER, said("a")]}, "are equal"),
        ("unpaired", {"prompt": "p", "chosen": "a", "rejected": "a"}, "are equal"),
        ("preference", {"chosen": "x a", "rejected": "x b"}, "add a `prompt` column"),
        ("preference", {"chosen": [said("a")], "rejected": [said("b")]}, "add a `prompt` column"),
        ("preference", {"chosen": "a", "rejected": [USER, said("b")]}, "must both be"),
        (
            "preference",
            {"chosen": [USER, said("a"), USER], "rejected": [USER, said("b")]},
            "`chosen` must be one assistant message after the prompt, and it is assistant, user",
        ),
        (
            "preference",
            {"prompt": "p", "completions": ["a", "b"], "tiers": [[0]]},
            r"`tiers` \[\[0\]\] must name each of the 2 completions once",
        ),
        (
            "preference",
            {"prompt": "p", "completions": ["a", "b"], "tiers": [0, 1]},
            "`tiers` must be lists of completion numbers",
        ),
        (
            "preference",
            {"prompt": "p", "completions": "a", "tiers": [[0]]},
            "`completions` must be",
        ),
        (
            "preference",
            {"prompt": "p", "completions": ["a", 2], "tiers": [[0], [1]]},
            r"`completions\[1\]` is of type number",
        ),
        ("unpaired", {"prompt": "p", "completion": "a", "label": "good"}, "`label` is 'good'; it"),
        ("demonstration", {"messages": []}, "`messages` must be a list of messages, and not empty"),
        ("demonstration", {"messages": [USER]}, "hold an assistant message"),
        ("demonstration", {"messages": [said("a")]}, "must begin with another role"),
        ("demonstration", {"messages": [USER, said("")]}, r"`messages\[1\]` is an empty answer"),
        (
            "demonstration",
            {"messages": [{"from": "human", "text": "u"}]},
            r"`messages\[0\]` is from, text; a message needs `role` and `content`",
        ),
        (
            "demonstration",
            {"messages": [USER, {**said("a"), "tool_calls": [1]}]},
            r"`messages\[1\].tool_calls` cannot be learned from",
        ),
        (
            "demonstration",
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]},
            r"`messages\[1\].content\[0\]` is a part of type image_url; prefloop reads text alone",
        ),
        ("prompt", {"prompt": [USER, said("a")]}, "ends with an assistant message"),
    ],
)
def test_wrong_rows_are_told_in_one_line(
    tmp_path: Path, kind: Kind, row: dict[str, Any], told: str
) -> None:
    good: dict[Kind, dict[str, Any]] = {
        "demonstration": {"prompt": "p", "completion": "a"},
        "preference": {"prompt": "p", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "p", "completion": "a", "label": True},
        "prompt": {"prompt": "p"},
    }
    with pytest.raises(UserError, match=told) as caught:
        read(tmp_path, kind, good[kind], row)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert "\n" not in str(caught.value)


def test_half_a_character_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p\\ud83d"}\n')
    with pytest.raises(UserError, match=r":1: `prompt` holds half a character \(\\ud83d at 1\)"):
        load(str(tmp_path / "a.jsonl"), "prompt", RowCounts())


def test_empty_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl: nothing to use: it holds no rows; give rows"):
        read(tmp_path, "preference")


def test_transcripts_without_a_common_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    start = "\n\nHuman: 1\n\nAssistant:"
    rows = [
        {"chosen": f"{start} a", "rejected": f"{start} b"},
        {"chosen": f"{start} ", "rejected": f"{start} b"},
        {"chosen": f"{start} a\n\nHuman: 2\n\nAssistant: c", "rejected": f"{start} b"},
    ]
    records, counts = read(tmp_path, "preference", *rows)
    assert len(records) == 1
    assert counts.summary() == (
        "read 3 rows, used 0, dropped 1 (transcript with an empty answer), "
        "1 (transcripts that differ before the last answer)"
    )


@pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data/hh-harmless.jsonl.gz")
def test_hh_harmless() -> None:
    counts = RowCounts()
    records = load(str(HH), "preference", counts)
    # 4 of its 1,866 rows have an empty chosen answer (counted with grep)
    assert (counts.read, len(records)) == (1866, 1862)
    assert counts.dropped == {"transcript with an empty answer": 4}
    for record in records:
        assert isinstance(record.prompt, str)
        assert record.prompt.startswith("\n\nHuman:")
        assert record.prompt.endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in "".join(map(str, record.completions))


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["trl-lib/tldr", "{tmp}"])
def test_folders_and_hub_ids_need_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"needs the datasets package; pip install datasets"):
        load(source.format(tmp=tmp_path), "prompt", RowCounts())


# --- splitting -----------------------------------------------------------------------------------


def test_split_keeps_prompts_together_and_ignores_the_order_of_rows() -> None:
    records = [Demonstration(f"p{n % 20}", f"a{n}") for n in range(60)]
    train, held_out = split_by_prompt(records, 0.2, seed=1)
    assert len({record.prompt for record in held_out}) == 4
    assert len(held_out) == 12
    assert not {record.prompt for record in train} & {record.prompt for record in held_out}
    _, again = split_by_prompt(records[::-1], 0.2, seed=1)
    assert again == held_out[::-1]
    assert split_by_prompt(records, 0.2, seed=2)[1] != held_out
    assert split_by_prompt(records, 0, seed=1) == (records, [])


def test_conversations_split_by_what_comes_before_the_first_answer() -> None:
    records = [Conversation((U, A)), Conversation((U, B)), Conversation((V, A))]
    train, held_out = split_by_prompt(records, 0.5, seed=0)
    assert sorted((len(train), len(held_out))) == [1, 2]


def test_split_of_a_single_prompt_is_an_error() -> None:
    with pytest.raises(UserError, match="--eval-data"):
        split_by_prompt([Demonstration("p", "a"), Demonstration("p", "b")], 0.5, seed=0)
    with pytest.raises(UserError, match="at least 0 and below 1"):
        split_by_prompt([Demonstration("p", "a")], 1.0, seed=0)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    rankings = [
        Ranking("p", ("a", "b", "c"), ((1,), (2, 0))),
        Ranking((U,), ((A,), (B,)), ((1,), (0,))),
    ]
    rows = [json.loads(json.dumps(to_json(ranking))) for ranking in rankings]
    assert read(tmp_path, "preference", *rows)[0] == rankings


def test_a_margin_goes_along_with_a_pair(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    ((first, second), _) = read(tmp_path, "preference", {**pair, "margin": 1.5}, pair)
    assert (first.margin, second.margin) == (1.5, 0.0)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: `margin` is 'x'; it must be a finite"):
        read(tmp_path, "preference", {**pair, "margin": "x"})


def test_chats_in_csv_are_json(tmp_path: Path) -> None:
    chat = json.dumps([{"role": "user", "content": "Hi"}]).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'prompt,completion\n"{chat}",Hello\n')
    (record,) = load(str(tmp_path / "rows.csv"), "demonstration", RowCounts())
    assert record.prompt == (Message("user", "Hi"),)


@pytest.mark.parametrize("margin", ["NaN", "1e999", "true"])
def test_a_margin_is_a_finite_number(margin: str, tmp_path: Path) -> None:
    row = f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {margin}}}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: `margin`"):
        load(str(tmp_path / "rows.jsonl"), "preference", RowCounts())


@pytest.mark.parametrize("role", ["", "asistant"])
def test_a_role_that_is_nearly_one_is_told(role: str, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match=r"`messages\[1\]\.role` is .*(did you mean assistant|remove it)"
    ):
        load(str(tmp_path / "rows.jsonl"), "demonstration", RowCounts())
