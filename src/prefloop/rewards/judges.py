"""Judges give every (prompt, answer) a score: a Python function, or a reward model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from prefloop.config.ranges import DType, Weights, is_function
from prefloop.errors import UserError
from prefloop.records import Message, Sampled, Text
from prefloop.rewards.functions import Columns, function_judge

if TYPE_CHECKING:
    from prefloop.models.model import LoadedModel


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


def load_judge(
    source: str,
    *,
    device: str = "auto",
    dtype: DType = "float32",
    weights: Weights = "auto",
    max_length: int = 1024,
    micro_batch_tokens: int = 8192,
) -> Judge:
    """The judge that `source` names: `module:function`, or a reward model's folder or hub id."""
    if is_function(source):
        return function_judge(source)
    from prefloop.models.load import load_reward_model, pick_device
    from prefloop.models.weights import Storage

    model = load_reward_model(source, pick_device(device), Storage(dtype, weights))
    return model_judge(model, micro_batch_tokens, max_length)


def model_judge(
    model: LoadedModel, micro_batch_tokens: int, max_length: int | None = None
) -> Judge:
    """A reward model as judge, with its own tokenizer."""
    import torch

    from prefloop.data.batches import micro_batches, pack
    from prefloop.data.tokenize import Example, encode_answers
    from prefloop.models.heads import answer_scores

    def encode(prompt: Text, completion: str, ended: bool, index: int) -> Example:
        said = completion if isinstance(prompt, str) else (Message("assistant", completion),)
        head, (answer,) = encode_answers(model.encoder, prompt, [said], [Sampled(ended)])
        if not answer:  # it says nothing and did not end: the score is that of what there is
            head, answer = head[:-1], head[-1:]
        if max_length is not None and len(head) + len(answer) > max_length:
            raise UserError(
                f"{model.source}: answer {index} with its prompt has {len(head) + len(answer)} "
                f"tokens, more than --max-length {max_length}; raise it"
            )
        masks = ((True,) * len(answer),)
        example = Example(head, (answer,), masks, index=index, where=f"answer {index}")
        model.check_example(example)
        return example

    def judge(
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
        columns: Columns | None = None,
    ) -> list[float]:
        ends = [True] * len(completions) if ended is None else ended
        rows = enumerate(zip(prompts, completions, ends, strict=True))
        examples = [encode(prompt, completion, end, i) for i, (prompt, completion, end) in rows]
        scores: list[float] = []
        with torch.no_grad():
            for group in micro_batches(examples, micro_batch_tokens, not model.packed):
                scores += answer_scores(model, pack(group).to(model.device)).tolist()
        return scores

    return judge
