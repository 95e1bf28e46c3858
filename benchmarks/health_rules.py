"""Rules of health, `--keep-best` and forecasts, held against gold that none of them sees.

`python -m benchmarks.health_rules --runs FOLDER` reads the runs of `benchmarks.health_runs`, judges
their answers where that is not done, and tries every rule again at any threshold, from what the
runs have logged. The prompts kept for gold are halved: the even ones choose the peak, the odd ones
say how far gold fell from it, so that the highest of many noisy means is no fall by itself. A run
has turned where they fell by more than two standard errors (same prompts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.health import ERRORS, forecast_of, wilson
from prefloop.evaluation.overoptimisation import Floats
from prefloop.files import read_rows
from prefloop.rewards import health
from prefloop.rewards.health import Trend
from prefloop.training.watch import READ

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """A run: M measurements, and what each rule looked at."""

    name: str
    task: str
    way: str
    number: int  # of its label set
    steps: Sequence[int]  # [M]
    kl: Sequence[float]  # [M] nats an answer
    gold: Floats  # [M, prompts]
    monitors: Mapping[str, Floats]  # [M, prompts of the monitor]
    proxies: Sequence[float]  # [M] the training score at each measurement
    seen: Mapping[str, Sequence[tuple[int, float]]]  # by rule: step, how far it is
    kl_limit: float

    @property
    def chosen_by_half(self) -> bool:
        """Whether it is of the half that thresholds are chosen by."""
        return self.number % 4 < 2

    @property
    def peak(self) -> int:
        """Number of the measurement that the even prompts find best."""
        return int(self.gold[:, ::2].mean(axis=1).argmax())

    def below(self, number: int) -> float:
        """Standard errors by which the odd prompts lie below the peak at a measurement."""
        return health.fall(self.gold[number, 1::2].tolist(), self.gold[self.peak, 1::2].tolist())

    @property
    def turned(self) -> bool:
        """Whether it ends below its peak by more than chance."""
        return self.below(-1) > ERRORS

    @property
    def seen_at(self) -> int:
        """The measurement from which on gold itself shows that it has turned."""
        last = len(self.steps) - 1
        while last > self.peak + 1 and self.below(last - 1) > ERRORS:
            last -= 1
        return last

    @property
    def means(self) -> Floats:
        """[M] gold on the odd prompts."""
        return np.asarray(self.gold[:, 1::2].mean(axis=1))

    def at(self, step: int) -> int:
        """The last measurement up to a step."""
        return max(i for i, s in enumerate(self.steps) if s <= step)


def read(folder: Path, plain: bool = False) -> list[Course]:
    """All runs with scores; gold without its rule on repetition where that is asked."""
    courses = []
    for path in sorted(folder.rglob("scores.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        lines = [row for _, row in read_rows(path.parent / "metrics.jsonl")]
        monitors = {name: np.array(scores) for name, scores in told["monitors"].items()}
        target = 8.0 if told["way"] == "adaptive" else 0.0
        seen, proxies = replay(lines, monitors["neighbour"].tolist())
        course = Course(
            str(path.parent.relative_to(folder)),
            told["task"],
            told["way"],
            told["number"],
            told["steps"],
            told["kl"],
            np.array(told["plain" if plain else "gold"]),
            monitors,
            proxies,
            seen,
            max(health.KL.limit, 2 * target),
        )
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        fired = {sign["name"]: sign["step"] for sign in record.get("health", [])}
        again = {rule.name: step for rule in RULES if (step := first(course, rule)) is not None}
        if fired != again:
            raise SystemExit(f"{path.parent}: the run told of {fired}, its log gives {again}")
        courses.append(course)
    return courses


# --- the rules again -----------------------------------------------------------------------------


def replay(
    lines: Iterable[Mapping[str, Any]], scores: Sequence[Sequence[float]]
) -> tuple[dict[str, list[tuple[int, float]]], list[float]]:
    """By rule, what it looked at after each step; and the training score at each measurement.

    `lines` are those of metrics.jsonl, `scores` [M, prompts] the monitor's at each measurement.
    """
    trends: dict[str, Trend] = {}
    seen: dict[str, list[tuple[int, float]]] = {rule.name: [] for rule in RULES}
    start: dict[str, float] = {}
    best, best_reward, falls = 0, None, [0.0]
    proxies: list[float] = []
    for line in lines:
        found: dict[str, list[float]] = {}
        for name, word in health.WATCHED.items():
            if line.get(name) is not None:
                trends.setdefault(word, Trend()).add(line[name])
        known = {n: t for n, t in trends.items() if t.readings >= health.RECENT}
        if known:
            add(found, looked_at(_now(known, "now"), _now(known, "start")))
        if line.get("monitor/score") is not None:
            now = {n: line[f"monitor/{n}"] for n in READ}
            start = start or now
            add(found, looked_at(now, start))
            number, trend = len(proxies), trends.get("score")
            proxies.append(trend.now if trend else math.nan)
            if number and np.mean(scores[number]) <= np.mean(scores[best]):
                falls.append(health.fall(scores[number], scores[best]))
                assert trend is not None
                before = trend.first[0] if best_reward is None else best_reward
                rule = health.JUDGE if trend.now < before else health.GAMED
                add(found, {rule.name: min(falls[-health.IN_A_ROW :])})
            else:
                best, best_reward, falls = number, trend.now if trend else None, [0.0]
        for name, values in found.items():
            seen[name].append((line["step"], max(values) if RISES[name] else min(values)))
    return seen, proxies


RULES = (
    *(health.GAMED, health.JUDGE, health.KL, health.TRUNCATION, health.DISTINCT),
    *(health.REPETITION, health.COPYING, health.LENGTH),
    *(health.ENTROPY, health.CLIPPING, health.RATIO),
)
"""Those that can fire in these runs, which have no critic and rank nothing."""
RISES = {r.name: r not in (health.DISTINCT, health.ENTROPY) for r in RULES}
"""Whether a rule fires above its threshold, or below."""


def add(found: dict[str, list[float]], more: Numbers) -> None:
    """What a rule has looked at in the same step stands together."""
    for name, value in more.items():
        found.setdefault(name, []).append(value)


def _now(trends: Mapping[str, Trend], when: str) -> dict[str, float]:
    numbers = {name: getattr(trend, when) for name, trend in trends.items()}
    if "entropy" in numbers:
        numbers["entropy"] /= numbers["length"]
    return numbers


def looked_at(now: Numbers, start: Numbers) -> dict[str, float]:
    """By rule, what it compares with its threshold."""
    both = {name: (start[name], now[name]) for name in now if name in start}
    found = {health.KL.name: now["kl"]} if "kl" in now else {}
    for rule, name in health.SHARES:
        if name in both:
            found[rule.name] = both[name][1] - both[name][0]
    for rule, name in ((health.DISTINCT, "distinct_2"), (health.ENTROPY, "entropy")):
        if name in both:
            found[rule.name] = both[name][1] / both[name][0]
    if "length" in both:
        ratio = both["length"][1] / both["length"][0]
        found[health.LENGTH.name] = max(ratio, 1 / ratio)
    if "clipped" in now:
        found[health.CLIPPING.name] = now["clipped"]
    if "ratio" in now:
        found[health.RATIO.name] = abs(now["ratio"] - 1)
    return found


def first(course: Course, rule: health.Rule, limit: float | None = None) -> int | None:
    """The step at which a rule fires, with its own threshold or another."""
    if limit is None:
        limit = course.kl_limit if rule is health.KL else rule.limit
    for step, value in course.seen[rule.name]:
        if value > limit if RISES[rule.name] else value < limit:
            return step
    return None


# --- alarms --------------------------------------------------------------------------------------

Alarm = Callable[[Course], int | None]
"""The step of a run's first alarm."""


def earliest(rules: Sequence[health.Rule]) -> Alarm:
    """The first of several rules."""

    def alarm(course: Course) -> int | None:
        steps = [step for rule in rules if (step := first(course, rule)) is not None]
        return min(steps, default=None)

    return alarm


def counted(courses: Sequence[Course], alarm: Alarm) -> dict[str, Any]:
    """Alarms in runs that turned (up to the peak; up to where gold shows the turn, which is in
    time; later; none) and in the others (false); mean gold of all runs, each ended at its alarm.
    """
    turned = [(course, alarm(course)) for course in courses if course.turned]
    calm = [alarm(course) for course in courses if not course.turned]
    when = [_when(course, step) for course, step in turned]
    hits = sum(word in ("before", "in time") for word in when)
    false = sum(step is not None for step in calm)
    leads = [_lead(course, step) for course, step in turned if step is not None]
    return {
        "turned": len(turned),
        **{word: when.count(word) for word in ("before", "in time", "late", "missed")},
        "hit rate": wilson(hits, len(turned)),
        "not turned": len(calm),
        "false": false,
        "false rate": wilson(false, len(calm)),
        "lead, steps": median(lead[0] for lead in leads) if leads else None,
        "lead, nats": median(lead[1] for lead in leads) if leads else None,
        "gold": _stopped(courses, alarm),
    }


def youden(courses: Sequence[Course], alarm: Alarm) -> float:
    """Hits in time as a share of the runs that turned, less false alarms as one of the others."""
    told = counted(courses, alarm)
    hits = told["before"] + told["in time"]
    return float(hits / max(told["turned"], 1) - told["false"] / max(told["not turned"], 1))


def _when(course: Course, step: int | None) -> str:
    if step is None:
        return "missed"
    if step <= course.steps[course.peak]:
        return "before"
    return "in time" if step <= course.steps[course.seen_at] else "late"


def _lead(course: Course, step: int) -> tuple[int, float]:
    """Steps and nats from the alarm to the peak; below 0 where it comes later."""
    at = course.at(step)
    return course.steps[course.peak] - step, course.kl[course.peak] - course.kl[at]


def _stopped(courses: Sequence[Course], alarm: Alarm) -> float:
    """Mean gold of runs that end at their alarm, or else at their end."""
    ends = [(c, len(c.steps) - 1 if (s := alarm(c)) is None else c.at(s)) for c in courses]
    return float(np.mean([course.means[end] for course, end in ends]))


def better_limit(courses: Sequence[Course], rule: health.Rule) -> tuple[float, float]:
    """The threshold of highest `youden` among those that runs have reached, and that value.

    Of equal ones the nearest to the rule's own.
    """
    extreme = max if RISES[rule.name] else min
    reached = [extreme(v for _, v in c.seen[rule.name]) for c in courses if c.seen[rule.name]]
    tried = sorted({float(f"{value:.2g}") for value in reached})

    def worth(limit: float) -> tuple[float, float]:
        def alarm(course: Course) -> int | None:
            return first(course, rule, limit)

        return youden(courses, alarm), -abs(limit - rule.limit)

    best: float = max(tried, key=worth)
    return best, worth(best)[0]


# --- the best step, by a monitor -----------------------------------------------------------------


def kept(course: Course, monitor: str) -> int:
    """The measurement that `--keep-best` keeps: the first of the highest."""
    return int(course.monitors[monitor].mean(axis=1).argmax())


def keeping(courses: Sequence[Course], monitor: str, seed: int = 0) -> dict[str, Any]:
    """Of the runs that turned after a rise: gold of all steps that are kept over gold of all peaks,
    and how many runs are within 5 %.

    The ratio is of sums, for a single run's peak may be close to 0; its interval draws runs again.
    """
    turned = [c for c in courses if c.turned and c.below(0) > ERRORS]
    if not turned:
        return {"turned": sum(c.turned for c in courses), "runs": 0}
    golds = np.array([[c.means[i] for i in (kept(c, monitor), c.peak, -1)] for c in turned])
    draws = np.random.default_rng(seed).integers(0, len(golds), (2000, len(golds)))
    sums = golds[draws].sum(axis=1)  # [draws, 3]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    within = int((golds[:, 0] >= 0.95 * golds[:, 1]).sum())
    total = golds.sum(axis=0)
    return {
        "turned": sum(c.turned for c in courses),
        "runs": len(turned),
        "of the peak": [float(total[0] / total[1]), float(low), float(high)],
        "within 5 %": [within, *wilson(within, len(turned))],
        "the end's": float(total[2] / total[1]),
    }


# --- forecasts -----------------------------------------------------------------------------------


def turns(courses: Sequence[Course]) -> dict[str, Any]:
    """By which factor forecasts of the KL at the peak miss it, in the half that chose nothing.

    Each forecast sees a run up to EARLY nats only, or up to half the way in root KL. Nothing where
    one half has no run that turned.
    """
    able = [c for c in courses if c.turned and c.kl[c.peak] > EARLY]
    old = [c for c in able if c.chosen_by_half]
    new = [c for c in able if not c.chosen_by_half]
    if not old or not new:
        return {}
    middle = median(math.log(c.kl[c.peak]) for c in old)
    line = np.linalg.lstsq(
        np.array([early_features(c) for c in old]),
        np.log([c.kl[c.peak] for c in old]),
        rcond=None,
    )[0]

    def by_gao(scores: Callable[[Course], Floats]) -> Callable[[Course], float | None]:
        def forecast(course: Course) -> float | None:
            each = scores(course)
            errors = each.std(axis=1, ddof=1) / each.shape[1] ** 0.5
            found = forecast_of(course.kl, each.mean(axis=1), errors, course.peak)
            return None if found is None else math.log(found)

        return forecast

    ways: dict[str, Callable[[Course], float | None]] = {
        "median of the other half's turns": lambda c: middle,
        "line in slopes up to EARLY nats": lambda c: float(early_features(c) @ line),
        "Gao's form of gold, half the way": by_gao(lambda c: c.gold[:, ::2]),
        "Gao's form of the monitor, half the way": by_gao(lambda c: c.monitors["neighbour"]),
    }
    told = {}
    for name, forecast in ways.items():
        found = [(forecast(c), math.log(c.kl[c.peak])) for c in new]
        off = [abs(f - t) for f, t in found if f is not None]
        within = sum(o <= math.log(2) for o in off)
        told[name] = {
            "runs": len(new),
            "none": len(new) - len(off),
            "median factor": math.exp(median(off)) if off else None,
            "within a factor of 2": [within, *wilson(within, len(new))],
        }
    return told


EARLY = 4.0  # nats


def early_features(course: Course) -> Floats:
    """1, and slopes against root KL of the neighbour and the proxy, up to EARLY nats."""
    upto = max(2, next((i for i, kl in enumerate(course.kl) if kl > EARLY), len(course.kl)) + 1)
    roots = np.sqrt(np.maximum(course.kl[1:upto], 0.0))
    rise = course.monitors["neighbour"].mean(axis=1)
    unit = course.monitors["neighbour"][0].std()
    monitor = (rise[1:upto] - rise[0]) / unit
    proxy = np.array(course.proxies[1:upto]) - course.proxies[1]
    slopes = [float(y @ roots / (roots @ roots)) for y in (monitor, proxy)]
    return np.array([1.0, *slopes])
