"""One generation in the background, while what it will be learnt by trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple
from threading import Thread
from typing import Any, NamedTuple

from prefloop import distributed
from prefloop.errors import UserError
from prefloop.generation.protocol import Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel

Groups = list[list[Sample]]
Kept = tuple[int, list[list[tuple[Any, ...]]]]


class Begun(NamedTuple):
    """What a rank samples for a later turn: answers to every so many-th of all ranks' prompts."""

    turn: int
    groups: Future[Groups]

    def kept(self, wait: bool) -> Kept:
        """For a checkpoint: all ranks' answers; all ranks call it. UserError where they are not
        there yet and it should not wait.
        """
        if not (wait or self.groups.done()):
            raise UserError("answers are still being sampled")
        everyone = distributed.interleaved(self.groups.result())
        return self.turn, [[astuple(sample)[1:] for sample in group] for group in everyone]

    @classmethod
    def again(cls, kept: Kept) -> Begun:
        """This rank's of what `kept` gave, on any number of ranks."""
        turn, everyone = kept
        own = enumerate(distributed.dealt(everyone))
        groups: Future[Groups] = Future()
        groups.set_result([[Sample(index, *rest) for rest in group] for index, group in own])
        return cls(turn, groups)


class Ahead:
    """A RolloutEngine around one that samples elsewhere: what else is asked of it waits."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.begun: Begun | None = None

    def start(self, turn: int, ask: Callable[[RolloutEngine], Groups]) -> None:
        """Begins to sample what `take(turn)` will give, from the weights that the engine has."""
        assert self.begun is None
        future: Future[Groups] = Future()

        def run() -> None:
            try:
                future.set_result(ask(self.engine))
            except BaseException as error:  # told to whoever takes it
                future.set_exception(error)

        self.begun = Begun(turn, future)
        Thread(target=run, daemon=True).start()  # Ctrl-C does not wait for it

    def take(self, turn: int) -> Groups | None:
        """What was begun for this turn, once it is there; None where nothing was."""
        begun = self.begun
        if begun is None or begun.turn != turn:
            return None
        self.begun = None
        return begun.groups.result()

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine."""
        self._wait()
        return self.engine.generate(prompts, n, sampling, seed, numbers, on_done)

    def sync(self, model: LoadedModel, version: int) -> None:
        """See RolloutEngine."""
        self._wait()
        self.engine.sync(model, version)

    def _wait(self) -> None:
        if self.begun is not None:
            wait([self.begun.groups])
