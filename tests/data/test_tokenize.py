"""Ids and masks: boundaries, BOS, EOS, chat turns, truncation, audit. Expected tokens by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prefloop.config import Truncation
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import (
    Example,
    audit_template,
    decode_answer,
    encode_prompt,
    stop_token_ids,
    tokenize,
)
from prefloop.errors import UserError
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
)
from tests.tiny import CHATML, LLAMA2, tiny_tokenizer

U, V = Message("user", "hi"), Message("user", "no")
A, B = Message("assistant", "a b"), Message("assistant", "c")

# Templates of well-known families, cut down to what makes them special.
STRIPS_THINKING = (  # Qwen3: only the last answer keeps its (empty) thinking
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS_AT_END = (  # Phi-3: EOS after the last turn's stop token when nothing is to be generated
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
OPENS_THINKING = (  # DeepSeek R1: the generation prompt begins what the answer does not hold
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate\nreally') }}"
TWO_BOS = "{{ bos_token }}{{ bos_token }}" + CHATML
# Transformers' own way to mask answers, as an independent implementation.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(template: str, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    return tiny_tokenizer(template=template, eos=eos)


def tokens(tokenizer: PreTrainedTokenizerFast, ids: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Puts a space before every text, as Llama 2's tokenizer does."""
    vocabulary = ["<unk>", "<eos>", *"▁\n:abcyesnoq"]
    core = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(dict.fromkeys(vocabulary))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, no-any-return, unused-ignore]
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>"
    )


def one(record: Record, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Example:
    options = {"max_length": 1000, "truncation": "error", "counts": RowCounts(), **options}
    (example,) = tokenize([record], tokenizer, **options)
    return example


# --- plain text ----------------------------------------------------------------------------------


def test_prompt_and_answer_do_not_merge() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    assert tokens(tokenizer, tokenizer("at").input_ids) == ["a", "t"]
    assert tokens(tokenizer, tokenizer("ab").input_ids) == ["ab"]  # together they would merge
    example = one(Demonstration("a", "b"), tokenizer)
    assert tokens(tokenizer, example.prompt) == ["a"]
    assert tokens(tokenizer, example.answers[0]) == ["b", "<eos>"]
    assert example.answer_masks == ((True, True),)
    example = one(Demonstration("x:", " the"), tokenizer)
    assert tokens(tokenizer, example.answers[0]) == ["Ġt", "h", "e", "<eos>"]


def test_bos_once_and_only_before_the_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=False, bos=True)
    assert tokens(tokenizer, encode_prompt(tokenizer, "x")) == ["<bos>", "x"]
    assert tokens(tokenizer, encode_prompt(tokenizer, "<bos>x")) == ["<bos>", "x"]
    assert tokens(tokenizer, encode_prompt(tokenizer, "")) == ["<bos>"]
    assert tokens(tokenizer, Encoder(tokenizer).answer("x", "y")) == ["y", "<eos>"]


def test_eos_once() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    for answer in ("y", "y<eos>"):
        assert tokens(tokenizer, Encoder(tokenizer).answer("x", answer)) == ["y", "<eos>"]
    assert tokens(tokenizer, Encoder(tokenizer).answer("x", "")) == ["<eos>"]
    assert decode_answer(tokenizer, Encoder(tokenizer).answer("x", " é ,y")) == " é ,y"


def test_no_space_is_put_between_prompt_and_answer() -> None:
    tokenizer = sentencepiece_like()
    assert tokens(tokenizer, encode_prompt(tokenizer, "q:")) == ["▁", "q", ":"]
    assert tokens(tokenizer, Encoder(tokenizer).answer("q:", "yes")) == ["y", "e", "s", "<eos>"]
    assert tokens(tokenizer, Encoder(tokenizer).answer("q:", " no")) == ["▁", "n", "o", "<eos>"]


def test_no_eos_is_an_error() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^f:1: the tokenizer has no EOS token"):
        one(Demonstration("x", "y", "f:1"), tokenizer)


# --- chats ---------------------------------------------------------------------------------------


def test_chat_prompt_holds_the_generation_prompt_and_the_answer_ends_with_the_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, (U,))) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = Encoder(tokenizer).answer((U,), (A,))
    assert tokens(tokenizer, answer) == ["a", "Ġ", "b", "<|im_end|>"]
    assert decode_answer(tokenizer, answer) == "a b"
    twice = (Message("assistant", "a b<|im_end|>"),)
    assert Encoder(tokenizer).answer((U,), twice) == answer


def test_stop_token_that_is_not_eos() -> None:
    tokenizer = chat(CHATML, eos="<eos>")
    assert tokens(tokenizer, Encoder(tokenizer).answer((U,), (B,))) == ["c", "<|im_end|>"]
    assert stop_token_ids(tokenizer) == {2, 4}
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[4, 7])) == {2, 4, 7}
    assert stop_token_ids(tiny_tokenizer(chat=False), GenerationConfig(eos_token_id=7)) == {2, 7}


def test_template_that_prints_bos_and_eos() -> None:
    tokenizer = tiny_tokenizer(template=LLAMA2, bos=True)
    ids = encode_prompt(tokenizer, (U,))
    assert tokenizer.decode(ids) == "<bos>[INST] hi [/INST]"
    assert tokens(tokenizer, ids[:2]) == ["<bos>", "["]  # not the tokenizer's BOS as well
    assert tokens(tokenizer, Encoder(tokenizer).answer((U,), (B,))) == ["Ġ", "c", "Ġ", "<eos>"]


def test_every_assistant_turn_of_a_conversation_is_trained_with_its_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    example = one(Conversation((U, A, V, B, U)), tokenizer)
    assert tokenizer.decode(list(example.prompt)) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    (answer,), (mask,) = example.answers, example.answer_masks
    context = ["Ċ", "<|im_start|>", *"user", "Ċ", *"no", "<|im_end|>", "Ċ", "<|im_start|>"]
    first, last = ["a", "Ġ", "b", "<|im_end|>"], ["c", "<|im_end|>"]
    context += [*"assistant", "Ċ"]
    assert tokens(tokenizer, answer) == [*first, *context, *last]
    assert list(mask) == [True] * 4 + [False] * len(context) + [True] * 2


def test_masks_equal_those_of_transformers_generation_markers() -> None:
    tokenizer = chat(MARKED)
    messages = [Message("system", "the"), U, A, B, V, A]
    told = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = one(Conversation(tuple(messages)), tokenizer)
    ids = [*example.prompt, *example.answers[0]]
    assert ids == told["input_ids"][: len(ids)]
    assert tokens(tokenizer, told["input_ids"][len(ids) :]) == ["Ċ"]
    mask = [*([False] * len(example.prompt)), *example.answer_masks[0]]
    assert mask == [bool(m) for m in told["assistant_masks"][: len(ids)]]


def test_template_that_prints_eos_after_the_last_turn() -> None:
    tokenizer = chat(EOS_AT_END, eos="<eos>")
    assert tokens(tokenizer, Encoder(tokenizer).answer((U,), (B,))) == ["c", "<|im_end|>"]
    plain = one(Conversation((U, A, V, B)), chat(CHATML))
    assert one(Conversation((U, A, V, B)), tokenizer) == plain


def test_template_that_rewrites_earlier_turns_takes_one_turn_only() -> None:
    tokenizer = chat(STRIPS_THINKING)
    answer = one(Conversation((U, B)), tokenizer).answers[0]
    assert tokenizer.decode(list(answer)) == "<think>\n\n</think>\n\nc<|im_end|>"
    with pytest.raises(UserError, match=r"^f:9: the chat template prints message 1 otherwise once"):
        one(Conversation((U, A, V, B), "f:9"), tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (tiny_tokenizer(chat=False), "these are chat messages, and the tokenizer has no chat temp"),
        (chat(OPENS_THINKING), "prints an answer otherwise than its generation prompt begins it"),
        (chat(REFUSES), r"refuses these messages \(roles must alternate\)"),
        (chat("{{ 'nothing' }}"), "does not print an assistant message's content"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer: PreTrainedTokenizerFast, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        one(Demonstration((U,), (A,), "f:3"), tokenizer)
    assert str(caught.value).startswith("f:3: ")
    assert "\n" not in str(caught.value)


# --- records -------------------------------------------------------------------------------------


def test_every_kind_of_record() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    x, y, z, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("x", "y", "z", "<eos>"))
    records = [
        Prompt("x", "f:1"),
        Comparison("x", "y", "z", "f:2"),
        Ranking("x", ("y", "", "z"), ((2,), (0, 1)), "f:3"),
        Unpaired("x", "y", False, "f:4"),
    ]
    counts = RowCounts()
    prompt, pair, ranking, unpaired = tokenize(records, tokenizer, 10, "error", counts)
    assert prompt == Example((x,), index=0, where="f:1")
    assert pair.answers == ((y, eos), (z, eos))
    assert pair.tiers == ((0,), (1,))
    assert ranking.answers == ((y, eos), (eos,), (z, eos))
    assert ranking.answer_masks == ((True, True), (True,), (True, True))
    assert ranking.tiers == ((2,), (0, 1))
    assert (unpaired.labels, unpaired.tiers) == ((False,), ())
    assert [example.index for example in (prompt, pair, ranking, unpaired)] == [0, 1, 2, 3]
    assert counts.used == 4


def test_train_on_all_takes_the_first_token_as_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=False, bos=True)
    example = one(Demonstration("xy", "z"), tokenizer, train_on="all")
    assert tokens(tokenizer, example.prompt) == ["<bos>"]
    assert tokens(tokenizer, example.answers[0]) == ["x", "y", "z", "<eos>"]
    assert example.answer_masks == ((True,) * 4,)
    example = one(Conversation((U, B)), tiny_tokenizer(), train_on="all")
    assert all(example.answer_masks[0])


def test_rankings_without_a_strict_pair_are_dropped_and_counted() -> None:
    tokenizer, counts = tiny_tokenizer(chat=False), RowCounts()
    records = [
        Ranking("x", ("y", "z"), ((0, 1),)),
        Ranking("x", ("y",), ((0,),)),
        Ranking("x", ("y", "z"), ((0,), (1,))),
    ]
    examples = tokenize(records, tokenizer, 10, "error", counts)
    assert [example.index for example in examples] == [0]
    assert counts.dropped == {"ranking without a strict pair": 2}


def test_answers_equal_as_tokens_are_an_error() -> None:
    with pytest.raises(UserError, match=r"^f:1: answers 0 and 1 are equal as tokens"):
        one(Comparison("x", "y", "y<eos>", "f:1"), tiny_tokenizer(chat=False))
    of_three = Ranking("x", ("y", "z", "y<eos>"), ((0,), (1,), (2,)), "f:1")
    with pytest.raises(UserError, match=r"^f:1: answers 0 and 2 are equal as tokens"):
        one(of_three, tiny_tokenizer(chat=False))
    tied = Ranking("x", ("y", "z", "y<eos>"), ((0, 2), (1,)), "f:1")
    assert one(tied, tiny_tokenizer(chat=False)).tiers == ((0, 2), (1,))


def test_empty_prompt_without_bos_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^f:1: `prompt` is empty and the tokenizer has no BOS"):
        one(Demonstration("", "y", "f:1"), tiny_tokenizer(chat=False))


# --- truncation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truncation", "limit", "prompt", "answers"),
    [
        ("left", 6, ["<bos>", "q"], [["x", "y", "z", "<eos>"], ["v", "<eos>"]]),
        ("left", 5, ["q"], [["x", "y", "z", "<eos>"], ["v", "<eos>"]]),
        ("right", 6, ["<bos>", "o", "p", "q"], [["x", "y"], ["v", "<eos>"]]),
        ("right", 5, ["<bos>", "o", "p", "q"], [["x"], ["v"]]),
    ],
)
def test_cutting(
    truncation: Truncation, limit: int, prompt: list[str], answers: list[list[str]]
) -> None:
    tokenizer, counts = tiny_tokenizer(chat=False, bos=True), RowCounts()
    record = Comparison("opq", "xyz", "v")
    example = one(record, tokenizer, max_length=limit, truncation=truncation, counts=counts)
    assert tokens(tokenizer, example.prompt) == prompt
    assert [tokens(tokenizer, answer) for answer in example.answers] == answers
    assert [len(mask) for mask in example.answer_masks] == [len(answer) for answer in answers]
    assert (counts.truncated, counts.used) == (1, 1)
    whole = one(record, tokenizer, max_length=8, truncation=truncation, counts=counts)
    assert (len(whole.prompt), counts.truncated) == (4, 1)


@pytest.mark.parametrize(
    ("record", "truncation", "limit"),
    [
        (Comparison("opq", "xyz", "v"), "left", 4),  # no room for the prompt
        (Comparison("opq", "xyz", "v"), "right", 4),  # no room for answers
        (Comparison("opq", "xyz", "xyv"), "right", 6),  # what is left of them is equal
        (Prompt("opq"), "right", 3),  # a prompt alone has no answer to cut
        (Conversation((U, B)), "right", 21),  # the prompt has 21 tokens
    ],
)
def test_what_cannot_be_cut_is_dropped_and_counted(
    record: Record, truncation: Truncation, limit: int
) -> None:
    counts = RowCounts()
    tokenizer = tiny_tokenizer(bos=not isinstance(record, Conversation))
    records = [record, Prompt("q")]
    assert len(tokenize(records, tokenizer, limit, truncation, counts)) == 1
    assert counts.dropped == {f"nothing left to learn once cut to {limit} tokens": 1}
    assert (counts.truncated, counts.used) == (0, 1)


def test_error_and_drop() -> None:
    tokenizer, counts = tiny_tokenizer(chat=False), RowCounts()
    records = [Demonstration("x", "y", "f:1"), Demonstration("xyz", "y", "f:2"), Prompt("x" * 9)]
    with pytest.raises(UserError, match=r"^f:2: a prompt of 3 and an answer of 2 tokens are over "):
        tokenize(records, tokenizer, 4, "error", counts)
    with pytest.raises(UserError, match=r"^f:3: a prompt of 9 tokens is over the limit of 4"):
        tokenize([Prompt("x" * 9, "f:3")], tokenizer, 4, "error", counts)
    counts = RowCounts(read=3)
    assert len(tokenize(records, tokenizer, 4, "drop", counts)) == 1
    assert counts.summary() == "read 3 rows, used 1, dropped 2 (longer than 4 tokens)"
    with pytest.raises(UserError, match=r"^f: no rows left to use: .* dropped 1 \(longer than 4"):
        tokenize(records[1:2], tokenizer, 4, "drop", RowCounts(read=1))


# --- audit ---------------------------------------------------------------------------------------


def test_audit_of_a_sound_template() -> None:
    audit = audit_template(tiny_tokenizer())
    assert (audit.chat, audit.stop_token, audit.stop_token_trained) == (True, "<|im_end|>", True)
    assert audit.lines() == ["chat template: answers end with <|im_end|>, trained", "BOS: none"]


@pytest.mark.parametrize(
    ("tokenizer", "line"),
    [
        (tiny_tokenizer(chat=False, bos=True), "BOS: once, from the tokenizer"),
        (tiny_tokenizer(chat=False), "plain text: answers end with <eos>, trained"),
        (tiny_tokenizer(template=LLAMA2, bos=True), "BOS: once, from the template"),
        (chat(TWO_BOS), "warning: prompts begin with two BOS"),
        (chat(NO_STOP), "warning: chat template: the stop token is NOT trained"),
        (chat(STRIPS_THINKING), "warning: the template rewrites earlier turns"),
        (chat(STRIPS_THINKING), r"answers begin with '<think>\n\n</think>\n\n'"),
        (chat(CHATML, eos="<eos>"), "it is not the tokenizer's EOS"),
    ],
)
def test_audit_names_each_trap(tokenizer: PreTrainedTokenizerFast, line: str) -> None:
    assert any(told.startswith(line) for told in audit_template(tokenizer).lines())


def test_audit_tells_that_padding_is_the_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    audit = audit_template(tokenizer)
    assert audit.pad_is_stop
    assert audit.lines()[-1].startswith("padding is the stop token")


def test_audit_without_eos() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    tokenizer.pad_token = None
    audit = audit_template(tokenizer)
    assert (audit.stop_token, audit.stop_token_trained, audit.pad_is_stop) == (None, False, False)


# --- what a row says beside its messages ---------------------------------------------------------

TOOL = Message("tools", '[{"type": "function", "function": {"name": "tide"}}]')
PRINTS_TOOLS = (
    "{% for t in tools or [] %}<|im_start|>{{ t.function.name }}<|im_end|>\n{% endfor %}" + CHATML
)


def test_tools_stand_before_every_kind_of_chat() -> None:
    tokenizer = chat(PRINTS_TOOLS)
    for record in (
        Conversation((TOOL, U, A, V, B)),
        Demonstration((TOOL, U), (A,)),
        Ranking((TOOL, U), ((A,), (B,)), ((0,), (1,))),
        Unpaired((TOOL, U), (A,), True),
        Prompt((TOOL, U)),
    ):
        example = one(record, tokenizer)
        text = tokenizer.decode(example.prompt)
        assert text.startswith("<|im_start|>tide<|im_end|>\n<|im_start|>user\nhi")
        assert all("tide" not in tokenizer.decode(answer) for answer in example.answers)
        with pytest.raises(UserError, match=r"the chat template ignores `tools`"):
            one(record, chat(CHATML))


def test_a_template_that_trips_over_tools_is_told_in_one_line() -> None:
    trips = "{% if tools %}{{ 'x' + tools[0].function }}{% endif %}" + PRINTS_TOOLS
    with pytest.raises(UserError, match="the chat template refuses these messages"):
        one(Prompt((TOOL, U)), chat(trips))


def test_train_on_all_and_flags_that_keep_turns_out() -> None:
    kept_out = Message("assistant", "a b", trained=False)
    record = Conversation((U, kept_out, V, B), where="f:1")
    with pytest.raises(UserError, match=r"^f:1: flags keep turns out .*--train-on answer"):
        one(record, chat(CHATML), train_on="all")
