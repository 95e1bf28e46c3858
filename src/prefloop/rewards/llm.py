"""Judges that are language models: two answers compared in both orders, or one scored by a rubric.

What they are asked stands in files: `rewards/prompts`, or the user's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefloop.config.endpoint import EndpointConfig, JudgeMode
from prefloop.config.ranges import endpoint_parts
from prefloop.errors import UserError
from prefloop.files import cache_dir, check_folder
from prefloop.records import Prompt, Text
from prefloop.rewards.endpoint import Endpoint
from prefloop.rewards.functions import Columns

PROMPTS = Path(__file__).parent / "prompts"
NAMES = {"pairwise": ("prompt", "answer_a", "answer_b"), "rubric": ("prompt", "answer")}
CUT = "\n[The answer was cut here, at the limit of its length.]"
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}
NUMBER = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"


class Answer(NamedTuple):
    """An answer to be judged; one that did not end was cut."""

    text: str
    ended: bool = True


class Pair(NamedTuple):
    """Two answers to one prompt."""

    prompt: Text
    first: Answer
    second: Answer


class Preference(NamedTuple):
    """How often the first answer of a pair won: 1, 0, or 1/2 for a tie."""

    first: float
    agreed: bool  # both orders gave the same verdict; where not, it is a tie


@dataclass(frozen=True)
class PairwiseJudge:
    """Says which of two answers is better, asked in both orders."""

    endpoint: Endpoint
    template: str

    def prefer(self, pairs: Sequence[Pair]) -> list[Preference | None]:
        """One verdict a pair; None where an order got none. Equal answers tie unasked."""
        asked = []
        for pair in pairs:
            turned = pair._replace(first=pair.second, second=pair.first)
            if pair.first != pair.second:
                asked += [self._filled(pair), self._filled(turned)]
        said = iter(self.endpoint.ask(asked, _verdict, REMIND_PAIR))
        preferences: list[Preference | None] = []
        for pair in pairs:
            if pair.first == pair.second:
                preferences.append(Preference(0.5, True))
                continue
            forward, backward = next(said), next(said)
            if forward is None or backward is None:
                preferences.append(None)
            else:
                agreed = forward == 1 - backward
                preferences.append(Preference(forward if agreed else 0.5, agreed))
        return preferences

    def _filled(self, pair: Pair) -> str:
        answers = {"answer_a": _answer(pair.first), "answer_b": _answer(pair.second)}
        return _filled(self.template, {"prompt": _asked(pair.prompt), **answers})


@dataclass(frozen=True)
class RubricJudge:
    """A judge (see Judge) that gives each answer by itself a score."""

    endpoint: Endpoint
    template: str
    low: float  # ends of the scale
    high: float

    def rate(
        self, prompts: Sequence[Text], completions: Sequence[str], ended: Sequence[bool]
    ) -> list[float | None]:
        """One score an answer; None where the model gave none."""
        answers = map(Answer, completions, ended)
        asked = [
            _filled(self.template, {"prompt": _asked(prompt), "answer": _answer(answer)})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        remind = f"{REMIND_SCORE} from [[{self.low:g}]] to [[{self.high:g}]]."
        return self.endpoint.ask(asked, self._score, remind)

    def _score(self, reply: str) -> float | None:
        numbers = [float(number) for number in re.findall(NUMBER, reply)]
        return numbers[-1] if numbers and self.low <= numbers[-1] <= self.high else None

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
        columns: Columns | None = None,
    ) -> list[float]:
        """See Judge. UserError where an answer got no score: none is made up."""
        rated = self.rate(prompts, completions, ended or [True] * len(completions))
        scores = [score for score in rated if score is not None]
        if missing := len(rated) - len(scores):
            raise UserError(
                f"{self.endpoint}: {missing} of {len(rated)} answers got no score "
                f"({self.endpoint.why}); give the command again: what was scored is kept in "
                f"{self.endpoint.cache}"
            )
        return scores

    def require(self, rows: Iterable[Prompt]) -> None:
        """See Judge: every text can be asked about."""


REMIND_PAIR = (
    "Your reply holds no verdict that can be read. Reply with the verdict alone: [[A]], [[B]] or "
    "[[C]]."
)
REMIND_SCORE = (
    "Your reply holds no score that can be read. Reply with the score alone, in double brackets,"
)


def pairwise_judge(source: str, config: EndpointConfig) -> PairwiseJudge:
    """The judge that `openai:MODEL@URL` names, comparing two answers."""
    return PairwiseJudge(_endpoint(source, config), _template("pairwise", config.judge_prompt))


def rubric_judge(source: str, config: EndpointConfig) -> RubricJudge:
    """The judge that `openai:MODEL@URL` names, scoring one answer."""
    template = _template("rubric", config.judge_prompt)
    scale = sorted({float(number) for number in re.findall(NUMBER, template)})
    if len(scale) < 2:
        raise UserError(
            f"--judge-prompt {config.judge_prompt}: it must name both ends of its scale as the "
            "reply gives its score, such as [[1]] and [[10]]"
        )
    return RubricJudge(_endpoint(source, config), template, scale[0], scale[-1])


def _endpoint(source: str, config: EndpointConfig) -> Endpoint:
    model, url = endpoint_parts(source)
    try:
        args = json.loads(config.judge_args)
    except ValueError as error:
        raise UserError(f"--judge-args {config.judge_args}: not JSON ({error}); mend it") from error
    if taken := {"model", "messages", "stream", "n"} & args.keys():
        raise UserError(f"--judge-args: `{taken.pop()}` is prefloop's own to say; leave it out")
    cache = config.judge_cache or cache_dir() / "judge"
    check_folder(cache)
    return Endpoint(model, url, args, config.judge_timeout, config.judge_concurrency, cache)


def _template(mode: JudgeMode, path: Path | None) -> str:
    """The prompt's text; UserError where it does not take what it is to be asked about."""
    try:
        text = (path or PROMPTS / f"{mode}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-prompt {path}: cannot be read ({error}); mend it") from error
    for name in NAMES[mode]:
        if f"{{{name}}}" not in text:
            names = ", ".join(f"{{{one}}}" for one in NAMES[mode])
            raise UserError(
                f"--judge-prompt {path}: lacks {{{name}}}; a {mode} prompt holds {names}"
            )
    return text


def _filled(template: str, values: Mapping[str, str]) -> str:
    """All at once: what stands in an answer is not filled again."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _asked(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _answer(answer: Answer) -> str:
    return answer.text + ("" if answer.ended else CUT)


def _verdict(reply: str) -> float | None:
    letters = re.findall(r"\[\[\s*([ABC])\s*\]\]", reply)
    return VERDICTS[letters[-1]] if letters else None
