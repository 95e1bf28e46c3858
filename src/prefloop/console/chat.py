"""`prefloop chat`: a conversation with a model, or with two of which the better answer goes on."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from prefloop.config import ChatConfig
from prefloop.config.checks import validate
from prefloop.console.reading import LEAVE, Reader
from prefloop.data.tokenize import decode_answer
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.generation.commands import loaded, room, sampling_of
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.labelling.imports import add_samples, check_store
from prefloop.models.model import LoadedModel
from prefloop.records import Message, text_to_json
from prefloop.terminal import shown

HELP = r"""/help               this
/system TEXT        set the system message; without TEXT show it; `none` removes it
/temperature T      draw answers at this temperature; 0 takes the likeliest token
/regenerate         answer the last message again
/save FILE.jsonl    add the conversation to a file of `messages` rows
/quit               leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \ goes on in the next one; so do all lines between
two lines of three quotation marks. A message that begins with / needs a space before it."""
VERDICTS = {"a": [[0], [1]], "b": [[1], [0]], "=": [[0, 1]]}


class Answer(NamedTuple):
    """What a model said: its text, and how it came about."""

    text: str
    tokens: list[int]
    ended: bool  # by itself, not at --max-new-tokens
    stopped: bool  # by Ctrl-C


class _Stop(Exception):
    """Ctrl-C, while an answer is being written."""


def chat(config: ChatConfig, source: TextIO | None = None, out: TextIO | None = None) -> None:
    """Answers message by message, each with the conversation so far, until the input ends.

    A conversation that outgrows --max-length loses its oldest turns, and says so.
    """
    validate(config)
    if config.to_labels is not None:
        check_store(config.to_labels)
    models = [loaded(config)]
    if config.against is not None:
        models.append(loaded(config, config.against))
    for model in models:
        if not model.tokenizer.chat_template:
            raise UserError(
                f"{model.source}: its tokenizer has no chat template; use `prefloop generate`, or "
                "a model tuned on chats"
            )
    with Reader(source or sys.stdin, out or sys.stdout) as reader:
        Talk(config, models, reader).run()


class Talk:
    """A conversation: its messages so far, and how answers are drawn now."""

    def __init__(self, config: ChatConfig, models: list[LoadedModel], reader: Reader) -> None:
        self.config, self.models, self.reader = config, models, reader
        self.history: list[Message] = []
        self.system, self.temperature = config.system, config.temperature
        self.draws = 0

    def run(self) -> None:
        """Until the input ends, or /quit."""
        if self.reader.interactive:
            names = " and ".join(model.source for model in self.models)
            self._say(f"{names}. {LEAVE}")
        for typed in self.reader.messages():
            if not typed.startswith("/"):
                self.history.append(Message("user", typed.strip()))
                self._answer()
            elif not self._command(*typed.partition(" ")[::2]):
                return

    def _command(self, name: str, rest: str) -> bool:
        """Carries out what begins with a slash; False to leave."""
        rest = rest.strip()
        match name.strip():
            case "/quit" | "/exit":
                return False
            case "/help":
                self._say(HELP)
            case "/system":
                if rest:
                    self.system = None if rest == "none" else rest
                self._say(f"(system message: {self.system or 'none'})")
            case "/temperature":
                self._set_temperature(rest)
            case "/regenerate":
                if self.history[-1:] and self.history[-1].role == "assistant":
                    self.history.pop()
                    self._answer()
                else:
                    self._say("(there is no answer yet)")
            case "/save":
                self._save(rest)
            case other:
                self._say(f"(no command {other}; /help lists them)")
        return True

    def _set_temperature(self, word: str) -> None:
        try:
            validate(replace(self.config, temperature=float(word), top_p=1.0, top_k=0))
        except (ValueError, UserError):
            self._say("(give a temperature of 0 or more, such as 0.7)")
            return
        self.temperature = float(word)
        self._say(f"(temperature: {self.temperature:g})")

    def _save(self, name: str) -> None:
        """Adds the conversation to a file of rows, as `sft` reads them."""
        if not name.endswith(".jsonl") or not self.history:
            self._say("(give the name of a .jsonl file, once there is an answer)")
            return
        row = {"messages": text_to_json(self._prompt())}
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"({name}: {error.strerror})")
            return
        self._say(f"(added to {name})")

    # --- answers ---------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answers the last message, or takes it back where nothing is said to it."""
        try:
            fits = self._make_room()
            said = (self._one() if len(self.models) == 1 else self._two()) if fits else ""
        except UserError as error:
            if not self.reader.interactive:
                raise
            self._say(f"({error})")
            said = ""
        if said:
            self.history.append(Message("assistant", said))
        elif self.history:
            self.history.pop()

    def _prompt(self) -> tuple[Message, ...]:
        system = [Message("system", self.system)] if self.system is not None else []
        return (*system, *self.history)

    def _make_room(self) -> bool:
        """Whether something is left to answer, once the oldest turns that do not fit are cut."""
        most = room(self.config)
        while self.history:
            longest = max(len(model.encoder.prompt(self._prompt())) for model in self.models)
            if longest <= most:
                return True
            self._say(f"({longest} tokens, {most} fit: the oldest turn is cut)")
            del self.history[:2]
        return False

    def _one(self) -> str:
        return self._draw(self.models[0]).text

    def _two(self) -> str:
        """Both answer, in an order drawn anew; returns the better answer, by the person's word."""
        order = Random(f"{self.config.seed}:{self.draws}").sample((0, 1), 2)
        answers: list[Answer] = []
        for letter, number in zip("AB", order, strict=True):
            self._say(f"--- {letter}")
            answers.append(self._draw(self.models[number]))
            if answers[-1].stopped:
                return answers[0].text
        verdict = self._verdict()
        names = ", ".join(f"{x}: {self.models[n].source}" for x, n in zip("AB", order, strict=True))
        winner = answers[verdict == "b"]
        self._say(f"({names}; {'B' if verdict == 'b' else 'A'} goes on)")
        if verdict and self.config.to_labels is not None:
            self._store(answers, VERDICTS[verdict])
        return winner.text

    def _verdict(self) -> str:
        """`a`, `b`, `=`, or nothing where the person does not say."""
        while True:
            said = self.reader.ask("better (a, b, = or Enter for neither)? ")
            if not said or said.lower() in VERDICTS:
                return (said or "").lower()

    def _store(self, answers: list[Answer], tiers: list[list[int]]) -> None:
        """Puts the two answers with what was said of them into the labelling store."""
        config, texts = self.config, [answer.text for answer in answers]
        assert config.to_labels is not None
        if texts[0] == texts[1]:
            self._say("(the same answer twice: not stored)")
            return
        row: dict[str, object] = {
            "prompt": text_to_json(self._prompt()),
            "completions": texts,
            "tiers": tiers,
            "labeller": config.labeller,
            "finish_reasons": ["stop" if answer.ended else "length" for answer in answers],
        }
        marks = {model.encoder.fingerprint for model in self.models}
        if len(marks) == 1:
            row |= {"completion_ids": [a.tokens for a in answers], "tokenizer": marks.pop()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "preference.jsonl"
            write_jsonl(path, [row])
            summary = add_samples(config.to_labels, path)
        known = "; it was there already" if not summary["tasks"] else ""
        self._say(f"(stored in {config.to_labels}{known})")

    def _draw(self, model: LoadedModel) -> Answer:
        """An answer, printed as it comes but for bytes of half a character; Ctrl-C stops it."""
        prompt, engine = self._prompt(), Engine(model, 1)
        drawn: list[int] = []
        before, ended, stopped = "", False, False
        with _interrupts() as asked:

            def show(tokens: Tensor, end: str = "") -> None:
                nonlocal before
                drawn.extend(tokens.tolist())
                text = decode_answer(model.tokenizer, drawn)
                if end or not text.endswith("\ufffd"):
                    print(shown(text[len(before) :]), end=end, file=self.reader.out, flush=True)
                    before = text
                if asked.is_set() and not end:
                    raise _Stop

            seed, self.draws = self.config.seed + self.draws, self.draws + 1
            ids, sampling = model.encoder.prompt(prompt), self._sampling(model)
            try:
                [[sample]] = engine.generate([ids], 1, sampling, seed, on_tokens=show)
                ended = sample.finish_reason == "stop"
            except _Stop:
                stopped = True
            show(torch.tensor([], dtype=torch.long), end="\n")
        if stopped or (self.reader.interactive and not ended):
            reason = "stopped" if stopped else f"cut at {self.config.max_new_tokens} tokens"
            self._say(f"({reason})")
        return Answer(model.encoder.said(prompt, drawn), drawn, ended, stopped)

    def _sampling(self, model: LoadedModel) -> Sampling:
        return replace(sampling_of(self.config, model), temperature=self.temperature)

    def _say(self, text: str) -> None:
        print(shown(text), file=self.reader.out, flush=True)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of an exception wherever the work just is."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
