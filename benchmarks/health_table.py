"""`python -m benchmarks.health_table --runs FOLDER`: the tables of docs/health.md, from the runs of
`benchmarks.health_runs`; all numbers go to FOLDER/health.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import health_rules as h
from benchmarks.health_scores import score_all
from prefloop.rewards import health

WORTH = 0.1
"""A threshold is changed where the half that chooses gains so much of `youden`, and the other half
does not lose; but not those of STEPS."""
STEPS = (health.CLIPPING, health.RATIO)
"""Rules that read the optimiser's steps: they know the runs at the higher rate, which turn more."""


def main() -> None:
    """Scores what is not scored, counts, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health_table", description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    folder = parser.parse_args().runs
    score_all(folder)
    found: dict[str, Any] = {}
    for gold in ("gold", "plain"):
        courses = h.read(folder, plain=gold == "plain")
        print(f"\n## {gold}: {len(courses)} runs, {sum(c.turned for c in courses)} turned\n")
        found[gold] = told(courses)
    seconds = [
        json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"]
        for path in folder.rglob("cpu.json")
    ]
    found["cpu_seconds"] = {"runs": len(seconds), "all": sum(seconds)}
    print(f"\n{sum(seconds):,.0f} CPU seconds in {len(seconds)} runs")
    (folder / "health.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def told(courses: Sequence[h.Course]) -> dict[str, Any]:
    """Everything about one gold."""
    return {
        "runs": by_way(courses),
        "rules": rules(courses),
        "thresholds": thresholds(courses),
        "keep best": best(courses),
        "forecasts": forecasts(courses),
    }


def row(*cells: object) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |")


def heads(*cells: str) -> None:
    """The first two."""
    row(*cells)
    row(*["---"] * len(cells))


def share(of: Sequence[float]) -> str:
    """A share with its interval."""
    return "{:.0%} [{:.0%}, {:.0%}]".format(*of) if of else "–"


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def by_way(courses: Sequence[h.Course]) -> list[dict[str, Any]]:
    """What the runs did."""
    heads(
        "task",
        "KL penalty",
        "runs",
        "turned",
        "KL at the peak",
        "KL at the end",
        "gold: start, peak, end",
    )
    found = []
    for task, way in dict.fromkeys((c.task, c.way) for c in courses):
        some = [c for c in courses if (c.task, c.way) == (task, way)]
        ends = [np.mean([c.means[i] for c in some]) for i in (0, -1)]
        kl = [
            median(c.kl[i] for c, i in zip(some, at, strict=True)) for at in _peaks_and_ends(some)
        ]
        gold = [float(ends[0]), float(np.mean([c.means[c.peak] for c in some])), float(ends[1])]
        turned = sum(c.turned for c in some)
        shown = ", ".join(f"{x:.2f}" for x in gold)
        row(task, way, len(some), turned, number(kl[0]), number(kl[1]), shown)
        facts = {"task": task, "way": way, "runs": len(some), "turned": turned}
        found.append(facts | {"peak kl": kl[0], "end kl": kl[1], "gold": gold})
    print()
    return found


def _peaks_and_ends(courses: Sequence[h.Course]) -> tuple[list[int], list[int]]:
    return [c.peak for c in courses], [-1 for _ in courses]


def rules(courses: Sequence[h.Course]) -> dict[str, Any]:
    """Each rule with its own threshold, and all of them."""
    heads("rule", "before the peak", "in time", "late", "missed", "hits (95 %)", "false", "(95 %)",
          "lead, steps", "lead, nats", "gold if stopped")  # fmt: skip
    alarms: dict[str, h.Alarm] = {
        "never stopped": lambda course: None,
        "any": h.earliest(h.RULES),
        "any but KL": h.earliest([rule for rule in h.RULES if rule is not health.KL]),
    }
    alarms |= {rule.name: h.earliest([rule]) for rule in h.RULES}
    found = {}
    for name, alarm in alarms.items():
        one = found[name] = h.counted(courses, alarm)
        cells = [one[word] for word in ("before", "in time", "late", "missed")]
        row(name, *cells, share(one["hit rate"]), f"{one['false']} of {one['not turned']}",
            share(one["false rate"]), number(one["lead, steps"], 0), number(one["lead, nats"]),
            number(one["gold"], 2))  # fmt: skip
    print()
    return found


def thresholds(courses: Sequence[h.Course]) -> list[dict[str, Any]]:
    """Chosen on one half, and what they do on the other."""
    old = [c for c in courses if c.chosen_by_half]
    new = [c for c in courses if not c.chosen_by_half]
    heads("rule", "now", "chosen", "J now, choosing half", "J chosen",
          "J now, other half", "J chosen", "hits, false: now → chosen", "changed")  # fmt: skip
    found = []
    for rule in h.RULES:
        limit, _ = h.better_limit(old, rule)

        def own(course: h.Course, rule: health.Rule = rule) -> int | None:
            return h.first(course, rule)

        def chosen(course: h.Course, rule: health.Rule = rule, limit: float = limit) -> int | None:
            return h.first(course, rule, limit)

        worth = [h.youden(half, alarm) for half in (old, new) for alarm in (own, chosen)]
        counts = [h.counted(new, alarm) for alarm in (own, chosen)]
        shown = [
            f"{c['before'] + c['in time']}/{c['turned']}, {c['false']}/{c['not turned']}"
            for c in counts
        ]
        change = worth[1] - worth[0] >= WORTH and worth[3] >= worth[2] and rule not in STEPS
        row(
            rule.name,
            f"{rule.limit:g}",
            f"{limit:g}",
            *(f"{w:.2f}" for w in worth),
            " → ".join(shown),
            "yes" if change else "no",
        )
        found.append(
            {
                "rule": rule.name,
                "now": rule.limit,
                "chosen": limit,
                "youden": worth,
                "change": change,
            }
        )
    print()
    return found


def best(courses: Sequence[h.Course]) -> dict[str, Any]:
    """`--keep-best` by each monitor."""
    found = {}
    heads("task", "monitor", "turned after a rise", "gold kept, of the peak (95 %)", "within 5 %",
          "the end's, of the peak")  # fmt: skip
    tasks = dict.fromkeys(c.task for c in courses)
    for task, of in [*((task, [task]) for task in tasks), ("both", list(tasks))]:
        some = [c for c in courses if c.task in of]
        for monitor in some[0].monitors:
            one = found[f"{task}, {monitor}"] = h.keeping(some, monitor)
            if not one["runs"]:
                continue
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*one["of the peak"])
            within = f"{one['within 5 %'][0]}: {share(one['within 5 %'][1:])}"
            runs = f"{one['runs']} of {one['turned']}"
            row(task, monitor, runs, ratio, within, number(one["the end's"], 2))
    print()
    return found


def forecasts(courses: Sequence[h.Course]) -> dict[str, Any]:
    """KL of the turn."""
    told = h.turns(courses)
    heads("forecast", "runs", "none", "off by a factor of (median)", "within a factor of 2")
    for name, one in told.items():
        within = one["within a factor of 2"]
        row(
            name,
            one["runs"],
            one["none"],
            number(one["median factor"], 2),
            f"{within[0]}: {share(within[1:])}",
        )
    print()
    return told


if __name__ == "__main__":
    main()
