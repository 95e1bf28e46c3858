"""Numbers of a comparison, from what its ways answered and how that was judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefloop.evaluation.calibration import RewardCalibration, beside_judge
from prefloop.evaluation.comparison import RunRecord, Way, read_run
from prefloop.evaluation.frontier import best_of_n, best_of_n_kl
from prefloop.evaluation.pairs import Scored, mean_of_runs, win_rate_of_runs
from prefloop.intervals import Interval
from prefloop.rewards.health import Vitals, distinct_n, repeated_share, signs


@dataclass(frozen=True)
class Judged:
    """A model's answer to a prompt, judged."""

    text: str
    tokens: tuple[int, ...]  # with the stop token that ended it
    copied: float  # see copied_share
    truncated: bool
    kl: float  # log pi(y|x) - log pi_sft(y|x), nats
    gold: float | None  # None where an LLM gave no score
    proxy: float | None


ByPrompt = list[list[Judged]]
"""By prompt, then by sample."""


@dataclass(frozen=True)
class Answered:
    """What a way answered: each of its runs on the same prompts."""

    name: str
    paths: tuple[str, ...]  # of the runs' models; none of best-of-n
    runs: tuple[ByPrompt, ...]
    seconds: float  # CPU seconds an answer
    n: int = 1  # of best-of-n


def judged_prompts(ways: Sequence[Answered]) -> list[int]:
    """Prompts of which every run of every way has an answer that got a score.

    The others are left out of all that the judge says, for all ways: so pairs stay pairs.
    """
    runs = [run for way in ways for run in way.runs]
    return [
        prompt
        for prompt in range(len(runs[0]))
        if all(any(answer.gold is not None for answer in run[prompt]) for run in runs)
    ]


def scored(way: Answered, prompts: Sequence[int]) -> Scored:
    """Scores and lengths of a way's answers to some prompts, without answers that got no score."""
    rows = [
        [[(a.gold, len(a.tokens)) for a in run[prompt] if a.gold is not None] for prompt in prompts]
        for run in way.runs
    ]
    return Scored(
        way.name,
        [[[gold for gold, _ in row] for row in run] for run in rows],
        [[[float(length) for _, length in row] for row in run] for run in rows],
    )


def measured(
    way: Answered, baseline: Answered, sft: Vitals | None, prompts: Sequence[int], seed: int
) -> Way:
    """A way in numbers; `sft` is None for SFT itself, `prompts` those that were judged for all."""
    own, against = scored(way, prompts), scored(baseline, prompts)
    vitals = _vitals(way, own, seed)
    records = [read_run(Path(path)) for path in way.paths]
    several = len(way.runs) > 1
    single = [
        replace(way, paths=(path,), runs=(run,))
        for path, run in zip(way.paths, way.runs, strict=several)
    ]
    return Way(
        name=way.name,
        vitals=vitals,
        win_rate=win_rate_of_runs(own, against) if sft else None,
        kl_is_bound=way.n > 1,
        signs=tuple(signs(vitals, sft)) if sft else (),
        cpu_seconds_per_answer=way.seconds,
        run=records[0] if records else None,
        runs=tuple(measured(one, baseline, sft, prompts, seed) for one in single if several),
    )


def _vitals(way: Answered, own: Scored, seed: int) -> Vitals:
    flat = [answer for run in way.runs for row in run for answer in row]
    proxy = [[[a.proxy for a in row if a.proxy is not None] for row in run] for run in way.runs]
    bound = best_of_n_kl(way.n)  # best-of-n's KL cannot be estimated from its answers
    kl = mean_of_runs([[[answer.kl for answer in row] for row in run] for run in way.runs], seed)
    return Vitals(
        gold=mean_of_runs(own.scores, seed),
        proxy=mean_of_runs(proxy, seed) if all(row for run in proxy for row in run) else None,
        kl=Interval(bound, bound, bound) if way.n > 1 else kl,
        length=_mean(len(answer.tokens) for answer in flat),
        truncated=_mean(answer.truncated for answer in flat),
        distinct_2=_mean(distinct_n([row[0].tokens for row in run]) for run in way.runs),
        repeated=_mean(repeated_share(answer.tokens) for answer in flat),
        copied=_mean(answer.copied for answer in flat),
    )


def calibration_of(
    ways: Sequence[Answered], run: RunRecord | None, agreement: float | None
) -> RewardCalibration | None:
    """The reward model beside the judge, on all scored answers but those that it chose itself."""
    runs = [run for way in ways if way.n == 1 for run in way.runs]
    by_prompt = [
        [(a.gold, a.proxy, len(a.tokens)) for run in runs for a in run[prompt]]
        for prompt in range(len(runs[0]))
    ]
    known = [
        [
            (gold, proxy, length)
            for gold, proxy, length in row
            if gold is not None and proxy is not None
        ]
        for row in by_prompt
    ]
    held_out = run.metrics.get("eval/accuracy") if run else None
    return beside_judge(
        [[gold for gold, _, _ in row] for row in known],
        [[proxy for _, proxy, _ in row] for row in known],
        [[length for _, _, length in row] for row in known],
        held_out[1][-1] if held_out else None,
        agreement,
    )


def frontier(pool: ByPrompt, seed: int) -> tuple[tuple[int, float, float], ...]:
    """Best-of-n for each n up to the pool's: n, bound of the KL, judge's mean score.

    A prompt with an answer that got no score is left out.
    """
    whole = [row for row in pool if all(answer.gold is not None for answer in row)]
    if not whole:
        return ()
    gold = [[answer.gold or 0.0 for answer in row] for row in whole]
    proxy = [[answer.proxy or 0.0 for answer in row] for row in whole]
    sizes = range(1, len(whole[0]) + 1)
    return tuple((n, best_of_n_kl(n), best_of_n(gold, proxy, n, seed).mean) for n in sizes)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
