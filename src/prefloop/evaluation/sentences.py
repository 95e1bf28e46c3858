"""What a comparison answers, in a sentence a way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prefloop.evaluation.comparison import PairVerdict, Way, WholeCost

LEVEL = 0.05  # of p-values by Holm


def sentences(
    ways: Sequence[Way], verdicts: Iterable[PairVerdict], costs: Iterable[WholeCost]
) -> tuple[str, ...]:
    """One sentence for each way but the first, which is SFT.

    It says whether the way is better than SFT and than each other, at what KL, what signs of gaming
    it shows, and what all runs that led to it cost.
    """
    by_pair = {frozenset((v.first, v.second)): v for v in verdicts}
    by_way = {cost.way: cost for cost in costs}
    told = []
    for way in ways[1:]:
        against = [(o.name, by_pair[frozenset((way.name, o.name))]) for o in ways if o is not way]
        parts = [_standing(way, against), _signs(way)]
        if way.name in by_way:
            parts.append(_cost(by_way[way.name]))
        told.append("; ".join(parts) + ".")
    return tuple(told)


def _standing(way: Way, against: Sequence[tuple[str, PairVerdict]]) -> str:
    """Better or worse than which, at what KL; SFT comes first, with its numbers."""
    (sft, first), *others = against
    d = first.of(way.name)
    numbers = f"judge {d.mean:+z.2f} [{d.low:z.2f}, {d.high:z.2f}], {in_words(first.p_holm)}"
    like = {r: [n for n, v in others if _relation(v, way.name) == r] for r in RELATIONS}
    relation = _relation(first, way.name)
    clauses = [f"{relation} {_listed([f'{sft} ({numbers})', *like.pop(relation)])}"]
    clauses += [f"{other} {_listed(names)}" for other, names in like.items() if names]
    kl = f"{'no more than ' if way.kl_is_bound else ''}{way.vitals.kl.mean:z.1f} nats"
    runs = f" ({len(way.runs)} runs)" if way.runs else ""
    said = f"{way.name}{runs} is {_listed(clauses)}, at {kl}"
    equal = first.wins_at_equal_length(way.name)
    if equal and first.p_holm < LEVEL and not (equal.low > 0.5 if d.mean > 0 else equal.high < 0.5):
        said += f"; at equal length it wins {equal} of the answers, which decides nothing"
    return said


RELATIONS = ("better than", "worse than", "not told apart from")


def _relation(verdict: PairVerdict, way: str) -> str:
    if verdict.p_holm >= LEVEL:
        return RELATIONS[2]
    return RELATIONS[0] if verdict.of(way).mean > 0 else RELATIONS[1]


def _signs(way: Way) -> str:
    if not way.signs:
        return "no sign of gaming"
    names = _listed([f"“{sign.name}”" for sign in way.signs])
    return f"{'sign' if len(way.signs) == 1 else 'signs'} of gaming: {names}"


def _cost(cost: WholeCost) -> str:
    parts = " + ".join(f"{name} {seconds:,.0f}" for name, seconds in cost.parts)
    return f"{cost.total:,.0f} CPU s in all ({parts})"


def in_words(p: float) -> str:
    """A p-value as papers write it.

    >>> in_words(0.0312), in_words(0.0042), in_words(0.0001), in_words(1.0)
    ('p = .03', 'p = .004', 'p < .001', 'p = 1')
    """
    if p < 0.001:
        return "p < .001"
    text = f"{p:.3f}" if p < 0.0095 else f"{p:.2f}"
    return f"p = {text.lstrip('0')}" if p < 0.995 else "p = 1"


def _listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))
