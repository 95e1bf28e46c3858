"""Records -> token ids: prompt and answer tokenised apart, answer masks, truncation, audit.

Prompt and answer never merge at their boundary, so the prompt's ids are a prefix whatever follows.
BOS stands once, as the tokenizer or the chat template puts it. A plain-text answer ends with EOS,
once; a chat answer ends with the token that ends the template's turn. What the template prints
after that token (ChatML: a line break) belongs to the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING, Literal

from prefloop.config import Truncation
from prefloop.data.encoder import ANSWERED, ASKED, PROBE, Encoder
from prefloop.errors import TooLong, UserError, located
from prefloop.records import (
    Comparison,
    Conversation,
    Prompt,
    Ranking,
    Record,
    RowCounts,
    Sampled,
    Text,
    Unpaired,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

NO_PROMPT = "`prompt` is empty and the tokenizer has no BOS; give at least one token"
Ids = tuple[int, ...]
Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """One record as ids: a prompt and the answers that continue it.

    `answer_masks` says which answer tokens are in the loss; `tiers` (rankings) and `labels`
    (unpaired rows) speak of `answers` by index; `index` is the place in the tokenised list.
    `source` stands for the record that it was made of, whatever the template printed around it.
    """

    prompt: Ids
    answers: tuple[Ids, ...] = ()
    answer_masks: tuple[Mask, ...] = ()
    tiers: tuple[tuple[int, ...], ...] = ()
    labels: tuple[bool, ...] = ()
    margin: float = 0.0
    index: int = 0
    where: str = ""
    record: int = 0
    """Its record's place in the list that was tokenised."""
    source: str = field(default="", compare=False)
    part: int = 0
    """Which of several weighted sources it comes from."""


def with_answers(prompt: Example, answers: Sequence[Sequence[int]]) -> Example:
    """A prompt with answers, all of whose tokens are in the loss."""
    masks = tuple((True,) * len(answer) for answer in answers)
    return replace(prompt, answers=tuple(map(tuple, answers)), answer_masks=masks)


@dataclass(frozen=True)
class TemplateAudit:
    """What a tokenizer and its chat template do to training: each a known way to spoil a model."""

    chat: bool
    """It has a chat template; without one the fields speak of plain text."""
    stop_token: str | None
    """Token that ends an answer."""
    stop_token_trained: bool
    """Answers end with it, so a model learns to stop."""
    stop_is_eos: bool
    """It is the tokenizer's EOS, where programs that read no generation config stop."""
    bos: Literal["template", "tokenizer", "none"]
    """Who puts BOS before the prompt."""
    double_bos: bool
    """A prompt begins with two BOS."""
    answer_head: str
    """What the template prints between the generation prompt and the answer; it is trained."""
    keeps_turns: bool
    """Earlier turns stay as they were printed, so conversations can be trained in one piece."""
    pad_is_stop: bool
    """Padding looks like the stop token; harmless here, for lengths mark the ends."""
    unfit: str | None = None
    """Why the template is unfit for training on chats; models still generate with it."""

    def lines(self) -> list[str]:
        """What to tell the user, warnings marked."""
        name = "chat template" if self.chat else "plain text"
        if self.unfit is not None:
            unfit = f"warning: {name}: fit to generate, not to train on chats: {self.unfit}"
            return [unfit, f"answers end with {self.stop_token}"]
        stop = "the stop token is NOT trained: models will not learn to stop; use a template that "
        stop += "ends a turn with a special token" if self.chat else "a tokenizer with an EOS token"
        report = [f"{name}: answers end with {self.stop_token}, trained"]
        report = report if self.stop_token_trained else [f"warning: {name}: {stop}"]
        if self.stop_token_trained and not self.stop_is_eos:
            report.append("it is not the tokenizer's EOS: list it in generation_config.json too")
        if self.double_bos:
            report.append("warning: prompts begin with two BOS; remove one from the chat template")
        else:
            report.append(f"BOS: {'none' if self.bos == 'none' else f'once, from the {self.bos}'}")
        if self.answer_head:
            report.append(
                f"answers begin with {self.answer_head!r}, printed by the template, trained"
            )
        if not self.keeps_turns:
            report.append("warning: the template rewrites earlier turns: no multi-turn `messages`")
        if self.pad_is_stop:
            report.append("padding is the stop token: ends are found by length, not by padding")
        return report


# --- single texts --------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Ids of a prompt: messages with the generation prompt, a string with the tokenizer's BOS."""
    return Encoder(tokenizer).prompt(prompt)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of an answer, without special tokens."""
    return Encoder(tokenizer).decode(ids)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Tokens that end an answer: EOS, the generation config's, and the chat template's, if any."""
    stops = {tokenizer.eos_token_id}
    configured = generation_config.eos_token_id if generation_config else None
    stops |= set(configured) if isinstance(configured, list | tuple) else {configured}
    if tokenizer.chat_template:
        with suppress(UserError):  # a template that shows no ending leaves the others
            stops.add(Encoder(tokenizer).ending[2])
    return frozenset(stop for stop in stops if stop is not None)


def check_ids(example: Example, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError for the example's first token that a model's `rows` embeddings do not have."""
    for ids in (example.prompt, *example.answers):
        if max(ids, default=0) >= rows:
            first = next(token for token in ids if token >= rows)
            raise UserError(
                f"{located(example.where)}token {tokenizer.convert_ids_to_tokens(first)} ({first}) "
                f"is beyond the model's {rows} embeddings; resize them and save the model"
            )


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether `other` has the tokens of `one` under their ids, and no others but special ones."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    more = theirs.keys() - ours.keys()  # such as a padding token that `prefloop reward` added
    same = all(theirs.get(token) == number for token, number in ours.items())
    return same and more <= set(other.all_special_tokens)


def audit_template(source: PreTrainedTokenizerBase | Encoder) -> TemplateAudit:
    """Try the tokenizer's chat template (or its plain text) for the known ways to go wrong."""
    encoder = source if isinstance(source, Encoder) else Encoder(source)
    tokenizer, bos = encoder.tokenizer, encoder.tokenizer.bos_token_id
    chat = bool(tokenizer.chat_template)
    try:
        _ = encoder.turn if chat else None
    except UserError as error:
        return _unfit(encoder, str(error))
    prompt = encoder.prompt(ASKED if chat else PROBE)
    begins = bos is not None and prompt[:1] == [bos]
    stop = encoder.turn.stop if chat else tokenizer.eos_token_id
    trained, keeps_turns = False, True
    if stop is not None:
        ids = encoder.answer(ASKED, ANSWERED) if chat else encoder.answer("q", "a")
        trained = ids[-1] == stop
    if chat:
        try:
            encoder.conversation([*ASKED, *ANSWERED, *ASKED, *ANSWERED])
        except UserError:
            keeps_turns = False
    return TemplateAudit(
        chat=chat,
        stop_token=None if stop is None else str(tokenizer.convert_ids_to_tokens(stop)),
        stop_token_trained=trained,
        stop_is_eos=stop == tokenizer.eos_token_id,
        bos="none" if not begins else "template" if chat else "tokenizer",
        double_bos=begins and prompt[1:2] == [bos],
        answer_head=encoder.turn.head if chat else "",
        keeps_turns=keeps_turns,
        pad_is_stop=tokenizer.pad_token_id in stop_token_ids(tokenizer),
    )


# --- records -------------------------------------------------------------------------------------


def _unfit(encoder: Encoder, why: str) -> TemplateAudit:
    """The audit of a template that training cannot use."""
    tokenizer = encoder.tokenizer
    stops = sorted(stop_token_ids(tokenizer))
    return TemplateAudit(
        chat=True,
        stop_token=" ".join(map(str, tokenizer.convert_ids_to_tokens(stops))) or None,
        stop_token_trained=False,
        stop_is_eos=stops == [tokenizer.eos_token_id],
        bos="none",
        double_bos=False,
        answer_head="",
        keeps_turns=False,
        pad_is_stop=tokenizer.pad_token_id in stops,
        unfit=why,
    )


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase | Encoder,
    max_length: int,
    truncation: Truncation,
    counts: RowCounts,
    train_on: Literal["answer", "all"] = "answer",
    keep_ties: bool = False,
    require: Callable[[Record, Example], None] = lambda record, example: None,
) -> list[Example]:
    """Tokenise records; every one is used, counted as dropped with its reason, or a UserError.

    `counts` says whether what cannot be tokenised is dropped too, and what `require` refuses by a
    UserError.

    `truncation` of rows over `max_length` tokens: `error`; `drop`; `left` cuts the prompt's start
    but for its BOS; `right` cuts the answer's end (its stop token goes with it). With `train_on`
    "all" the first token is the prompt and all others are the answer, in the loss. Rankings whose
    answers are all tied are dropped but with `keep_ties`; of others, tied pairs are counted.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)
    bos = encoder.tokenizer.bos_token_id
    examples: list[Example] = []
    for place, record in enumerate(records):
        try:
            example = _checked(_example(encoder, record), keep_ties, encoder.whole)
            if isinstance(example, Example):
                whole, example = example, _fitted(example, max_length, truncation, bos)
            if isinstance(example, Example):
                cut = example is not whole
                example = _all_trained(record, example) if train_on == "all" else example
                require(record, example)
        except UserError as error:
            counts.bad_row(record.where, error)
            continue
        if isinstance(example, str):
            counts.drop(example)
            continue
        source = _source(encoder, record)
        examples.append(replace(example, index=len(examples), record=place, source=source))
        counts.truncated += cut
        counts.tied_pairs += sum(comb(len(tier), 2) for tier in example.tiers)
    counts.used += len(examples)
    if not examples:
        source = located(records[0].where.rpartition(":")[0]) if records else ""
        raise UserError(
            f"{source}no rows left to use: {counts.summary()}; mend the rows or options"
        )
    return examples


def _source(encoder: Encoder, record: Record) -> str:
    """A digest of what a row says and of the vocabulary; not of where the row stands."""
    said = [(f.name, getattr(record, f.name)) for f in fields(record) if f.name != "where"]
    whole = repr((type(record).__name__, said, encoder.fingerprint))
    return blake2b(whole.encode(), digest_size=16).hexdigest()


def _example(encoder: Encoder, record: Record) -> Example:
    """The record as ids, not yet cut."""
    if isinstance(record, Conversation):
        begun, answer, mask = encoder.conversation(record.messages)
        return Example(tuple(begun), (tuple(answer),), (tuple(mask),), where=record.where)
    if isinstance(record, Comparison):
        record = record.as_ranking()
    texts: tuple[Text, ...] = ()
    if isinstance(record, Ranking):
        texts = record.completions
    elif not isinstance(record, Prompt):
        texts = (record.completion,)
    sampled = getattr(record, "sampled", ()) or (Sampled(),) * len(texts)
    if encoder.whole and not encoder.prompt(record.prompt):
        raise UserError(NO_PROMPT)
    prompt, answers = encode_answers(encoder, record.prompt, texts, sampled)
    return Example(
        prompt=prompt,
        answers=answers,
        answer_masks=tuple((True,) * len(answer) for answer in answers),
        tiers=record.tiers if isinstance(record, Ranking) else (),
        margin=record.margin if isinstance(record, Ranking) else 0.0,
        labels=(record.label,) if isinstance(record, Unpaired) else (),
        where=record.where,
    )


def encode_answers(
    encoder: Encoder, prompt: Text, texts: Sequence[Text], sampled: Sequence[Sampled]
) -> tuple[Ids, tuple[Ids, ...]]:
    """Ids of a prompt and its answers, which a model may have written; as the encoder reads."""
    if encoder.whole and texts:
        asked, answers = encoder.scored(prompt, texts, sampled)
        return tuple(asked), tuple(map(tuple, answers))
    pairs = zip(texts, sampled, strict=True)
    own = (
        encoder.own_ids(prompt, t, sample) or encoder.answer(prompt, t, not sample.cut)
        for t, sample in pairs
    )
    return tuple(encoder.prompt(prompt)), tuple(map(tuple, own))


def _checked(example: Example, keep_ties: bool, whole: bool) -> Example | str:
    """The example, or why there is nothing to learn from it."""
    if not example.prompt and not whole:
        raise UserError(NO_PROMPT)
    if not all(example.answers):
        return "answer of no tokens: an empty one that no stop token ends"
    if len(example.tiers) == 1 and not keep_ties:
        return "ranking without a strict pair"
    if twins := _equal_but_ranked(example):
        raise UserError(
            f"answers {twins[0]} and {twins[1]} are equal as tokens but not ranked as equal; put "
            "them into one tier, or remove the row"
        )
    return example


def _equal_but_ranked(example: Example) -> tuple[int, int] | None:
    """Two answers of different tiers with the same tokens: a pair that nothing can order."""
    for above, below in combinations(example.tiers, 2):
        for first, second in product(above, below):
            if example.answers[first] == example.answers[second]:
                return first, second
    return None


def _all_trained(record: Record, example: Example) -> Example:
    """The example with all its tokens but the first as one answer in the loss."""
    if isinstance(record, Conversation) and not all(m.trained for m in record.messages):
        raise UserError(
            "flags keep turns out of the loss, and --train-on all trains all; remove the flags, or "
            "use --train-on answer"
        )
    (answer,) = example.answers
    ids = example.prompt + answer
    masks = ((True,) * (len(ids) - 1),)
    return replace(example, prompt=ids[:1], answers=(ids[1:],), answer_masks=masks)


def _fitted(
    example: Example, max_length: int, truncation: Truncation, bos: int | None
) -> Example | str:
    """The example within `max_length` tokens, itself where it fits, or why it cannot be."""
    prompt, longest = example.prompt, max(map(len, example.answers), default=0)
    if len(prompt) + longest <= max_length:
        return example
    if truncation == "error":
        what = f"a prompt of {len(prompt)}"
        what += f" and an answer of {longest} tokens are" if longest else " tokens is"
        raise TooLong(
            f"{what} over the limit of {max_length} (--max-length); raise it, or choose "
            "--truncation drop, left or right"
        )
    if truncation == "drop":
        return f"longer than {max_length} tokens"
    if truncation == "left":
        room = max_length - longest
        first = prompt[:1] if prompt[:1] == (bos,) and room > 1 else ()
        kept = first + prompt[len(prompt) - room + len(first) :] if room > 0 else ()
        example = replace(example, prompt=kept)
    else:
        room = max(0, max_length - len(prompt))
        answers = tuple(answer[:room] for answer in example.answers)
        masks = tuple(mask[:room] for mask in example.answer_masks)
        example = replace(example, answers=answers, answer_masks=masks)
    empty = not example.prompt or len(example.prompt) > max_length
    unlearnable = not all(map(any, example.answer_masks))
    if empty or unlearnable or _equal_but_ranked(example):
        return f"nothing left to learn once cut to {max_length} tokens"
    return example
