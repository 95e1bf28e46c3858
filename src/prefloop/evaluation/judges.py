"""Judges give every (prompt, answer) a score: a Python function, or a reward model's folder."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.config import UserError
from prefloop.records import Text

if TYPE_CHECKING:
    from prefloop.models.load import LoadedModel

Judge = Callable[[Sequence[Text], Sequence[str]], list[float]]
"""One finite score for each prompt with its answer; higher is better."""
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_judge(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    max_length: int = 1024,
    micro_batch_tokens: int = 8192,
) -> Judge:
    """The judge that `source` names: `module:function`, or a reward model's folder or hub id."""
    if FUNCTION.fullmatch(source) and not Path(source).exists():
        return function_judge(source)
    from prefloop.models.load import load_reward_model, pick_device

    model = load_reward_model(source, pick_device(device))
    return model_judge(model, dtype, max_length, micro_batch_tokens)


def function_judge(source: str) -> Judge:
    """`module:function(prompts, completions) -> list[float]`, its answers checked.

    The module is looked up as Python does, and in the working directory.
    """
    module_name, function_name = source.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{source}: cannot import it ({error}); give module:function, with the module "
            "installed or in the working directory"
        ) from error

    def judge(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in function(list(prompts), list(completions))]
        except Exception as error:
            raise UserError(f"{source} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(completions):
            raise UserError(
                f"{source} gave {len(scores)} scores for {len(completions)} answers; "
                "it must give one each"
            )
        if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
            raise UserError(
                f"{source} gave {scores[bad[0]]} for the answer {completions[bad[0]][:80]!r}; "
                "scores must be finite"
            )
        return scores

    return judge


def model_judge(model: LoadedModel, dtype: str, max_length: int, micro_batch_tokens: int) -> Judge:
    """A reward model as judge: its own tokenizer, its scores around its training mean."""
    import torch

    from prefloop.data.batches import micro_batches, pack
    from prefloop.data.tokenize import Example, encode_answer, encode_prompt
    from prefloop.models.heads import answer_scores
    from prefloop.models.precision import autocast

    def encode(prompt: Text, completion: str, index: int) -> Example:
        head = tuple(encode_prompt(model.tokenizer, prompt))
        answer = tuple(encode_answer(model.tokenizer, prompt, completion))
        if len(head) + len(answer) > max_length:
            raise UserError(
                f"{model.source}: answer {index} with its prompt has {len(head) + len(answer)} "
                f"tokens, more than --max-length {max_length}; raise it"
            )
        return Example(
            prompt=head,
            answers=(answer,),
            answer_masks=((True,) * len(answer),),
            index=index,
            where=f"answer {index}",
        )

    mean = float(getattr(model.hf.config, "reward_mean", 0.0))  # of its training answers

    def judge(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        pairs = enumerate(zip(prompts, completions, strict=True))
        examples = [encode(prompt, completion, i) for i, (prompt, completion) in pairs]
        scores: list[float] = []
        with torch.no_grad(), autocast(model.device, dtype):
            for group in micro_batches(examples, micro_batch_tokens):
                scores += answer_scores(model, pack(group).to(model.device)).tolist()
        return [score - mean for score in scores]

    return judge
