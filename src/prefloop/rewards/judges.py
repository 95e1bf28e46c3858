"""Judges give every (prompt, answer) a score: a Python function, a reward model, or an LLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from prefloop.config.endpoint import EndpointConfig
from prefloop.config.ranges import DType, Weights, is_endpoint, is_function
from prefloop.errors import UserError
from prefloop.records import Prompt, Text
from prefloop.rewards.functions import Columns, function_judge
from prefloop.rewards.llm import rubric_judge


class Judge(Protocol):
    """Gives each prompt with its answer one finite score; higher is better."""

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
        columns: Columns | None = None,
    ) -> list[float]:
        """`ended` is false of answers that were cut, which have no stop token; all end without.

        `columns` are the other columns of each answer's row, for functions that name them.
        """
        ...

    def require(self, rows: Iterable[Prompt]) -> None:
        """Before the work: UserError at the first row whose answers it could not score."""
        ...


def load_judge(
    source: str,
    *,
    device: str = "auto",
    dtype: DType = "float32",
    weights: Weights = "auto",
    max_length: int = 1024,
    micro_batch_tokens: int = 8192,
    template_args: Mapping[str, Any] | None = None,
    endpoint: EndpointConfig | None = None,
) -> Judge:
    """The judge that `source` names: `module:function`, a reward model's folder or hub id, or
    `openai:MODEL@URL`, which is asked by its rubric as `endpoint` says.

    A reward model's chat template is given those of the `template_args` that it reads.
    """
    if is_function(source):
        return function_judge(source)
    if is_endpoint(source):
        if endpoint is None:
            raise UserError(
                f"{source}: give a reward model or module:function; no LLM is asked here"
            )
        return rubric_judge(source, endpoint)
    from prefloop.models.load import load_reward_model, pick_device
    from prefloop.models.weights import Storage
    from prefloop.rewards.scorers import ModelJudge, with_template_args

    model = load_reward_model(source, pick_device(device), Storage(dtype, weights))
    model = with_template_args(model, template_args or {})
    return ModelJudge(model, micro_batch_tokens, max_length)


def require_read(template_args: Mapping[str, Any], judges: Sequence[str]) -> None:
    """Where judges alone take `template_args`: UserError for one that no judge's template reads."""
    if not template_args:
        return
    from prefloop.models.load import load_tokenizer, unread_arguments

    local = [source for source in judges if not (is_function(source) or is_endpoint(source))]
    models = [load_tokenizer(source) for source in local]
    for name in template_args:
        if all(name in unread_arguments(model, template_args) for model in models):
            raise UserError(
                f"--template-args: no chat template of {', '.join(judges)} reads `{name}`; leave "
                "it out"
            )
