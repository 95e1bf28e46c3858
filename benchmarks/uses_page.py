"""Pages of the recipes' results, from the records of all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.uses_frontier import draw, families
from prefloop.evaluation.comparison import PairVerdict
from prefloop.evaluation.pairs import Scored, all_pairs, mean_of_runs
from prefloop.evaluation.sentences import in_words
from prefloop.files import write_atomic
from prefloop.intervals import Interval

SHOWN = ("best-of-4", "PPO", "DPO")
BETA = "0.1"  # of PPO and DPO there; a use that has several names each way with its own
USES = ("chat", "mqm", "sentiment", "style", "summary", "translation")
MEASURED_BY_COMPARE = {
    "held_out_accuracy": "held-out labels",
    "accuracy_by_judge": "pairs of the ways' answers, as the judge orders them",
}
BEGIN, END = "<!-- numbers: python -m benchmarks uses -->", "<!-- end of numbers -->"
Records = Sequence[Mapping[str, Any]]


def pages(records: Records, docs: Path) -> None:
    """Write the numbers of each use that has records into its page, between the marks, and all uses
    in a table into results.md; a picture where a use has ways of several strengths.
    """
    rows = []
    for use in USES:
        own = sorted((r for r in records if r["use"] == use), key=lambda r: int(r["seed"]))
        if own:
            _put(docs / "uses" / f"{use}.md", numbers(own))
            rows += [_summed_up(own)] if own[0]["comparisons"] else []
            _frontier(own, docs / "images" / f"{use}-frontier.svg")
    heads = ["use", "seeds", "commits", "CPU minutes a seed", "judge", *SHOWN]
    _put(docs / "results.md", "\n".join([*_table(heads, rows), ""]))


def _frontier(records: Records, path: Path) -> None:
    found = [record["comparisons"]["compare"] for record in records if record["comparisons"]]
    if found and any(len(ways) > 1 for ways in families(list(found[0]["ways"])).values()):
        kl = {way: [run["kl"] for run in runs] for way, runs in _ways(found).items()}
        draw(_scored(found), kl, path)


def _put(path: Path, generated: str) -> None:
    """Between the marks of a page; what stands around them stays."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: no place for the numbers; put {BEGIN} and {END} there")
    write_atomic(path, f"{before}{BEGIN}\n\n{generated}\n{END}{after}")


def _summed_up(records: Records) -> list[str]:
    """A use in a row: what it cost, and how far best-of-n, PPO and DPO lie above SFT."""
    use = records[0]["use"]
    found = [record["comparisons"]["compare"] for record in records]
    verdicts = {v.second: v for v in _verdicts(found) if v.first == "SFT"}
    known = [way if way in verdicts else f"{way} {BETA}" for way in SHOWN]
    above = [
        f"{_exact(verdicts[way].of(way), '+')}, {in_words(verdicts[way].p_holm)}"
        if way in verdicts
        else "–"
        for way in known
    ]
    commits = ", ".join(dict.fromkeys(str(record["revision"])[:7] for record in records))
    seeds = ", ".join(str(record["seed"]) for record in records)
    cost = _spread([record["cpu_seconds"] / 60 for record in records], ".0f")
    return [f"[{use}](uses/{use}.md)", seeds, commits, cost, _judge(found[0]), *above]


def numbers(records: Records) -> str:
    """The generated part of a use's page."""
    parts = [_where(records)]
    for name in records[0]["comparisons"]:
        parts += [_comparison([record["comparisons"][name] for record in records], name)]
    parts += [_quality(records), _costs(records)]
    parts += [_examples(records[0])] if records[0]["examples"] else []
    return "\n".join(part for part in parts if part)


def _where(records: Records) -> str:
    """Which runs the numbers are of."""
    use = records[0]["use"]
    lines = [
        f"`prefloop run src/prefloop/recipes/{use}.yaml --seed S`, {records[0]['platform']}, "
        f"torch {records[0]['versions']['torch']}, bfloat16:",
        "",
        "| seed | commit | CPU minutes |",
        "|---|---|---|",
        *(
            f"| {r['seed']} | {str(r['revision'])[:7]} | {r['cpu_seconds'] / 60:.0f} |"
            for r in records
        ),
        "",
    ]
    return "\n".join(lines)


def _comparison(found: Sequence[Mapping[str, Any]], name: str) -> str:
    """One judge's table: means over prompts and seeds, intervals, p-values by Holm."""
    same = {(one["prompts_sha256"], *one["ways"]) for one in found}
    if len(same) > 1:
        raise ValueError(f"{name}: the seeds' prompts or ways differ")
    ways, scored = _ways(found), _scored(found)
    verdicts = _verdicts(found)
    sft, *others = scored
    by_pair = {(v.first, v.second): v for v in verdicts}
    has_proxy = ways[sft.name][0]["proxy"] is not None
    heads = ["way", "judge", f"less {sft.name}", "p", f"wins vs {sft.name}", "at equal length"]
    heads += ["reward model"] * has_proxy + ["KL, nats", "tokens", "cut", "distinct-2", "signs"]
    rows = []
    for one in scored:
        runs = ways[one.name]
        row = [one.name, _exact(mean_of_runs(one.scores))]
        if one is sft:
            row += ["–"] * 4
        else:
            verdict = by_pair[sft.name, one.name]
            equal = verdict.wins_at_equal_length(one.name)
            row += [_exact(verdict.of(one.name), "+"), in_words(verdict.p_holm)]
            row += [str(verdict.wins(one.name)), str(equal) if equal else "–"]
        row += [_over(runs, "proxy", ".2f")] if has_proxy else []
        bound = "≤ " if runs[0]["kl_is_bound"] else ""
        row += [bound + _over(runs, "kl", ".1f"), f"{fmean(_tokens(runs)):.1f}"]
        row += [_over(runs, "cut", ".0%"), _over(runs, "distinct_2", ".2f"), _signs(runs)]
        rows.append(row)
    among = [
        f"{v.second} less {v.first}: {_exact(v.of(v.second), '+')}, {in_words(v.p_holm)}"
        for v in verdicts
        if v.first != sft.name
    ]
    prompts = f"{found[0]['prompts']} prompts"
    heading = f"### By {_judge(found[0])} ({name}, {prompts}, {_seeds(len(found))})"
    told = f"p-values by Holm over all pairs. {'; '.join(among)}." if len(others) < 4 else ""
    return "\n".join([heading, "", *_table(heads, rows), "", *([told, ""] if told else [])])


def _ways(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Each way's seeds."""
    return {way: [one["ways"][way] for one in found] for way in found[0]["ways"]}


def _scored(found: Sequence[Mapping[str, Any]]) -> list[Scored]:
    return [
        Scored(way, *([[[x] for x in run[key]] for run in runs] for key in ("judge", "tokens")))
        for way, runs in _ways(found).items()
    ]


def _verdicts(found: Sequence[Mapping[str, Any]]) -> tuple[PairVerdict, ...]:
    return all_pairs(_scored(found))


def _judge(found: Mapping[str, Any]) -> str:
    """A function by its name."""
    _, is_function, name = str(found["judge"]).rpartition(":")
    return f"`{name}`" if is_function else name


def _exact(interval: Interval, sign: str = "") -> str:
    """An interval in as many digits as its width asks for."""
    digits = 2 if interval.high - interval.low > 0.08 else 3
    ends = f"[{interval.low:{sign}z.{digits}f}, {interval.high:{sign}z.{digits}f}]"
    return f"{interval.mean:{sign}z.{digits}f} {ends}"


def _tokens(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [fmean(run["tokens"]) for run in runs]


def _over(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """What the seeds have under a key."""
    return _spread([run[key] for run in runs], form)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean over seeds and, of several, the lowest and highest."""
    mean, low, high = (format(one, f"z{form}") for one in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _signs(runs: Sequence[Mapping[str, Any]]) -> str:
    """Each sign of gaming; of several seeds, in how many."""
    counts: dict[str, int] = {}
    for run in runs:
        for sign in run["signs"]:
            counts[sign] = counts.get(sign, 0) + 1
    named = [
        sign if len(runs) == 1 else f"{sign} ({count} of {len(runs)})"
        for sign, count in counts.items()
    ]
    return ", ".join(named) or "none"


def _seeds(count: int) -> str:
    return "one seed: intervals are over prompts alone" if count == 1 else f"{count} seeds"


def _quality(records: Records) -> str:
    """The reward model's accuracy on what it was not trained on, and the stages that measure it."""
    rows = []
    compared = [one["comparisons"]["compare"] for one in records if one["comparisons"]]
    for key, on in MEASURED_BY_COMPARE.items():
        if compared and compared[0][key] is not None:
            rows.append([on, "", *_accuracy([one[key] for one in compared])])
    for name, one in records[0]["quality"].items():
        every = [record["quality"][name] for record in records]
        if "agreement" in one:
            found = [q["majority"]["judge"]["mean"] for q in every]
            people = one["majority"].get("people")
            row = _accuracy(found, person=_interval(people) if people else "")
        else:
            longer = f"{one['always_longer_accuracy']:.1%}"
            row = _accuracy([q["accuracy"] for q in every], longer)
        rows.append([name, str(one["pairs"]), *row])
    if not rows:
        return ""
    heads = ["reward model on", "pairs", "accuracy", "the longer answer's", "another person's"]
    heads += ["seed by seed"] * (len(records) > 1)
    return "\n".join(["### The reward model", "", *_table(heads, rows), ""])


def _accuracy(found: Sequence[float], longer: str = "", person: str = "") -> list[str]:
    """The mean over seeds; what always the longer answer, or another person, reaches; of several
    seeds each one's.
    """
    each = [" · ".join(f"{value:.1%}" for value in found)] if len(found) > 1 else []
    return [_spread(found, ".1%"), longer, person, *each]


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def _costs(records: Records) -> str:
    """CPU and wall seconds of each stage, and of each way from its beginning."""
    rows = []
    for stage in records[0]["costs"]:
        every = [record["costs"][stage] for record in records]
        row = [stage, *(_over(every, key, ",.0f") for key in ("cpu_seconds", "wall_seconds"))]
        peaks = "peak_memory_gib" in every[0]
        rows.append([*row, _over(every, "peak_memory_gib", ".1f") if peaks else ""])
    heads = ["stage", "CPU s", "wall s", "peak GiB"]
    text = ["### Cost", "", *_table(heads, rows), ""]
    if not records[0]["comparisons"]:
        return "\n".join(text)
    compared = [record["comparisons"]["compare"]["ways"] for record in records]
    whole = [
        f"{way} {fmean(ways[way]['cpu_seconds'] for ways in compared):,.0f}"
        for way, one in compared[0].items()
        if one["cpu_seconds"] is not None
    ]
    told = f"All runs that lead to a way, CPU seconds: {', '.join(whole)}."
    return "\n".join([*text, told, ""])


def _examples(record: Mapping[str, Any]) -> str:
    """Prompts side by side, word for word."""
    lines = [f"### Ten prompts side by side (seed {record['seed']})", ""]
    for example in record["examples"]:
        said = example["answers"]
        wide = max(map(len, said))
        body = [f"{'asked':{wide}}  {_line(example['prompt'])}"]
        body += [f"{way:{wide}}  {_line(text)}" for way, text in said.items()]
        fence = "`" * (4 if any("```" in line for line in body) else 3)
        lines += [f"{fence}text", *body, fence, ""]
    return "\n".join(lines)


def _line(text: str) -> str:
    """On one line, with its breaks told."""
    return text.strip().replace("\r", "").replace("\n", " ⏎ ")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines]
