"""One generation in the background, while what it will be learnt by trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Thread

from prefloop.generation.protocol import Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel


class Ahead:
    """A RolloutEngine around one that samples elsewhere: what else is asked of it waits."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._pending: tuple[int, Future[list[list[Sample]]]] | None = None

    def start(self, turn: int, ask: Callable[[RolloutEngine], list[list[Sample]]]) -> None:
        """Begins to sample what `take(turn)` will give, from the weights that the engine has."""
        assert self._pending is None
        future: Future[list[list[Sample]]] = Future()

        def run() -> None:
            try:
                future.set_result(ask(self.engine))
            except BaseException as error:  # told to whoever takes it
                future.set_exception(error)

        self._pending = turn, future
        Thread(target=run, daemon=True).start()  # Ctrl-C does not wait for it

    def take(self, turn: int) -> list[list[Sample]] | None:
        """What was begun for this turn, once it is there; None where nothing was."""
        if self._pending is None or self._pending[0] != turn:
            return None
        _, samples = self._pending
        self._pending = None
        return samples.result()

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
        if self._pending is not None:
            wait([self._pending[1]])
