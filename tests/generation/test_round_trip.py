"""What the policy wrote stays what it wrote: sample, rank, and train on the sampled tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefloop.config import GenerateConfig, SampleConfig
from prefloop.config.labelling import Form, LabelExportConfig, LabelImportConfig
from prefloop.data import formats
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import encode_prompt, tokenize
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.generation.commands import generate, sample
from prefloop.labelling import export, imports
from prefloop.records import Demonstration, Message, Ranking, RowCounts, Sampled, Text
from tests.tiny import CHATML, LLAMA2, tiny_model, tiny_tokenizer

USER = (Message("user", "ab"),)
THINKS = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
)


def llama2(way: Literal["normalizer", "metaspace"], template: str = LLAMA2) -> Any:
    """As Llama 2's: a space before every text, bytes for what has no token, and a chat template."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["▁", *"abcdefghijklmnopqrstuvwxyz[]/INST", "▁a", "▁ab"]
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    merges = [("▁", "a"), ("▁a", "b")]
    core = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if way == "normalizer":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "thinking head": lambda: tiny_tokenizer(template=THINKS, eos="<|im_end|>"),
    "llama 2": lambda: llama2("normalizer"),
    "metaspace": lambda: llama2("metaspace"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def policy(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(folder, tokenizer) of a model whose answers end about as often as they are cut."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = TOKENIZERS[request.param]()
    model = tiny_model(vocab_size=len(tokenizer))
    stops = [tokenizer.eos_token_id, *range(150, 220)]
    model.generation_config.eos_token_id = stops  # type: ignore[union-attr]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


def sampled_file(folder: str, tmp_path: Path) -> Path:
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "b c", "de")]
    write_jsonl(tmp_path / "prompts.jsonl", [*chats, {"prompt": "ab a"}, {"prompt": "c"}])
    config = SampleConfig(
        dtype="float32",
        model=folder,
        data=str(tmp_path / "prompts.jsonl"),
        output=tmp_path / "samples.jsonl",
        samples_per_prompt=3,
        max_new_tokens=4,
        max_length=200,
        seed=5,
    )
    return sample(config)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(source: Any, kind: Any, tokenizer: Any) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """The answers' tokens that training takes, by their prompt's."""
    if "#" in str(source):
        records: Any = export.read_records(str(source), kind, RowCounts())
    else:
        records = formats.load(str(source), kind, RowCounts())
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for example in tokenize(records, tokenizer, 1000, "error", RowCounts()):
        found.setdefault(example.prompt, set()).update(example.answers)
    return found


def test_sampled_ids_reach_training_through_files_and_the_store(
    policy: tuple[str, Any], tmp_path: Path
) -> None:
    folder, tokenizer = policy
    rows = read(sampled_file(folder, tmp_path))
    reasons = [reason for row in rows for reason in row["finish_reasons"]]
    assert {"stop", "length"} == set(reasons)
    drawn: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        asked = row["prompt"]
        prompt = asked if isinstance(asked, str) else tuple(Message(**m) for m in asked)
        key = tuple(encode_prompt(tokenizer, prompt))
        drawn[key] = {tuple(ids) for ids in row["completion_ids"]}
    # 1. Ranked in the file.
    ranked = [row | {"tiers": [[1], [2], [0]]} for row in rows]
    write_jsonl(tmp_path / "ranked.jsonl", ranked)
    assert trained(tmp_path / "ranked.jsonl", "preference", tokenizer) == drawn
    # 2. Through the store, read from it and exported in each form.
    store = str(tmp_path / "labels.db")
    imports.run(LabelImportConfig(store=store, data=str(tmp_path / "ranked.jsonl"), overlap=0.0))
    assert trained(f"{store}#main", "preference", tokenizer) == drawn
    forms: tuple[tuple[Form, Any], ...] = (("rankings", "preference"), ("dpo", "preference"))
    for form, kind in forms:
        out = tmp_path / f"{form}.jsonl"
        export.run(LabelExportConfig(store=store, output=out, form=form))
        assert trained(out, kind, tokenizer) == drawn, form
    ends = {key: set(answers) for key, answers in drawn.items()}
    out = tmp_path / "kto.jsonl"
    export.run(LabelExportConfig(store=store, output=out, form="kto"))
    for found in (
        trained(out, "unpaired", tokenizer),
        trained(f"{store}#main", "unpaired", tokenizer),
    ):
        assert found.keys() == ends.keys()
        assert all(answers < ends[key] and len(answers) == 2 for key, answers in found.items())


def test_generated_answers_are_demonstrations_as_they_were_drawn(
    policy: tuple[str, Any], tmp_path: Path
) -> None:
    folder, tokenizer = policy
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    config = GenerateConfig(
        dtype="float32",
        model=folder,
        data=str(tmp_path / "p.jsonl"),
        output=tmp_path / "g.jsonl",
        max_new_tokens=4,
        max_length=200,
    )
    generate(config)
    (row,) = read(tmp_path / "g.jsonl")
    if row["completion"].strip():
        found = trained(tmp_path / "g.jsonl", "demonstration", tokenizer)
        assert list(found.values()) == [{tuple(row["completion_ids"])}]
    assert row["completion_finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("text", ["ab", " ab", "  ab a ", "", " ", "a\nb", "\nab", "é", " é b"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["ab:", USER])
def test_text_of_tokens_is_read_as_those_tokens(name: str, prompt: Text, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    answer = text if isinstance(prompt, str) else (Message("assistant", text),)
    ids = Encoder(tokenizer).answer(prompt, answer)
    assert Encoder(tokenizer).said(prompt, ids) == text
    # Cut, it has neither the stop token nor what the template prints before it.
    cut = Encoder(tokenizer).answer(prompt, answer, ended=False)
    assert ids[: len(cut)] == cut
    assert tokenizer.eos_token_id not in cut
    assert Encoder(tokenizer).said(prompt, cut) == text


def test_bytes_of_no_character_do_not_swallow_their_context() -> None:
    tokenizer = llama2("normalizer")
    text = Encoder(tokenizer).said("a", [3 + 0xE4, tokenizer.convert_tokens_to_ids("b")])
    assert text == "\ufffdb"


def ranking(tokenizer: Any, sampled: tuple[Sampled, ...], texts: Any = ("ab", "c")) -> Any:
    record = Ranking("a:", texts, ((0,), (1,)), "rows.jsonl:3", sampled=sampled)
    return tokenize([record], tokenizer, 100, "error", RowCounts())[0].answers


def test_ids_of_another_tokenizer_give_way_to_the_text() -> None:
    ours, theirs = tiny_tokenizer(chat=False), llama2("metaspace")
    name = Encoder(theirs).fingerprint
    assert name != Encoder(ours).fingerprint
    how = (Sampled(True, (9, 2), name), Sampled(False, (8,), name))
    ab, c = (tuple(Encoder(ours).answer("a:", text)) for text in ("ab", "c"))
    assert ranking(ours, how) == (ab, c[:-1])
    assert ranking(ours, (Sampled(None, (9,), name), how[1])) == (ab, c[:-1])  # nobody said: ended


@pytest.mark.parametrize("ids", [(300,), (2**70,), (7, 4)])
def test_ids_that_are_not_those_of_the_text_are_told(ids: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    how = (Sampled(True, ids, Encoder(tokenizer).fingerprint), Sampled())
    with pytest.raises(UserError, match=r"rows.jsonl:3: the answer 'ab' is not the text of its"):
        ranking(tokenizer, how)


def test_an_answer_of_no_tokens_is_dropped_and_counted() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    records = [
        Ranking("a:", ("", "c"), ((0,), (1,)), "rows.jsonl:1", sampled=(Sampled(False), Sampled())),
        Ranking("a:", ("b", "c"), ((0,), (1,)), "rows.jsonl:2"),
    ]
    counts = RowCounts()
    assert len(tokenize(records, tokenizer, 100, "error", counts)) == 1
    assert counts.dropped == {"answer of no tokens: an empty one that no stop token ends": 1}


def test_a_demonstration_without_a_finish_reason_ends(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    rows = [
        {"prompt": "a", "completion": "bc"},
        {"prompt": "a", "completion": "bc", "completion_finish_reason": "length"},
        {"prompt": "a", "completion": "bc", "completion_finish_reason": None},
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    records: list[Any] = formats.load(str(tmp_path / "d.jsonl"), "demonstration", RowCounts())
    assert all(isinstance(record, Demonstration) for record in records)
    whole, cut, unsaid = tokenize(records, tokenizer, 100, "error", RowCounts())
    assert whole.answers[0] == (*cut.answers[0], tokenizer.eos_token_id)
    assert unsaid.answers == whole.answers


def test_answers_without_ids_stand_beside_those_with_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    ids = Encoder(tokenizer).answer("p", " b")
    row = {
        "prompt": "p",
        "completions": [" a", " b"],
        "tiers": [[1], [0]],
        "completion_ids": [None, ids],
        "finish_reasons": ["length", "stop"],
        "tokenizer": Encoder(tokenizer).fingerprint,
    }
    write_jsonl(tmp_path / "r.jsonl", [row])
    store = str(tmp_path / "labels.db")
    imports.run(LabelImportConfig(store=store, data=str(tmp_path / "r.jsonl")))
    out = tmp_path / "out.jsonl"
    export.run(LabelExportConfig(store=store, output=out))
    (told,) = read(out)
    assert {name: told[name] for name in row} == row
