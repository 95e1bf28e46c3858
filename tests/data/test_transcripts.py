"""HH transcripts under --chat: turns by hand, the same tokens as the chat's, what is refused."""

from pathlib import Path
from typing import Any

import pytest

from prefloop.config.labelling import LabelImportConfig
from prefloop.data.formats import Kind, load
from prefloop.data.tokenize import tokenize
from prefloop.data.transcripts import asked
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.labelling import imports
from prefloop.records import Demonstration, Message, RowCounts, Sampled
from prefloop.sources import load as load_source
from tests.tiny import tiny_tokenizer

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless.jsonl.gz"
ASKED = "\n\nHuman: Name a bird.\n\nAssistant: Heron.\n\nHuman: Another?\n\nAssistant:"


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


CHAT = (user("Name a bird."), bot("Heron."), user("Another?"))


def read(tmp_path: Path, kind: Kind, *rows: dict[str, Any], chat: bool = True) -> list[Any]:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return load(str(tmp_path / "rows.jsonl"), kind, RowCounts(), chat)


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (ASKED, CHAT),
        (ASKED.strip(), CHAT),
        (ASKED + " \n", CHAT),
        (ASKED.replace("\n", "\r\n"), CHAT),
        (ASKED.strip().replace("\n\n", "\n"), CHAT),  # no empty lines between the turns
        (ASKED.removesuffix("\n\nAssistant:"), CHAT),  # it waits for the answer all the same
        ("\n\nHuman: Hi", (user("Hi"),)),
        (
            "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:",
            (Message("system", "Be brief."), user("Hi")),
        ),
        # Turns are apart by empty lines, so a line within one stays there.
        ("\n\nHuman: Go on:\nAssistant: x\n\nAssistant:", (user("Go on:\nAssistant: x"),)),
        ("\n\nHuman: a\n\nHuman: b\n\nc\n\nAssistant:", (user("a"), user("b\n\nc"))),
        # No transcripts: the user's message as it stands.
        ("Human: an ape or not?", (user("Human: an ape or not?"),)),
        ("Who is Human: x?\n\nHuman: y", (user("Who is Human: x?\n\nHuman: y"),)),
        (" Hi ", (user(" Hi "),)),
    ],
)
def test_the_turns_of_a_prompt(prompt: str, turns: tuple[Message, ...]) -> None:
    assert asked(prompt, "") == turns


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": ASKED + " Well,", "completion": " no"}, "ends in an answer's midst"),
        ({"prompt": "Be brief." + ASKED, "completion": " no"}, 'a text before its first "Human:"'),
        ({"prompt": ASKED, "completion": " Wren.\n\nHuman: Thanks"}, "goes on with other turns"),
        ({"prompt": "\n\nAssistant:", "completion": " no"}, "ends in an answer's midst"),
    ],
)
def test_what_leaves_open_who_says_what_is_refused(
    tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{told}"):
        read(tmp_path, "demonstration", row)
    assert read(tmp_path, "demonstration", row, chat=False)[0].prompt == row["prompt"]
    counts = RowCounts(bad_rows="drop")
    good = {"prompt": ASKED, "completion": " Wren."}
    write_jsonl(tmp_path / "rows.jsonl", [row, good])
    (kept,) = load(str(tmp_path / "rows.jsonl"), "demonstration", counts, chat=True)
    assert kept == Demonstration(CHAT, (bot("Wren."),))
    assert counts.bad[0][0] == f"{tmp_path}/rows.jsonl:1"


def as_json(turns: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


WREN, FORK = as_json((bot("Wren."),)), as_json((bot("Fork."),))
FORMS: list[tuple[Kind, dict[str, Any], dict[str, Any]]] = [
    ("demonstration", {"completion": " Wren."}, {"completion": WREN}),
    ("preference", {"chosen": " Wren.", "rejected": " Fork."}, {"chosen": WREN, "rejected": FORK}),
    (
        "preference",
        {"completions": [" Fork.", "Wren.\n"], "tiers": [[1], [0]]},
        {"completions": [FORK, WREN], "tiers": [[1], [0]]},
    ),
    ("unpaired", {"completion": " Wren.", "label": True}, {"completion": WREN, "label": True}),
    ("unpaired", {"chosen": " Wren.", "rejected": " Fork."}, {"chosen": WREN, "rejected": FORK}),
    ("prompt", {}, {}),
]


@pytest.mark.parametrize(("kind", "transcript", "chat"), FORMS)
def test_every_form_trains_on_the_tokens_of_its_chat(
    tmp_path: Path, kind: Kind, transcript: dict[str, Any], chat: dict[str, Any]
) -> None:
    found = read(tmp_path, kind, {"prompt": ASKED, **transcript})
    right = read(tmp_path, kind, {"prompt": as_json(CHAT), **chat}, chat=False)
    assert found == right
    sides = [tokenize(r, tiny_tokenizer(), 300, "error", RowCounts()) for r in (found, right)]
    assert sides[0] == sides[1]


def test_pairs_without_a_prompt_column(tmp_path: Path) -> None:
    row = {"chosen": ASKED + " Wren.", "rejected": ASKED + " Fork."}
    (found,) = read(tmp_path, "preference", row)
    assert (found.prompt, found.completions) == (CHAT, ((bot("Wren."),), (bot("Fork."),)))


def test_a_transcript_beside_message_lists_is_turns_too(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "chosen": WREN, "rejected": FORK}
    whole = {"prompt": ASKED} | {k: as_json(CHAT) + row[k] for k in ("chosen", "rejected")}
    for given in (row, whole):
        (found,) = read(tmp_path, "preference", given, chat=False)
        assert (found.prompt, found.completions[0]) == (CHAT, (bot("Wren."),))


def test_tokens_of_the_transcript_are_not_those_of_the_turns(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "completion": " Wren.", "completion_finish_reason": "length"}
    row |= {"completion_ids": [5, 6], "tokenizer": "0123456789abcdef"}
    (found,) = read(tmp_path, "demonstration", row)
    assert found.sampled == (Sampled(False),)
    (found,) = read(tmp_path, "demonstration", row | {"prompt": "Name a bird."})
    assert found.sampled[0].ids == (5, 6)


def test_a_stores_transcripts_are_turns(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completions": [" a", " b"]} for p in (ASKED, ASKED + " Well,")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    store = str(tmp_path / "labels.db")
    imports.run(LabelImportConfig(store=store, data=str(tmp_path / "rows.jsonl")))
    with pytest.raises(UserError, match=r"prompt 2: `prompt` is a transcript that ends in"):
        load_source(store, "prompt", RowCounts(), chat=True)
    counts = RowCounts(bad_rows="drop")
    (found,) = load_source(store, "prompt", counts, chat=True)
    assert found.prompt == CHAT
    assert sum(counts.dropped.values()) == 1


@pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data/hh-harmless.jsonl.gz")
def test_all_of_hh_harmless_is_read_as_turns() -> None:
    records = load(str(HH), "preference", RowCounts(), chat=True)
    assert len(records) == 1862
    for record in records:
        assert record.prompt[0].role == record.prompt[-1].role == "user"
        assert not any(
            "\n\nHuman:" in m.content or "\n\nAssistant:" in m.content for m in record.prompt
        )
