"""Records of the recipes' runs, and the pages made of them, by hand."""

import json
from pathlib import Path

import pytest
from benchmarks import uses, uses_frontier, uses_page

from prefloop.errors import UserError
from prefloop.evaluation.comparison import Comparison, Way, WholeCost
from prefloop.intervals import Interval
from prefloop.rewards.health import Sign, Vitals

JUDGE = "prefloop.recipes.scores:chrf"


def at(value):
    return Interval(value, value, value)


def way_of(name, kl, signs=()):
    vitals = Vitals(
        gold=at(0.0), proxy=at(kl / 2), kl=at(kl), length=2.0, truncated=0.25, distinct_2=0.5,
        repeated=0.0,
    )  # fmt: skip
    return Way(name, vitals, None, name == "best-of-2", signs, 0.5, None)


def written(scores, kl):
    """What `compare` found: three ways on as many prompts as scores."""
    ways = (way_of("SFT", 0.0), way_of("best-of-2", 0.3), way_of("PPO", kl, (Sign("KL", "far"),)))
    found = Comparison(
        ways=ways,
        prompts=4,
        frontier=(),
        reward_run=None,
        settings={"judge": JUDGE},
        whole_costs=(WholeCost("SFT", (("SFT", 10.0),)), WholeCost("PPO", (("SFT", 10.0),))),
    )
    rows = [
        {
            "prompt": f"p{n}|\nnext",
            "way": way,
            "completions": [f"{way} says {n}"],
            "tokens": [[1, 2]],
            "judge": [score],
        }
        for way, own in scores.items()
        for n, score in enumerate(own)
    ]
    return found, rows


def record(seed, scores, kl=4.0):
    found, rows = written(scores, kl)
    return {
        "use": "summary",
        "seed": seed,
        "revision": "0123456789",
        "platform": "Linux",
        "versions": {"torch": "2.13"},
        "costs": {
            "sft": {"cpu_seconds": 60.0 * seed, "wall_seconds": 30.0, "peak_memory_gib": 1.0},
            "sample": {"cpu_seconds": 30.0, "wall_seconds": 15.0},
        },
        "cpu_seconds": 60.0 * seed + 30.0,
        "quality": {
            "harmless": {
                "pairs": 8,
                "accuracy": 0.5 + seed / 10,
                "always_longer_accuracy": 0.45,
            },
            "people": {
                "pairs": 5,
                "majority": {
                    "judge": {"mean": 0.6, "low": 0.5, "high": 0.7},
                    "people": {"mean": 0.9, "low": 0.8, "high": 1.0},
                },
                "agreement": {},
            },
        },
        "comparisons": {"compare": uses._compared(found, rows)},
        "examples": uses._examples(rows),
    }


ONE = {"SFT": [0, 0, 1, 1], "best-of-2": [0, 0, 1, 1], "PPO": [1, 2, 2, 3]}
TWO = {"SFT": [0, 1, 0, 1], "best-of-2": [0, 1, 0, 1], "PPO": [1, 2, 1, 2]}


def cells(text, first):
    """The row of the first table that begins so, by heading."""
    lines = text.splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    head = next(n for n in range(row, 0, -1) if lines[n].startswith("| ---")) - 1
    split = [[c.strip() for c in lines[n].strip("|").split(" | ")] for n in (head, row)]
    return dict(zip(*split, strict=True))


def test_a_record_keeps_what_the_pages_need():
    kept = record(1, ONE)["comparisons"]["compare"]
    assert kept["prompts"] == 4 and kept["judge"] == JUDGE
    assert kept["ways"]["PPO"]["judge"] == [1, 2, 2, 3]
    assert kept["ways"]["PPO"]["tokens"] == [2, 2, 2, 2]
    assert kept["ways"]["PPO"]["signs"] == ["KL"]
    assert [way["cpu_seconds"] for way in kept["ways"].values()] == [10.0, None, 10.0]
    assert json.loads(json.dumps(kept)) == kept


def test_numbers_of_two_seeds():
    """Means 14/8 and 4/8; each PPO answer meets both seeds' SFT: 15 of 16 won, one tie."""
    text = uses_page.numbers([record(1, ONE), record(2, TWO, kl=6.0)])
    ppo = cells(text, "PPO")
    assert ppo["judge"].startswith("1.75 [")
    assert ppo["less SFT"].startswith("+1.25 [")
    assert ppo["wins vs SFT"].startswith("0.97 [")
    assert ppo["KL, nats"] == "5.0 (4.0 to 6.0)"
    assert ppo["reward model"] == "2.50 (2.00 to 3.00)"
    assert ppo["signs"] == "KL (2 of 2)"
    assert ppo["cut"] == "25%"
    assert cells(text, "best-of-2")["KL, nats"] == "≤ 0.3"
    assert cells(text, "best-of-2")["less SFT"] == "+0.000 [+0.000, +0.000]"
    assert cells(text, "harmless")["accuracy"] == "65.0% (60.0% to 70.0%)"
    assert cells(text, "harmless")["the longer answer's"] == "45.0%"
    assert cells(text, "harmless")["seed by seed"] == "60.0% · 70.0%"
    assert cells(text, "people")["another person's"] == "90.0% [80.0%, 100.0%]"
    assert cells(text, "sft")["CPU s"] == "90 (60 to 120)"
    assert "| 2 | 0123456 | 2 |" in text
    assert "All runs that lead to a way, CPU seconds: SFT 10, PPO 10." in text
    assert "asked      p0| ⏎ next" in text
    assert "one seed" not in text
    assert "one seed: intervals are over prompts alone" in uses_page.numbers([record(1, ONE)])


def test_numbers_of_reward_models_alone():
    both = [record(seed, ONE) | {"comparisons": {}, "examples": []} for seed in (1, 2)]
    text = uses_page.numbers(both)
    assert cells(text, "harmless")["accuracy"] == "65.0% (60.0% to 70.0%)"
    assert cells(text, "sft")["CPU s"] == "90 (60 to 120)"
    assert "a way" not in text and "side by side" not in text and "### By" not in text


def test_seeds_with_other_prompts_are_refused():
    other = record(2, TWO)
    other["comparisons"]["compare"]["prompts_sha256"] = "another"
    with pytest.raises(ValueError, match="the seeds' prompts or ways differ"):
        uses_page.numbers([record(1, ONE), other])


def test_only_what_is_between_the_marks_is_written(tmp_path):
    page, results = tmp_path / "uses" / "summary.md", tmp_path / "results.md"
    page.parent.mkdir()
    for path in (page, results):
        path.write_text(f"# Before\n\n{uses_page.BEGIN}\nold\n{uses_page.END}\n\nafter\n")
    both = [record(1, ONE), record(2, TWO)]
    alone = record(1, ONE) | {"use": "mqm", "comparisons": {}, "examples": []}
    (page.parent / "mqm.md").write_text(f"{uses_page.BEGIN}\n{uses_page.END}\n")
    uses_page.pages([*both, alone], tmp_path)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{uses_page.BEGIN}\n")
    assert text.endswith(f"{uses_page.END}\n\nafter\n") and "old" not in text
    row = cells(results.read_text(), "[summary](uses/summary.md)")
    assert row["seeds"] == "1, 2" and row["commits"] == "0123456" and row["judge"] == "`chrf`"
    assert row["CPU minutes a seed"] == "2"  # 1.5 and 2.5
    assert row["PPO"].startswith("+1.25 [") and row["DPO"] == "–"
    assert "[mqm]" not in results.read_text()
    uses_page.pages(both, tmp_path)
    assert page.read_text() == text
    page.write_text("# no marks")
    with pytest.raises(ValueError, match="no place for the numbers"):
        uses_page.pages(both, tmp_path)


def test_of_several_strengths_the_other_uses_one_is_summed_up():
    one = record(1, ONE)
    ways = one["comparisons"]["compare"]["ways"]
    ways["PPO 1"] = ways["SFT"]
    ways["PPO 0.1"] = ways.pop("PPO")
    assert uses_page._summed_up([one])[-2].startswith("+1.50 [")


def test_ways_of_several_strengths_are_drawn_as_a_frontier(tmp_path):
    ways = ["SFT", "PPO 1", "PPO 0.03", "DPO rankings", "DPO 0.1"]
    assert uses_frontier.families(ways) == {
        "SFT": ["SFT"],
        "PPO": ["PPO 0.03", "PPO 1"],
        "DPO rankings": ["DPO rankings"],
        "DPO": ["DPO 0.1"],
    }
    one = record(1, ONE)
    compared = one["comparisons"]["compare"]["ways"]
    compared["PPO 0.1"], compared["PPO 1"] = compared["PPO"], compared.pop("PPO")
    path = tmp_path / "images" / "summary-frontier.svg"
    uses_page._frontier([record(1, ONE)], path)
    assert not path.exists()  # nothing has two strengths
    uses_page._frontier([one], path)
    first = path.read_bytes()
    uses_page._frontier([one], path)
    assert first.lstrip().startswith(b"<?xml") and path.read_bytes() == first


@pytest.mark.parametrize(
    ("status", "seed", "message"),
    [("started", 1, "sft is not finished"), ("finished", 2, "not a run of seed 1")],
)
def test_a_run_that_is_not_whole_is_refused(tmp_path, status, seed, message):
    folder = tmp_path / "summary-1"
    (folder / "sft").mkdir(parents=True)
    stage = {"status": status, "fingerprint": "", "cpu_seconds": 1.0, "wall_seconds": 1.0}
    (folder / "pipeline.json").write_text(json.dumps({"sft": stage}))
    (folder / "sft" / "run.json").write_text(
        json.dumps({"command": "sft", "status": "finished", "seed": seed})
    )
    with pytest.raises(UserError, match=message):
        uses.record_of(folder, "summary", 1)


def test_the_pages_in_docs_are_what_the_records_say(tmp_path):
    docs = Path(__file__).parents[1] / "docs"
    records = [json.loads(path.read_text()) for path in (docs / "uses" / "records").glob("*.json")]
    assert records
    pages = [docs / "results.md", *(docs / "uses" / f"{record['use']}.md" for record in records)]
    (tmp_path / "uses").mkdir()
    for page in pages:
        (tmp_path / page.relative_to(docs)).write_text(page.read_text())
    uses_page.pages(records, tmp_path)
    for page in pages:
        assert (tmp_path / page.relative_to(docs)).read_text() == page.read_text(), page.name
