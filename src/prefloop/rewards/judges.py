"""Judges give every (prompt, answer) a score: a Python function, or a reward model's folder."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prefloop.errors import UserError, first_line
from prefloop.records import Message, Sampled, Text, text_to_json

if TYPE_CHECKING:
    from prefloop.models.model import LoadedModel

LARGEST = 1e30  # scores are float32
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Judge(Protocol):
    """Gives each prompt with its answer one finite score; higher is better."""

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[float]:
        """`ended` is false of answers that were cut, which have no stop token; all end without."""
        ...


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
    return model_judge(model, dtype, micro_batch_tokens, max_length)


def function_judge(source: str) -> Judge:
    """`module:function(prompts, completions) -> list[float]`, its answers checked.

    A prompt is a string, or a list of {"role", "content"}. The module is looked up as Python does,
    and in the working directory.
    """
    module_name, function_name = source.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{source}: cannot import it ({type(error).__name__}: {first_line(error)}); give "
            "module:function, with the module installed or in the working directory"
        ) from error

    def judge(
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[float]:
        asked = [text_to_json(prompt) for prompt in prompts]
        try:
            scores = [float(score) for score in function(asked, list(completions))]
        except (Exception, SystemExit) as error:
            raise UserError(f"{source} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(completions):
            raise UserError(
                f"{source} gave {len(scores)} scores for {len(completions)} answers; "
                "it must give one each"
            )
        if bad := [i for i, score in enumerate(scores) if not abs(score) <= LARGEST]:
            raise UserError(
                f"{source} gave {scores[bad[0]]} for the answer {completions[bad[0]][:80]!r}; "
                f"scores must be finite, and below {LARGEST:g} in size"
            )
        return scores

    return judge


def model_judge(
    model: LoadedModel, dtype: str, micro_batch_tokens: int, max_length: int | None = None
) -> Judge:
    """A reward model as judge, with its own tokenizer."""
    import torch

    from prefloop.data.batches import micro_batches, pack
    from prefloop.data.encoder import Encoder
    from prefloop.data.tokenize import Example, encode_sampled
    from prefloop.models.heads import answer_scores
    from prefloop.models.precision import autocast

    encoder = Encoder(model.tokenizer)

    def encode(prompt: Text, completion: str, ended: bool, index: int) -> Example:
        head = tuple(encoder.prompt(prompt))
        said = completion if isinstance(prompt, str) else (Message("assistant", completion),)
        answer = encode_sampled(encoder, prompt, said, Sampled(ended))
        if max_length is not None and len(head) + len(answer) > max_length:
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

    def judge(
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[float]:
        ends = [True] * len(completions) if ended is None else ended
        rows = enumerate(zip(prompts, completions, ends, strict=True))
        examples = [encode(prompt, completion, end, i) for i, (prompt, completion, end) in rows]
        scores: list[float] = []
        with torch.no_grad(), autocast(model.device, dtype):
            for group in micro_batches(examples, micro_batch_tokens, not model.packed):
                scores += answer_scores(model, pack(group).to(model.device)).tolist()
        return scores

    return judge
