"""Python functions that score answers: one or several with weights, plain or async.

A function takes prompts and completions, and by keyword whatever else it names of the rows' columns
(`def score(prompts, completions, solution)`), or all of them (`**columns`); a list each.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.errors import UserError, first_line
from prefloop.records import Prompt, Text, text_to_json

LARGEST = 1e30  # scores are float32
Columns = Mapping[str, Sequence[object]]


def columns_of(rows: Sequence[Mapping[str, object]]) -> Columns:
    """Each column as a list with a value a row: None where a row lacks it.

    >>> columns_of([{"a": 1}, {"b": 2}])
    {'a': [1, None], 'b': [None, 2]}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


@dataclass(frozen=True)
class Function:
    """One reward function, and what its signature asks for."""

    source: str  # module:function
    call: Callable[..., Any]
    first: tuple[str, ...]  # the two arguments that take prompts and completions
    by_name: bool  # both are called so, in whatever order, or one is left out
    needed: tuple[str, ...]  # columns without a default
    known: frozenset[str] | None  # all columns that it can take; None: any

    def scores(
        self, prompts: Sequence[object], completions: Sequence[str], columns: Columns
    ) -> list[float]:
        """One finite score an answer."""
        taken = {
            name: list(values)
            for name, values in columns.items()
            if name not in self.first and (self.known is None or name in self.known)
        }
        both: list[Any] = [list(prompts), list(completions)]
        if self.by_name:
            taken |= {name: both[name == "completions"] for name in self.first}
            both = []
        try:
            scores = [float(score) for score in _awaited(self.call(*both, **taken))]
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.source} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(completions):
            raise UserError(
                f"{self.source} gave {len(scores)} scores for {len(completions)} answers; "
                "it must give one each"
            )
        if bad := [i for i, score in enumerate(scores) if not abs(score) <= LARGEST]:
            raise UserError(
                f"{self.source} gave {scores[bad[0]]} for the answer {completions[bad[0]][:80]!r}; "
                f"scores must be finite, and below {LARGEST:g} in size"
            )
        return scores


@dataclass(frozen=True)
class FunctionJudge:
    """A judge (see Judge) whose score is the weighted sum of its functions' scores."""

    functions: tuple[Function, ...]
    weights: tuple[float, ...]

    def parts(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: Columns | None = None
    ) -> dict[str, list[float]]:
        """Each function's own scores, by its name."""
        asked = [text_to_json(prompt) for prompt in prompts]
        scores = [f.scores(asked, completions, columns or {}) for f in self.functions]
        return dict(zip(self.names, scores, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """What each function is called in metrics: with its module where two share a name."""
        short = [f.source.partition(":")[2] for f in self.functions]
        if len(set(short)) == len(short):
            return tuple(short)
        return tuple(f.source for f in self.functions)

    def weighted(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """The sum of weight times score."""
        return [
            sum(w * score for w, score in zip(self.weights, row, strict=True))
            for row in zip(*parts.values(), strict=True)
        ]

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        ended: Sequence[bool] | None = None,
        columns: Columns | None = None,
    ) -> list[float]:
        """See Judge."""
        return self.weighted(self.parts(prompts, completions, columns))

    def require(self, rows: Iterable[Prompt]) -> None:
        """See Judge: each row must have the columns that a function needs."""
        for row in rows:
            for function in self.functions:
                for name in function.needed:
                    if name not in row.extra:
                        raise UserError(
                            f"{row.where}: no column `{name}`, which {function.source} has as an "
                            "argument; add it, or give the argument a default"
                        )


def function_judge(*sources: str, weights: Sequence[float] = ()) -> FunctionJudge:
    """The judge of one or several `module:function`, each weighing 1 where `weights` is empty."""
    functions = tuple(_function(source) for source in sources)
    return FunctionJudge(functions, tuple(weights) or (1.0,) * len(functions))


def _function(source: str) -> Function:
    """A function by its name, looked up as Python does and in the working directory."""
    module_name, function_name = source.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        call = getattr(importlib.import_module(module_name), function_name)
        parameters = list(inspect.signature(call).parameters.values())
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{source}: cannot import it ({type(error).__name__}: {first_line(error)}); give "
            "module:function, with the module installed or in the working directory"
        ) from error
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = "completions" in names
    first = tuple({"prompts", "completions"} & set(names)) if by_name else tuple(names[:2])
    if by_name and anything:
        first = ("prompts", "completions")
    others = [p for p in named if p.name not in first]
    return Function(
        source,
        call,
        first,
        by_name,
        tuple(p.name for p in others if p.default is p.empty),
        None if anything else frozenset(p.name for p in others),
    )


def source_of(source: str) -> Path | None:
    """The file of a function's module, once it is imported; None where it has none."""
    file = getattr(sys.modules.get(source.partition(":")[0]), "__file__", None)
    return Path(file) if file else None


def _awaited(result: Any) -> Any:
    """What an async function comes to; a notebook's running loop is left alone."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()
