"""What whole runs of the recipes found: a record of each seed, and the pages' numbers from all.

`python -m benchmarks uses --runs FOLDER` reads each finished FOLDER/USE-SEED, what
`prefloop run src/prefloop/recipes/USE.yaml --seed SEED --output FOLDER/USE-SEED` wrote, into
docs/uses/records/USE-SEED.json. From all records that are there it then writes the part of
docs/uses/USE.md and of docs/results.md between two marks; what stands around it is a person's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.uses_page import USES, pages
from prefloop.config.ranges import is_function
from prefloop.errors import UserError
from prefloop.evaluation.answers import shown
from prefloop.evaluation.comparison import Comparison
from prefloop.evaluation.reread import read_comparison
from prefloop.files import write_atomic
from prefloop.resume import read_record

DOCS = Path("docs")
RECORDS = DOCS / "uses" / "records"
EXAMPLES = 10


def measure(runs: Path) -> dict[str, Any]:
    """Records of the runs in a folder; the pages of all records."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    found = sorted(
        folder
        for use in USES
        for folder in runs.glob(f"{use}-*")
        if (folder / "pipeline.json").exists()
    )
    for folder in found:
        use, seed = folder.name.rsplit("-", 1)
        record = record_of(folder, use, int(seed))
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        write_atomic(RECORDS / f"{folder.name}.json", text + "\n")
        print(f"{folder.name}: {record['cpu_seconds'] / 60:.0f} CPU minutes")
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    pages(records, DOCS)
    return {"records": [folder.name for folder in found]}


def record_of(folder: Path, use: str, seed: int) -> dict[str, Any]:
    """What a page needs of a pipeline's output; UserError where its stages are not all finished."""
    stages = json.loads((folder / "pipeline.json").read_text())
    if unfinished := [name for name, of in stages.items() if of["status"] != "finished"]:
        raise UserError(f"{folder}: {unfinished[0]} is not finished; give `prefloop run` again")
    trained = [run for name in stages if (run := _run(folder / name))]
    if not trained or trained[0]["seed"] != seed:
        raise UserError(f"{folder}: not a run of seed {seed}")
    costs = {name: _cost(folder / name, stage) for name, stage in stages.items()}
    compared = {
        name: read_comparison(folder / name)
        for name in stages
        if (folder / name / "compare.json").exists()
    }
    return {
        "use": use,
        "seed": seed,
        "revision": trained[0]["revision"],
        "platform": trained[0]["platform"],
        "versions": trained[0]["versions"],
        "costs": costs,
        "cpu_seconds": sum(cost["cpu_seconds"] for cost in costs.values()),
        "data": json.loads((folder / "data" / "data.json").read_text()),
        "quality": {
            path.stem: _accuracies(json.loads(path.read_text()))
            for path in sorted(folder.glob("*.json"))
            if path.stem in stages
        },
        "comparisons": {name: _compared(*both) for name, both in compared.items()},
        "examples": _examples(compared["compare"][1]) if compared else [],
    }


def _run(output: Path) -> dict[str, Any] | None:
    """What a stage that trained wrote of itself."""
    return read_record(output) if output.is_dir() else None


def _cost(output: Path, stage: Mapping[str, Any]) -> dict[str, float]:
    """A training run's own, for it knows of every interruption; else the stage's."""
    run = _run(output)
    source = run or stage
    cost = {name: round(source[name], 1) for name in ("cpu_seconds", "wall_seconds")}
    return cost | ({"peak_memory_gib": round(run["peak_memory_gib"], 2)} if run else {})


def _accuracies(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs and accuracy of a reward model, or agreement of a judge and of people with people."""
    if "agreement" in quality:
        return {name: quality[name] for name in ("pairs", "agreement", "majority")}
    kept = ("pairs", "accuracy", "always_longer_accuracy")
    return {name: quality[name] for name in kept}


def _compared(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores and lengths by prompt, and each way's vitals."""
    prompts = list(dict.fromkeys(shown(row["prompt"]) for row in rows))
    costs = {cost.way: cost.total for cost in comparison.whole_costs}
    ways = {}
    for way in comparison.ways:
        own = [row for row in rows if row["way"] == way.name]
        vitals = way.vitals
        ways[way.name] = {
            "judge": [round(sum(row["judge"]) / len(row["judge"]), 5) for row in own],
            "tokens": [len(row["tokens"][0]) for row in own],
            "kl": round(vitals.kl.mean, 3),
            "kl_is_bound": way.kl_is_bound,
            "proxy": None if vitals.proxy is None else round(vitals.proxy.mean, 4),
            "cut": round(vitals.truncated, 4),
            "distinct_2": round(vitals.distinct_2, 4),
            "repeated": round(vitals.repeated, 4),
            "signs": [sign.name for sign in way.signs],
            "cpu_seconds": None if way.name not in costs else round(costs[way.name], 1),
            "cpu_seconds_per_answer": round(way.cpu_seconds_per_answer, 3),
        }
    calibration, judge = comparison.calibration, str(comparison.settings["judge"])
    return {
        "judge": judge if is_function(judge) else "a reward model",  # whose place is this machine's
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "held_out_accuracy": calibration.held_out_accuracy if calibration else None,
        "accuracy_by_judge": calibration.accuracy.mean if calibration else None,
        "ways": ways,
    }


def _examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ten prompts, evenly spread, each with what every way answers."""
    by_prompt: dict[str, dict[str, str]] = {}
    for row in rows:
        by_prompt.setdefault(shown(row["prompt"]), {})[row["way"]] = row["completions"][0]
    step = max(1, len(by_prompt) // EXAMPLES)
    chosen = list(by_prompt.items())[::step][:EXAMPLES]
    return [{"prompt": prompt, "answers": answers} for prompt, answers in chosen]
