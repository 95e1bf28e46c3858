"""`prefloop label score`: reward models say which tasks are worth a labeller's time."""

from __future__ import annotations

from typing import Any

from prefloop.config.checks import validate
from prefloop.config.labelling import LabelScoreConfig
from prefloop.config.ranges import is_function
from prefloop.errors import UserError
from prefloop.labelling.export import project_id_of
from prefloop.labelling.imports import uncertainty_and_gap
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import prompts_of, responses_of
from prefloop.labelling.store.scoring import put_scores, set_strategy, tasks_of
from prefloop.records import Message, Text
from prefloop.rewards.functions import columns_of, function_judge
from prefloop.rewards.judges import Judge, load_judge


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
        rows = [asked[answer["prompt_id"]] for answer in answers]
        prompts, extras = [_text(prompt) for prompt, _ in rows], [extra for _, extra in rows]
        for source in filter(is_function, config.reward_model):
            place = f"{config.store}#{config.project}"
            function_judge(source).require((place, extra) for extra in extras)
        texts = [_one_turn(answer["completion"]) for answer in answers]
        ended = [answer["finish_reason"] != "length" for answer in answers]
        columns = columns_of(extras)
        given = [_judge(config, s)(prompts, texts, ended, columns) for s in config.reward_model]
        ids = [answer["id"] for answer in answers]
        scores = dict(zip(ids, zip(*given, strict=True), strict=True))
        # 3. What hand-out goes by.
        orders = {
            task: uncertainty_and_gap(
                [[scores[answer][model] for answer in group] for model in range(models)]
            )
            for task, group in tasks.items()
        }
        told = {"project": config.project, "answers": len(answers), "tasks": len(tasks)}
        with store.write() as t:
            put_scores(t, scores, orders)
            set_strategy(t, project_id, config.strategy)
            t.log("score", None, **told, models=list(config.reward_model), strategy=config.strategy)
    finally:
        store.close()
    return told


def _judge(config: LabelScoreConfig, source: str) -> Judge:
    return load_judge(
        source,
        device=config.device,
        dtype=config.dtype,
        weights=config.weights,
        max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens,
    )


def _text(stored: Any) -> Text:
    if isinstance(stored, str):
        return stored
    return tuple(Message(message["role"], message["content"]) for message in stored)


def _one_turn(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise UserError("an answer of several turns cannot be scored; import one turn an answer")
    return str(completion[0]["content"])
