"""The verdict by people: sentences first, then the numbers behind them, for terminal and page."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from prefloop.evaluation.people import PeopleVerdict, Preference, people
from prefloop.intervals import Interval, complement
from prefloop.terminal import as_is


def terminal(verdict: PeopleVerdict) -> Group:
    """Everything that a user must see, in the order of need."""
    parts = [as_is(line) for line in (*verdict.sentences, *verdict.notes)]
    tables = (_matrix(verdict), _pairs(verdict))
    return Group(*parts, *tables, *map(as_is, told(verdict)))


def title(verdict: PeopleVerdict) -> str:
    """How much was judged, by how many."""
    return (
        f"{verdict.judgements:,} judgements of {verdict.prompts:,} prompts by "
        f"{people(verdict.labellers)}"
    )


def matrix_heads(verdict: PeopleVerdict) -> list[str]:
    """Of `matrix`."""
    return ["Preferred", *(f"to {way}" for way in verdict.ways), "Strength"]


def matrix(verdict: PeopleVerdict) -> list[list[str]]:
    """A row a way: its name, its win rate against each way, and its strength."""
    rates: dict[tuple[str, str], Interval] = {}
    for pair in verdict.pairs:
        rate = pair.win_rate
        rates[pair.first, pair.second] = rate
        rates[pair.second, pair.first] = complement(rate)
    strength = {one.way: one.value for one in verdict.strengths}
    return [
        [
            way,
            *(_cell(rates.get((way, other))) for other in verdict.ways),
            "0" if way == verdict.ways[0] else _cell(strength[way]),
        ]
        for way in verdict.ways
    ]


def _cell(value: Interval | None) -> str:
    return "–" if value is None else str(value)


def _matrix(verdict: PeopleVerdict) -> Table:
    table = Table(title=as_is(title(verdict)), box=SIMPLE)
    for head in matrix_heads(verdict):
        table.add_column(as_is(head), overflow="fold")
    for row in matrix(verdict):
        table.add_row(*(as_is(cell.replace(" [", "\n[")) for cell in row))
    return table


PAIR_HEADS = (
    "Pair",
    "Won – tied – lost",
    "Win rate",
    "At equal length",
    "Judge's",
    "RM's",
    "p (Holm)",
    "More needed",
    "Same text",
)


def pair_row(pair: Preference) -> list[str]:
    """One pair of ways, by `PAIR_HEADS`; judge and reward model in the same judgements."""
    return [
        f"{pair.first} : {pair.second}",
        f"{pair.wins} – {pair.ties} – {pair.losses}",
        f"{pair.win_rate.mean:.2f}",
        str(pair.length_controlled),
        *("–" if rate is None else f"{rate:.2f}" for rate in (pair.judge, pair.reward_model)),
        "< 0.001" if pair.p_holm < 0.001 else f"{pair.p_holm:.3f}",
        "no number" if pair.more is None else f"{pair.more:,}",
        f"{pair.same_text:.0%}",
    ]


def _pairs(verdict: PeopleVerdict) -> Table:
    table = Table(box=SIMPLE)
    for head in PAIR_HEADS:
        table.add_column(head, overflow="fold")
    for pair in verdict.pairs:
        table.add_row(*map(as_is, pair_row(pair)))
    return table


def told(verdict: PeopleVerdict) -> list[str]:
    """What was flagged, and what is not counted."""
    lines = []
    for way, found in verdict.flags.items():
        counted = ", ".join(f"{flag} {count}" for flag, count in sorted(found.items()))
        lines.append(f"Flagged, {way or 'whole tasks'}: {counted}")
    if verdict.all_bad:
        lines.append(f"All bad: said of {verdict.all_bad} tasks")
    return lines + [f"Not counted: {why} {count}" for why, count in verdict.left_out.items()]
