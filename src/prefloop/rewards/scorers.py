"""Reward models as judges of texts, and what gives PPO's answers their scores."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.data.batches import to_batches
from prefloop.data.encoder import ASKED, PROBE
from prefloop.data.tokenize import Example, encode_answers, same_ids, with_answers
from prefloop.errors import UserError, located
from prefloop.models.heads import answer_scores
from prefloop.models.load import unread_arguments
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import split_answers
from prefloop.models.sharding import in_step
from prefloop.records import Message, Prompt, Sampled, Text
from prefloop.rewards.functions import Columns, FunctionJudge, columns_of
from prefloop.rewards.judges import Judge
from prefloop.rewards.llm import RubricJudge
from prefloop.terminal import shown


def with_template_args(model: LoadedModel, template_args: Mapping[str, Any]) -> LoadedModel:
    """The model, its chat template given the arguments that it reads; the others are told."""
    unread = unread_arguments(model.tokenizer, template_args)
    if unread and distributed.rank() == 0:
        names = ", ".join(f"`{name}`" for name in unread)
        print(shown(f"{model.source}: its chat template reads no {names}"), file=sys.stderr)
    read = {name: value for name, value in template_args.items() if name not in unread}
    return replace(model, template_args=read)


@dataclass(frozen=True)
class ModelJudge:
    """A judge (see Judge) that is a reward model, with its own tokenizer and chat template."""

    model: LoadedModel
    micro_batch_tokens: int
    max_length: int | None = None

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
        columns: Columns | None = None,
    ) -> list[float]:
        """See Judge. Answers that follow each other to one prompt are scored in one piece: the
        prompt is computed once."""
        ends = [True] * len(completions) if ended is None else ended
        rows = enumerate(zip(prompts, completions, ends, strict=True))
        examples = [self._example(prompt, text, end, i) for i, (prompt, text, end) in rows]
        pieces = []
        for _, group in itertools.groupby(examples, key=lambda example: example.prompt):
            alike = list(group)
            pieces.append(with_answers(alike[0], [answer for e in alike for answer in e.answers]))
        return scores_of(self.model, pieces, self.micro_batch_tokens)

    def require(self, rows: Iterable[Prompt]) -> None:
        """See Judge: the template must print each prompt, its tools too, with an answer."""
        for row in rows:
            self._encode(row.prompt, PROBE, True, row.where)

    def _example(self, prompt: Text, completion: str, ended: bool, index: int) -> Example:
        where, model = f"answer {index}", self.model
        head, answer = self._encode(prompt, completion, ended, where)
        if not answer:  # it says nothing and did not end: the score is that of what there is
            head, answer = head[:-1], head[-1:]
        if self.max_length is not None and len(head) + len(answer) > self.max_length:
            raise UserError(
                f"{model.source}: {where} with its prompt has {len(head) + len(answer)} "
                f"tokens, more than --max-length {self.max_length}; raise it"
            )
        example = with_answers(Example(head, index=index, where=where), [answer])
        model.check_example(example)
        return example

    def _encode(
        self, prompt: Text, completion: str, ended: bool, where: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a prompt and its answer, as the model is read."""
        try:
            head, (answer,) = encoded(self.model, prompt, completion, ended)
        except UserError as error:
            raise UserError(f"{located(where)}{self.model.source}: {error}") from error
        return head, answer


def encoded(
    model: LoadedModel, prompt: Text, completion: str, ended: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Ids of a prompt, and of its one answer, as the model's own encoder gives them."""
    text = completion if isinstance(prompt, str) else (Message("assistant", completion),)
    return encode_answers(model.encoder, prompt, [text], [Sampled(ended)])


def scores_of(
    model: LoadedModel, examples: Sequence[Example], micro_batch_tokens: int
) -> list[float]:
    """The scores of all examples' answers, in order; no gradients."""
    scores: list[float] = []
    padded = not model.packed
    pieces = split_answers(examples, micro_batch_tokens, padded)
    with torch.no_grad(), in_step([model]):
        for batch in to_batches(pieces, micro_batch_tokens, model.device, padded):
            scores += answer_scores(model, batch).tolist()
    return scores


# --- PPO -----------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A score an answer, and where several functions make it, each one's own, by its name."""

    scores: list[float]
    parts: Mapping[str, list[float]]
    cost: Mapping[str, int] = MappingProxyType({})  # what an LLM judge used for them


Scorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[Example]], Scored]
"""From one prompt an answer, the answers' texts, and the examples that hold their tokens."""


def model_scorer(
    model: LoadedModel,
    policy: LoadedModel,
    prompts: Sequence[Prompt],
    config: PPOConfig,
    stops: frozenset[int],
) -> Scorer:
    """A reward model's scores: of the sampled tokens where it reads these prompts as the policy
    does, else of the answers' texts, printed and tokenised as it was trained.
    """
    if reads_alike(model, policy, prompts):
        return token_scorer(model, config, stops)
    judge = ModelJudge(model, config.micro_batch_tokens)
    judge.require(prompts)
    if distributed.rank() == 0:
        note = f"{model.source}: scores texts as its own tokenizer and chat template print them, "
        print(shown(note + "which is not as the policy samples them"), file=sys.stderr)
    return text_scorer(judge, stops)


def together(names: Sequence[str], scorers: Sequence[Scorer], how: str) -> Scorer:
    """Several reward models' scores as one: their mean, or lower-bound, which is their mean less
    their standard deviation (arXiv 2310.02743 weighs the variance so).

    Each one's own scores are told beside it, and the deviation as `spread`.
    """
    if len(scorers) == 1:
        return scorers[0]

    def score(
        prompts: Sequence[Prompt], completions: Sequence[str], examples: Sequence[Example]
    ) -> Scored:
        parts = {
            name: scorer(prompts, completions, examples).scores
            for name, scorer in zip(names, scorers, strict=True)
        }
        each = torch.tensor(list(parts.values()), dtype=torch.float64)  # [models, answers]
        spread = each.std(0, correction=0)
        total = each.mean(0) - (spread if how == "lower-bound" else 0.0)
        return Scored(total.tolist(), parts | {"spread": spread.tolist()})

    return score


def reads_alike(model: LoadedModel, policy: LoadedModel, prompts: Sequence[Prompt]) -> bool:
    """Whether a scorer makes of each prompt with an answer the very tokens that the policy samples
    from and samples; tried with a probe as the answer.

    Where the policy's template prints more around an answer than its stop token (such as an empty
    thought), what it samples may have that or not, so the two do not read alike.
    """
    if not same_ids(policy.tokenizer, model.tokenizer):
        return False
    kinds = {not isinstance(row.prompt, str) for row in prompts}
    try:
        answers = {chat: _probe(policy, chat) for chat in kinds}
        for row in prompts:
            chat = not isinstance(row.prompt, str)
            sampled = policy.encoder.prompt(row.prompt)
            sampled += model.encoder.with_tail(answers[chat], chat)
            prompt, (scored,) = encoded(model, row.prompt, PROBE, True)
            if sampled != [*prompt, *scored]:
                return False
    except UserError:  # a template that generates, and prints answers otherwise
        return False
    return True


def _probe(policy: LoadedModel, chat: bool) -> list[int]:
    """The probe as the policy samples it; UserError where its template prints more around it."""
    _, (printed,) = encoded(policy, ASKED if chat else PROBE, PROBE, True)
    stop = policy.encoder.turn.stop if chat else policy.tokenizer.eos_token_id
    if stop is None or list(printed) != [*policy.encoder.continued(PROBE), stop]:
        raise UserError("the template prints more around an answer than its stop token")
    return list(printed)


def token_scorer(scorer: LoadedModel, config: PPOConfig, stops: frozenset[int]) -> Scorer:
    """Scores of the sampled tokens themselves, by a reward model that reads as the policy does.

    An answer that stopped, by whichever token, ends as the reward model's own encoder ends it.
    """

    def score(
        prompts: Sequence[Prompt], completions: Sequence[str], examples: Sequence[Example]
    ) -> Scored:
        read = []
        for example, prompt in zip(examples, prompts[:: config.samples_per_prompt], strict=True):
            chat = not isinstance(prompt.prompt, str)
            answers = [_as_read(scorer, answer, chat, stops) for answer in example.answers]
            read.append(with_answers(example, answers))
        return Scored(scores_of(scorer, read, config.micro_batch_tokens), {})

    return score


def _as_read(
    scorer: LoadedModel, answer: Sequence[int], chat: bool, stops: frozenset[int]
) -> list[int]:
    """A sampled answer's tokens up to the one that is scored."""
    if answer[-1] not in stops:
        return scorer.encoder.with_tail(answer, chat=False)
    stop = scorer.encoder.ending[2] if chat else scorer.tokenizer.eos_token_id
    return scorer.encoder.with_tail(answer if stop is None else [*answer[:-1], stop], chat)


def text_scorer(judge: Judge, stop_token_ids: frozenset[int]) -> Scorer:
    """Scores of the answers' text, by Python functions or a model that reads otherwise."""

    def score(
        prompts: Sequence[Prompt], completions: Sequence[str], examples: Sequence[Example]
    ) -> Scored:
        asked, columns = [p.prompt for p in prompts], columns_of([p.extra for p in prompts])
        if isinstance(judge, FunctionJudge):
            parts = judge.parts(asked, completions, columns)
            return Scored(judge.weighted(parts), parts if len(parts) > 1 else {})
        ended = [answer[-1] in stop_token_ids for e in examples for answer in e.answers]
        if isinstance(judge, RubricJudge):
            return _rated(judge, asked, completions, ended)
        return Scored(judge(asked, completions, ended, columns), {})

    return score


def _rated(
    judge: RubricJudge, asked: Sequence[Text], completions: Sequence[str], ended: Sequence[bool]
) -> Scored:
    """An LLM's scores and what they cost. An answer that got none (`judge/failed`) takes the mean
    of the others, which moves the policy least: the run would stop at the same answer again.
    """
    before = asdict(judge.endpoint.usage)
    rated = judge.rate(asked, completions, ended)
    known = [score for score in rated if score is not None]
    scores = [sum(known) / len(known) if score is None else score for score in rated]
    cost = {f"judge/{k}": n - before[k] for k, n in asdict(judge.endpoint.usage).items()}
    return Scored(scores, {}, cost)
