"""`prefloop label score`: reward models say which tasks are worth a labeller's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.config.checks import validate
from prefloop.config.labelling import LabelScoreConfig
from prefloop.config.ranges import is_function, template_arguments
from prefloop.data.formats import parse_row
from prefloop.errors import UserError
from prefloop.labelling.export import project_id_of
from prefloop.labelling.imports import uncertainty_and_gap
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import prompts_of, responses_of
from prefloop.labelling.store.scoring import put_scores, set_strategy, tasks_of
from prefloop.records import Prompt
from prefloop.rewards.functions import columns_of, function_judge
from prefloop.rewards.judges import load_judge, require_read


def run(config: LabelScoreConfig) -> dict[str, Any]:
    """Scores all answers of a project by all models; its tasks are then handed out by them."""
    validate(config)
    models = len(config.reward_model)
    store = Store(config.store, must_exist=True)
    try:
        # 1. The answers.
        with store.read() as t:
            project_id = project_id_of(t, config.project)
            asked = prompts_of(t, project_id)
            answers = list(responses_of(t, project_id).values())
            tasks = tasks_of(t, project_id)
        if not answers:
            raise UserError(f"{config.store}#{config.project}: no answers to score; import some")
        # 2. Their scores, one model after the other.
        place = f"{config.store}#{config.project}"
        parsed = {n: _prompt(*stored, f"{place}: prompt {n}") for n, stored in asked.items()}
        rows = [parsed[answer["prompt_id"]] for answer in answers]
        for source in filter(is_function, config.reward_model):
            function_judge(source).require(rows)
        require_read(template_arguments(config.template_args), config.reward_model)
        texts = [_one_turn(answer["completion"]) for answer in answers]
        ended = [answer["finish_reason"] != "length" for answer in answers]
        given = [_scores(config, source, rows, texts, ended) for source in config.reward_model]
        ids = [answer["id"] for answer in answers]
        scores = dict(zip(ids, zip(*given, strict=True), strict=True))
        # 3. What hand-out goes by.
        orders = {
            task: uncertainty_and_gap(
                [[scores[answer][model] for answer in group] for model in range(models)]
            )
            for task, group in tasks.items()
        }
        summary = {"project": config.project, "answers": len(answers), "tasks": len(tasks)}
        with store.write() as t:
            put_scores(t, scores, orders)
            set_strategy(t, project_id, config.strategy)
            t.log(
                "score", None, **summary, models=list(config.reward_model), strategy=config.strategy
            )
    finally:
        store.close()
    return summary


def _scores(
    config: LabelScoreConfig,
    source: str,
    rows: Sequence[Prompt],
    texts: Sequence[str],
    ended: Sequence[bool],
) -> list[float]:
    """One judge's scores of the answers; `rows` are their prompts."""
    judge = load_judge(
        source,
        device=config.device,
        dtype=config.dtype,
        weights=config.weights,
        max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens,
        template_args=template_arguments(config.template_args),
    )
    judge.require(rows)
    columns = columns_of([row.extra for row in rows])
    return judge([row.prompt for row in rows], texts, ended, columns)


def _prompt(stored: object, extra: Mapping[str, Any] | None, where: str) -> Prompt:
    """A stored prompt as its row said it, with the row's tools."""
    prompt = parse_row({**(extra or {}), "prompt": stored}, where, "prompt")[0]
    assert isinstance(prompt, Prompt)
    return prompt


def _one_turn(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise UserError("an answer of several turns cannot be scored; import one turn an answer")
    return str(completion[0]["content"])
