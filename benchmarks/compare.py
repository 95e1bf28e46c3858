"""prefloop against its peers on one work, turn by turn, with the machine's ceilings beside."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.sides import (
    Form,
    Side,
    checked_out,
    forms,
    prepare_llama,
    prepare_models,
    prepare_rows,
)

MEASURES = ("cpu", "wall", "peak_gib")
SAME = {"float32": 2e-4, "bfloat16": 4e-2}  # relative; float32 sums in other orders
ALIKE = 5.0  # standard errors between the means of what is sampled


def compare(
    name: str, dtype: str, rounds: int, threads: int, peers: list[str], revision: str
) -> dict[str, Any]:
    """Ceilings and results against each of `peers`' forms, printed as they come.

    With a revision they are against this package as it was then.
    """
    models, rows = prepare_models(), prepare_rows(name)
    ceilings = measure_ceilings(models, threads)
    print(
        f"ceilings: float32 {ceilings['float32']:.0f} GFLOP/s, bfloat16 {ceilings['bfloat16']:.0f} "
        f"GFLOP/s, {ceilings['bandwidth']:.1f} GB/s",
        flush=True,
    )
    results = []
    folder = checked_out(revision) if revision else None
    for form in forms(name, revision):
        if peers and form.side.removesuffix("_side") not in peers:
            continue
        if form.side == "llama_side":
            prepare_llama(rows, name, dtype)
        words = (name, rows, models, dtype)
        with (
            Side("prefloop_side", *words, form.ours, threads=threads) as ours,
            Side(form.side, *words, form.name, threads=threads, folder=folder) as peer,
        ):
            other = revision or form.side.removesuffix("_side")
            results.append(_against(form, other, ours, peer, rounds, dtype, ceilings))
        print(results[-1]["text"], flush=True)
    return {"ceilings": ceilings, "results": results}


def measure_ceilings(models: str, threads: int) -> dict[str, float]:
    """GFLOP/s of both dtypes and GB/s: the best of two turns."""
    with Side("ceilings", models, threads=threads) as side:
        turns = [side.turn(), side.turn()]
    return {key: max(t[key] for t in turns) for key in ("float32", "bfloat16", "bandwidth")}


def _against(
    form: Form,
    other: str,
    ours: Side,
    peer: Side,
    rounds: int,
    dtype: str,
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """Alternate; ratios are peer over ours, above 1 where ours needs less."""
    first = (ours.turn(), peer.turn())
    same = [turn.get("same", {}) for turn in first]
    for key in same[0].keys() & same[1].keys():
        if abs(same[0][key] - same[1][key]) > SAME[dtype] * max(1.0, abs(same[1][key])):
            raise SystemExit(f"{form}: another {key}: {same[1][key]}, ours {same[0][key]}")
    pairs = [(ours.turn(), peer.turn()) for _ in range(rounds)]
    _require_alike(form, [first, *pairs])
    found: dict[str, Any] = {"form": vars(form), "first": first, "pairs": pairs}
    told = [f"{other} {form.name} / prefloop {form.ours}:"]
    for measure in MEASURES:
        each = [[turn[measure] / turn["tokens"] for turn in pair] for pair in pairs]
        if measure == "peak_gib":
            each = [[turn[measure] for turn in pair] for pair in pairs]
        medians = [statistics.median(column) for column in zip(*each, strict=True)]
        ratios = [b / a for a, b in each]
        found[measure] = {"ratio": medians[1] / medians[0], "low": min(ratios), "high": max(ratios)}
        shown = [statistics.median(p[side][measure] for p in pairs) for side in (0, 1)]
        told.append(
            f"{measure} {medians[1] / medians[0]:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] "
            f"({shown[1]:.2f} / {shown[0]:.2f})"
        )
    tokens = [sum(p[s]["tokens"] for p in pairs) / sum(p[s]["wall"] for p in pairs) for s in (0, 1)]
    found["tokens_per_second"] = tokens
    told.append(f"tokens/s {tokens[1]:.0f} / {tokens[0]:.0f}")
    found |= _shares([pair[0] for pair in pairs], dtype, ceilings)
    told += [f"{key} {found[key]:.0%}" for key in ("mfu", "bandwidth_share") if key in found]
    return found | {"text": "  ".join(told)}


def _require_alike(form: Form, turns: list[Any]) -> None:
    """Sampled metrics of both sides have the same mean, within their own spread."""
    keys = [turn.get("alike", {}).keys() for turn in turns[0]]
    for key in keys[0] & keys[1]:
        sides = [[pair[s]["alike"][key] for pair in turns] for s in (0, 1)]
        means = [statistics.mean(values) for values in sides]
        error = sum(statistics.variance(v) / len(v) for v in sides if len(v) > 1) ** 0.5
        if len(turns) > 3 and abs(means[0] - means[1]) > ALIKE * error:
            raise SystemExit(f"{form}: another {key}: {means[1]}, ours {means[0]} (± {error})")


def _shares(
    ours: list[dict[str, Any]], dtype: str, ceilings: Mapping[str, float]
) -> dict[str, float]:
    """Of the matrix products' rate in training, of the bandwidth's bound in a decode step."""
    wall = statistics.median(turn["wall"] for turn in ours)
    if "flops" in ours[0]:
        rate = statistics.median(turn["flops"] for turn in ours) / wall / 1e9
        return {"gflops": rate, "mfu": rate / ceilings[dtype]}
    if "steps" in ours[0]:
        bound = ours[0]["step_bytes"] / ceilings["bandwidth"] / 1e9
        measured = wall / ours[0]["steps"]
        return {"step_ms": 1e3 * measured, "bandwidth_share": bound / measured}
    return {}
