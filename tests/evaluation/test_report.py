import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from prefloop.evaluation.comparison import Comparison, RunRecord, Way, read_run
from prefloop.evaluation.report import cost_rows, render, terminal_table
from prefloop.intervals import Interval
from prefloop.rewards.health import Sign, Vitals

VOID = {"meta", "br", "hr", "img", "input", "link"}


def near(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1)


def way(name: str, gold: float, kl: float, run: RunRecord | None = None) -> Way:
    vitals = Vitals(near(gold), near(gold + 1), near(kl), 12.0, 0.25, 0.9, 0.01)
    return Way(
        name,
        vitals,
        None if name == "SFT" else near(0.6),
        False,
        (),
        0.5,
        run,
        ("an <b>answer</b>",),
        (gold,),
    )


@pytest.fixture
def comparison() -> Comparison:
    curves = {"objective/scores": ([1, 2], [0.1, 0.4]), "objective/kl": ([1, 2], [0.0, 2.0])}
    ppo = RunRecord("ppo", 1234.5, 700.0, 5.25, 98765, curves)
    hacked = replace(way("PPO & no KL", -1.0, 40.0), signs=(Sign("KL", "40.0 nats > 10"),))
    ways = (way("SFT", 0.0, 0.0), way("PPO", 1.0, 3.0, ppo), hacked)
    return Comparison(
        ways=ways,
        prompts=50,
        example_prompts=("A <i>prompt</i>",),
        frontier=((1, 0.0, 0.0), (2, 0.19, 0.4)),
        reward_run=RunRecord("reward", 10.0, 5.0, 1.0, None, {"accuracy": ([3], [0.8])}),
        settings={"judge": "mine:judge", "seed": 0},
        notes=("Smoke run.",),
    )


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, links and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    assert not page.open
    return page


def test_the_page_stands_alone(comparison: Comparison) -> None:
    html = render(comparison)
    page = parsed(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    references = re.findall(r"url\(#([^)]+)\)", html)
    assert references
    assert set(references) <= set(page.ids)
    assert "@import" not in html
    assert "<script" not in html
    assert len(html) < 300_000


def test_the_page_says_what_was_measured(comparison: Comparison) -> None:
    page = parsed(render(comparison))
    for expected in (
        "1.00 [0.90, 1.10]",
        "0.60 [0.50, 0.70]",
        "KL (40.0 nats > 10)",
        "1,234",
        "98,765",
        "Smoke run.",
        "mine:judge",
        "an <b>answer</b>",  # as text, not as markup
        "A <i>prompt</i>",
        "PPO & no KL",
    ):
        assert expected in page.text, expected


def test_figures_are_drawings_with_a_name(comparison: Comparison) -> None:
    figures = re.findall(r"<svg.*?</svg>", render(comparison), flags=re.DOTALL)
    assert len(figures) == 4  # frontier, two of PPO, one of the reward model
    for figure in figures:
        assert 'role="img"' in figure
        assert "aria-label=" in figure
        assert "currentColor" in figure
        ElementTree.fromstring(
            figure.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
        )


def test_the_same_comparison_gives_the_same_page(comparison: Comparison) -> None:
    assert render(comparison) == render(comparison)


def test_without_a_reward_model_there_is_no_column_for_it(comparison: Comparison) -> None:
    ways = tuple(replace(w, vitals=replace(w.vitals, proxy=None)) for w in comparison.ways)
    console = Console(width=200, file=io.StringIO(), record=True)
    for shown, expected in ((comparison, True), (replace(comparison, ways=ways), False)):
        headings = [str(column.header) for column in terminal_table(shown).columns]
        assert ("RM" in headings) is expected
    console.print(terminal_table(comparison))
    assert "PPO & no KL: KL (40.0 nats > 10)" in console.export_text()


def test_costs_stand_beside_their_runs(comparison: Comparison) -> None:
    rows = cost_rows(comparison)
    assert [row[0] for row in rows] == ["SFT", "Reward model", "PPO", "PPO & no KL"]
    assert rows[1] == ["Reward model", "10", "5", "1.0", "–", "–"]
    assert rows[2] == ["PPO", "1,234", "700", "5.2", "98,765", "0.50"]
    assert rows[3][1:5] == ["–"] * 4


def test_read_run(tmp_path: Path) -> None:
    record = {"command": "sft", "cpu_seconds": 2.0, "wall_seconds": 1.0, "peak_memory_gib": 3.0}
    (tmp_path / "model").mkdir()
    assert read_run(tmp_path / "model") is None
    (tmp_path / "run.json").write_text(json.dumps({**record, "tokens": 7}))
    lines = [{"step": 1, "loss": 2.5, "note": None}, {"step": 2, "loss": 2.0, "eval/loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(tmp_path / "model")
    assert found == read_run(tmp_path)
    assert found is not None
    assert (found.command, found.tokens) == ("sft", 7)
    assert found.metrics == {"loss": ([1, 2], [2.5, 2.0]), "eval/loss": ([2], [3.0])}
