"""The page of a comparison: what was found, in figures and tables, and every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefloop.evaluation import figures
from prefloop.evaluation.answers import SIGNS, Row, browsable
from prefloop.evaluation.comparison import Comparison, RunRecord, WholeCost
from prefloop.evaluation.page import Numbered, embedded, render_page
from prefloop.evaluation.people_table import (
    PAIR_HEADS,
    matrix,
    matrix_heads,
    pair_row,
    title,
    told,
)
from prefloop.evaluation.run_facts import (
    PROVENANCE,
    differing_settings,
    provenance_row,
)
from prefloop.evaluation.sentences import in_words
from prefloop.evaluation.table import COST_HEADINGS, columns, cost_rows


def render(comparison: Comparison, answers: Sequence[Row]) -> str:
    """The whole page as HTML with nothing to load from elsewhere; `answers` are answers.jsonl's."""
    drawn = Numbered()
    runs = _runs(comparison)
    against_kl = drawn(figures.reward_against_kl(comparison))
    overoptimisation = drawn(figures.proxy_and_gold(comparison))
    calibration = drawn(figures.calibration(comparison))
    curves = drawn(figures.curves(figures.training_series(comparison)))
    fired = {sign.name: sign for way in comparison.ways for sign in way.signs}
    differing = differing_settings(runs)
    sections = [
        ("people", "What people prefer", comparison.people is not None),
        ("table", "Numbers", True),
        ("pairs", "Every two ways", bool(comparison.verdicts)),
        ("kl", "Reward against KL", True),
        ("overoptimisation", "Proxy against gold", bool(overoptimisation)),
        ("calibration", "Reward model", bool(calibration)),
        ("cost", "Cost", True),
        ("training", "Training", bool(curves)),
        ("answers", "Answers", True),
        ("settings", "Settings", True),
        ("provenance", "Provenance", bool(runs)),
    ]
    return render_page(
        "report.html",
        sections=[(name, title) for name, title, has in sections if has],
        comparison=comparison,
        colours=[f"var(--c{n % len(figures.COLOURS)})" for n in range(len(comparison.ways))],
        shapes=figures.shapes(comparison),
        columns=columns(comparison),
        signs_told=[sign for sign in fired.values() if sign.why],
        cost_headings=COST_HEADINGS,
        cost_rows=cost_rows(comparison),
        people=_people(comparison),
        matrix=_matrix(comparison),
        pairs=[
            [f"{v.first} – {v.second}", str(v.difference), in_words(v.p), in_words(v.p_holm)]
            for v in comparison.verdicts
        ],
        against_kl=against_kl,
        overoptimisation=overoptimisation,
        calibration=calibration,
        whole_costs=[
            [cost.way, f"{cost.total:,.0f}", _parts(cost)] for cost in comparison.whole_costs
        ],
        curves=curves,
        differing=differing,
        runs=list(runs),
        provenance_headings=PROVENANCE,
        provenance=[provenance_row(name, run) for name, run in runs.items()],
        answers=embedded(browsable(answers)),
        signs=list(enumerate(SIGNS)),
    )


def _runs(comparison: Comparison) -> dict[str, RunRecord]:
    """Every run by name; those of a way that has several are numbered."""
    found = {}
    for way in comparison.ways:
        for number, one in enumerate(way.runs, 1):
            if one.run:
                found[f"{way.name} {number}"] = one.run
        if way.run and not way.runs:
            found[way.name] = way.run
    if comparison.reward_run:
        found["Reward model"] = comparison.reward_run
    return found


def _matrix(comparison: Comparison) -> list[tuple[str, list[dict[str, object] | None]]]:
    """Each way's row of win rates against every other, and how strongly to colour it."""
    if not comparison.verdicts:
        return []
    names = [way.name for way in comparison.ways]
    pairs = {frozenset((v.first, v.second)): v for v in comparison.verdicts}
    rows: list[tuple[str, list[dict[str, object] | None]]] = []
    for name in names:
        cells: list[dict[str, object] | None] = []
        for other in names:
            verdict = pairs.get(frozenset((name, other)))
            if verdict is None:
                cells.append(None)
                continue
            wins = verdict.wins(name)
            tint = "var(--good)" if wins.mean > 0.5 else "var(--warn)"
            much = round(50 * abs(wins.mean - 0.5))
            equal = verdict.wins_at_equal_length(name)
            cells.append({"wins": wins, "equal": equal, "tint": tint, "much": much})
        rows.append((name, cells))
    return rows


def _parts(cost: WholeCost) -> str:
    return " + ".join(f"{name} {seconds:,.0f}" for name, seconds in cost.parts)


def _people(comparison: Comparison) -> dict[str, Any] | None:
    verdict = comparison.people
    if verdict is None:
        return None
    return {
        "sentences": [*verdict.sentences, *verdict.notes],
        "title": title(verdict),
        "headings": matrix_heads(verdict),
        "matrix": matrix(verdict),
        "pair_headings": PAIR_HEADS,
        "pairs": [pair_row(pair) for pair in verdict.pairs],
        "told": told(verdict),
    }
