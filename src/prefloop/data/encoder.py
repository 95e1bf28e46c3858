"""One tokenizer and its chat template: texts and messages -> token ids and masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from prefloop.errors import UserError, first_line
from prefloop.records import Message, Sampled, Text, text_to_json, tools_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "<|pad|>"  # what a scorer's tokenizer gains where no token is left for padding
PROBE = "Probe answer"
ASKED = (Message("user", "Probe question"),)
ANSWERED = (Message("assistant", PROBE),)


@dataclass(frozen=True)
class Turn:
    """How a template prints an assistant turn: generation prompt, head, answer, end, rest."""

    head: str
    end: str  # up to and including the stop token
    rest: str  # what a template prints after the stop token
    stop: int | None


@dataclass
class Encoder:
    """A tokenizer with what is asked of it again and again."""

    tokenizer: PreTrainedTokenizerBase
    template_args: Mapping[str, Any] | None = None
    """Given to the chat template beside the messages."""
    whole: bool = False
    """A prompt with its answer is one text, as most programs read scorers: its last token counts,
    whatever the template prints there. Otherwise an answer ends with its stop token."""
    unscored: int | None = None
    """Padding of a scorer that reads its text whole: Transformers never scores it at the end."""
    trains: bool = True
    """A template that is unfit for training on chats is refused."""

    def ids(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text that begins a sequence."""
        encoded = self.tokenizer(text, add_special_tokens=specials, verbose=False)
        return list(encoded["input_ids"])

    def continued(self, text: str) -> list[int]:
        """The ids of a text that goes on after another: no space is put before it."""
        if not self._puts_space or not text:
            return self.ids(text)
        before, joint = self.ids("\n"), self.ids("\n" + text)
        apart = joint[: len(before)] == before
        return joint[len(before) :] if apart else self.ids(text)

    @cached_property
    def _puts_space(self) -> bool:
        """SentencePiece's dummy prefix: "a" alone becomes "▁a"."""
        first: str = self.tokenizer.convert_ids_to_tokens(self.ids("a"))[0]
        return first[0] in "▁Ġ"

    @cached_property
    def leading(self) -> list[int]:
        """Special tokens that the tokenizer itself puts before a text (BOS)."""
        plain, full = self.ids("a"), self.ids("a", specials=True)
        places = [at for at in range(len(full)) if full[at : at + len(plain)] == plain]
        return full[: places[0]] if places else []

    @cached_property
    def turn(self) -> Turn:
        """Found with a probe; what follows the probe is the same for every answer."""
        return Turn(self._answer_text(ASKED, ANSWERED).rpartition(PROBE)[0], *self.ending)

    @cached_property
    def ending(self) -> tuple[str, str, int | None]:
        """What follows an answer: text to the stop token, text after it, and that token's id."""
        _, probe, tail = self.render([*ASKED, *ANSWERED], generation_prompt=False).rpartition(PROBE)
        if not probe:
            raise UserError("the chat template does not print an assistant message's content")
        added = {str(token): id_ for id_, token in self.tokenizer.added_tokens_decoder.items()}
        inside = [(tail.index(token), -len(token), token) for token in added if token in tail]
        if not inside:
            return tail, "", None
        at, _, token = min(inside)
        at += len(token)
        return tail[:at], tail[at:], added[token]

    @cached_property
    def tail(self) -> list[int]:
        """Ids of what the template prints after the stop token, as they stand in a whole chat."""
        stop = self.ending[2]
        ids = self.ids(self.render([*ASKED, *ANSWERED], generation_prompt=False))
        return [] if stop is None else ids[len(ids) - ids[::-1].index(stop) :]

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The template's text of a chat."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "these are chat messages, and the tokenizer has no chat template; take a chat "
                "model's tokenizer, or give strings"
            )
        tools = tools_of(tuple(messages))
        if tools and not self._prints_tools:
            raise UserError(
                "the chat template ignores `tools`; take a model whose template prints them, or "
                "put them into a system message"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                text_to_json(tuple(messages)),  # type: ignore[arg-type]
                tools=tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(self.template_args or {}),
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"the chat template refuses these messages ({first_line(error)}); mend the row"
            ) from error
        assert isinstance(text, str)
        return text

    @cached_property
    def _prints_tools(self) -> bool:
        name = "probe_of_tools"
        about: dict[str, object] = {"name": name, "description": name, "parameters": {}}
        tools = json.dumps([{"type": "function", "function": about}])
        self.__dict__["_prints_tools"] = True  # so that the probe itself may render them
        try:
            return name in self.render((Message("tools", tools), *ASKED), generation_prompt=True)
        finally:
            del self.__dict__["_prints_tools"]

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens under their ids, whatever padding token a scorer's tokenizer gained."""
        vocabulary = sorted((i, t) for t, i in self.tokenizer.get_vocab().items() if t != PAD)
        return blake2b(json.dumps(vocabulary).encode(), digest_size=8).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without special tokens, as `continued` would read it."""
        before = self.ids("a")  # alone, many decoders take the first space for a prefix
        return self._text([*before, *ids]).removeprefix(self._text(before))

    def said(self, prompt: Text, ids: Sequence[int]) -> str:
        """What an answer to the prompt says: of a chat's, without what the template prints."""
        text = self.decode(ids)
        if isinstance(prompt, str):
            return text
        try:
            turn = self.turn
        except UserError:  # a template that generates, and cannot train
            return text
        text = text.removeprefix(turn.head)
        if turn.stop is None or list(ids[-1:]) != [turn.stop]:
            return text
        stop = str(self.tokenizer.convert_ids_to_tokens(turn.stop))
        return text.removesuffix(turn.end.removesuffix(stop))

    def own_ids(self, prompt: Text, answer: Text, sampled: Sampled) -> tuple[int, ...]:
        """The tokens that a model wrote, where they are this tokenizer's; UserError for others'."""
        if not sampled.ids or sampled.tokenizer != self.fingerprint:
            return ()
        text = answer if isinstance(answer, str) else answer[0].content
        if max(sampled.ids) >= len(self.tokenizer) or self.said(prompt, sampled.ids) != text:
            problem = f"the answer {text[:40]!r} is not the text of its token ids; "
            raise UserError(problem + "leave its ids out where the text was changed")
        return sampled.ids

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _answer_text(self, prompt: Sequence[Message], answer: Sequence[Message]) -> str:
        """What the template prints after the generation prompt."""
        begun = self.render(prompt, generation_prompt=True)
        whole = self.render([*prompt, *answer], generation_prompt=False)
        if not whole.startswith(begun):
            raise UserError(
                "the chat template prints an answer otherwise than its generation prompt begins "
                "it, so what is trained is not what is generated; mend the template"
            )
        return whole[len(begun) :]

    def prompt(self, prompt: Text) -> list[int]:
        """Ids of a prompt: messages with their generation prompt, a string with BOS."""
        if not isinstance(prompt, str):
            return self.ids(self.render(prompt, generation_prompt=True))
        ids, leading = self.ids(prompt), self.leading
        return ids if leading and ids[: len(leading)] == leading else leading + ids

    def answer(self, prompt: Text, answer: Text, ended: bool = True) -> list[int]:
        """Ids of an answer to the prompt, its stop token once; a cut one ends with its text."""
        if isinstance(prompt, str) and isinstance(answer, str):
            if not ended:
                return self.continued(answer)
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise UserError("the tokenizer has no EOS token to end an answer; set eos_token")
            ids = self.continued(answer)
            return ids if ids[-1:] == [eos] else [*ids, eos]
        if isinstance(prompt, str) or isinstance(answer, str):
            raise UserError("prompt and answer must both be strings or both be messages")
        text = self._answer_text(prompt, answer)
        if not text.endswith(self.turn.end + self.turn.rest):
            raise UserError("the chat template does not end this answer as it ends others")
        if not ended:
            return self.continued(text.removesuffix(self.turn.end + self.turn.rest))
        return self._turn_ids(text.removesuffix(self.turn.rest))

    def _turn_ids(self, text: str) -> list[int]:
        """Ids of an assistant turn; a stop token that the answer's text brought along is cut."""
        ids = self.continued(text)
        while len(ids) > 1 and ids[-2] == ids[-1] == self.turn.stop:
            ids.pop()
        return ids

    def scored(
        self, prompt: Text, answers: Sequence[Text], sampled: Sequence[Sampled]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt and of answers as parts of whole texts; the last token is scored."""
        if self.trains and not isinstance(prompt, str):
            _ = self.turn
        asked = self.prompt(prompt)
        texts = [
            asked + self.with_tail(own, chat=not isinstance(prompt, str) and not sample.cut)
            if (own := self.own_ids(prompt, answer, sample))
            else self._whole(prompt, answer, not sample.cut)
            for answer, sample in zip(answers, sampled, strict=True)
        ]
        columns = zip(asked, *(text[:-1] for text in texts), strict=False)  # the shortest's length
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        return texts[0][:shared], [text[shared:] for text in texts]

    def with_tail(self, ids: Sequence[int], chat: bool) -> list[int]:
        """Sampled tokens up to what is scored; in a chat with what the template prints after."""
        tail = self.tail if chat and self.whole and self.tokenizer.chat_template else []
        return self._without_padding([*ids, *tail])

    def _whole(self, prompt: Text, answer: Text, end: bool) -> list[int]:
        """Ids of a prompt with its answer as one text, up to the token that is scored."""
        if isinstance(prompt, str) and isinstance(answer, str):
            eos, ids = self.tokenizer.eos_token_id, self.prompt(prompt + answer)
            ids = [*ids, eos] if end and eos is not None and ids[-1:] != [eos] else ids
        elif isinstance(prompt, str) or isinstance(answer, str):
            raise UserError("prompt and answer must both be strings or both be messages")
        else:
            text = self.render([*prompt, *answer], generation_prompt=False)
            ids = self.ids(text if end else _cut(text, answer[-1].content))
        return self._without_padding(ids)

    def _without_padding(self, ids: list[int]) -> list[int]:
        """The ids up to the last that Transformers would score."""
        kept = len(ids)
        while kept > 1 and ids[kept - 1] == self.unscored:
            kept -= 1
        return ids[:kept]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[int], list[bool]]:
        """The prompt up to the first assistant content, the rest, and the rest's loss mask.

        Each assistant turn is what the rendered chat gains from the generation prompt to the
        turn's stop token; the chat so far must be a prefix of the whole.
        """
        turns = [at for at, message in enumerate(messages) if message.role == "assistant"]
        whole = self.render(messages[: turns[-1] + 1], generation_prompt=False)
        ids: list[int] = []
        mask: list[bool] = []
        prompt, printed = 0, ""
        for at in turns:
            begun = self.render(messages[:at], generation_prompt=True)
            ended = self.render(messages[: at + 1], generation_prompt=False)
            regular = ended.endswith(self.turn.end + self.turn.rest)
            ended = ended.removesuffix(self.turn.rest)
            if not (regular and begun.startswith(printed) and ended.startswith(begun)) or not (
                whole.startswith(ended)
            ):
                raise UserError(
                    f"the chat template prints message {at} otherwise once more messages follow "
                    "(as templates that strip thinking do), so the turns cannot be trained in one "
                    "piece; give rows with one assistant turn, or mend the template"
                )
            context, turn = begun[len(printed) :], self._turn_ids(ended[len(begun) :])
            asked = self.continued(context) if printed else self.ids(context)
            prompt = prompt or len(asked)
            ids += asked + turn
            mask += [False] * len(asked) + [messages[at].trained] * len(turn)
            printed = ended
        return ids[:prompt], ids[prompt:], mask[prompt:]


def _cut(text: str, content: str) -> str:
    """A rendered chat up to its last content, which the template may have stripped."""
    for said in (content, content.rstrip(), content.strip()):
        before, printed, _ = text.rpartition(said)
        if said and printed:
            return before + printed
    return text
