"""llama.cpp's side of generation, in a venv of its own: its batched C API, driven step by step.

All answers are written at once; one that ended leaves the batch. FORM is `sampled`, from the whole
distribution as all sides do, or `greedy`, which draws faster.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.meter import serve
from benchmarks.work import WORKS, Work

Token = tuple[int, int, int, bool]  # id, position, sequence, whether its logits are wanted


class Engine:
    """A context with room for all answers."""

    def __init__(self, path: str, sequences: int, longest: int, most: int, greedy: bool) -> None:
        """`longest` tokens a sequence, `most` tokens in a call."""
        import llama_cpp as c  # in its own venv only

        self.c: Any = c
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = sequences * (-(-longest // 256) * 256)
        settings.n_batch = most
        settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        self.context = c.llama_init_from_model(self.model, settings)
        assert self.context, "llama.cpp made no context"
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(most, 0, 1)
        self.sampler = c.llama_sampler_init_greedy() if greedy else c.llama_sampler_init_dist(0)

    def read(self, tokens: Sequence[Token]) -> None:
        """Runs the model on tokens."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert self.c.llama_decode(self.context, batch) == 0

    def draw(self, place: int) -> int:
        """A token from the logits of the last call's token at `place`."""
        return int(self.c.llama_sampler_sample(self.sampler, self.context, place))

    def log_prob(self, tokens: Sequence[int]) -> float:
        """Mean log-prob of a text's tokens after its first: shows that the weights are the same."""
        self.read([(t, i, 0, True) for i, t in enumerate(tokens)])
        total = 0.0
        for i, target in enumerate(tokens[1:]):
            row = self.c.llama_get_logits_ith(self.context, i)
            scores = np.ctypeslib.as_array(row, (self.vocabulary,)).astype(np.float64)
            top = float(scores.max())
            total += float(scores[target]) - top - float(np.log(np.exp(scores - top).sum()))
        self.clear()
        return total / (len(tokens) - 1)

    def clear(self) -> None:
        """Forgets all sequences."""
        self.c.llama_memory_clear(self.memory, True)

    def share(self, source: int, target: int) -> None:
        """Gives one sequence the tokens of another."""
        self.c.llama_memory_seq_cp(self.memory, source, target, -1, -1)


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Load, then take turns; prompts come as token ids beside the rows."""
    work = WORKS[name]
    ids = json.loads(Path(path).with_suffix(".ids").read_text(encoding="utf-8"))
    prompts, stops = ids["prompts"], frozenset(ids["stops"])
    longest = max(map(len, prompts)) + work.answer[1]
    most = sum(map(len, prompts)) + work.rows * work.answers
    engine = Engine(
        f"{models}/policy-{dtype}.gguf",
        work.rows * work.answers,
        longest,
        most,
        form == "greedy",
    )
    same = {"prompt_log_prob": engine.log_prob(prompts[0])}
    serve(lambda: {"tokens": generate(engine, work, prompts, stops), "same": same})


def generate(
    engine: Any, work: Work, prompts: Sequence[Sequence[int]], stops: frozenset[int]
) -> int:
    """Answers to all prompts, each prompt computed once; returns their tokens."""
    engine.clear()
    count, k = 0, work.answers
    tokens = [
        (token, i, number * k, i == len(prompt) - 1)
        for number, prompt in enumerate(prompts)
        for i, token in enumerate(prompt)
    ]
    engine.read(tokens)
    lasts = [place for place, token in enumerate(tokens) if token[3]]
    active: list[tuple[int, int, int]] = []  # token, its position, sequence
    for number, place in enumerate(lasts):
        for sequence in range(number * k, (number + 1) * k):
            if sequence > number * k:
                engine.share(number * k, sequence)
            active.append((engine.draw(place), len(prompts[number]), sequence))
    for _ in range(work.answer[1] - 1):
        count += len(active)
        active = [a for a in active if a[0] not in stops]
        if not active:
            return count
        engine.read([(*a, True) for a in active])
        active = [(engine.draw(i), a[1] + 1, a[2]) for i, a in enumerate(active)]
    return count + len(active)


if __name__ == "__main__":
    main(*sys.argv[1:])
