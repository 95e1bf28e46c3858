import base64
import hashlib
import io
import json
import re
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from prefloop.errors import UserError
from prefloop.evaluation.answers import browsable
from prefloop.evaluation.comparison import Comparison, RunRecord, Way, read_run
from prefloop.evaluation.report import render
from prefloop.evaluation.reread import read_comparison
from prefloop.evaluation.table import cost_rows, terminal_table
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
        frontier=((1, 0.0, 0.0), (2, 0.19, 0.4)),
        reward_run=RunRecord("reward", 10.0, 5.0, 1.0, None, {"accuracy": ([3], [0.8])}),
        settings={"judge": "mine:judge", "seed": 0},
        notes=("Smoke run.",),
    )


def answered(way: str, prompt: object, text: str, **more: object) -> dict[str, object]:
    """A line of answers.jsonl."""
    line = {"prompt": prompt, "way": way, "completions": [text], "tokens": [[1, 2, 3]]}
    scores = {"judge": [0.0], "reward_model": [0.0], "kl": [0.0], "truncated": [False]}
    return line | scores | more


ANSWERS = [
    answered("SFT", "A <i>prompt</i>", "an <b>answer</b>"),
    answered("PPO", "A <i>prompt</i>", "</script><script>window.hacked=1</script>"),
]


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, links, visible text and scripts' data."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
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
    html = render(comparison, ANSWERS)
    page = parsed(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.links.pop(0) == "data:,"  # no icon is asked for
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    references = re.findall(r"url\(#([^)]+)\)", html)
    assert references
    assert set(references) <= set(page.ids)
    assert "@import" not in html
    assert len(html) < 300_000


def test_the_policy_lets_the_pages_own_scripts_run_and_no_others(comparison: Comparison) -> None:
    html = render(comparison, ANSWERS)
    theme, data, answers = parsed(html).scripts
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (theme, answers)
    ]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    assert (
        f'"Content-Security-Policy" content="{escape(policy)}"'.replace("&#x27;", "&#39;") in html
    )
    assert json.loads(data)["rows"] == [
        {
            "p": "A <i>prompt</i>",
            "w": [
                [["an <b>answer</b>", 0.0, 0.0, 0.0, 0, []]],
                [["</script><script>window.hacked=1</script>", 0.0, 0.0, 0.0, 0, []]],
            ],
        }
    ]


def test_the_page_says_what_was_measured(comparison: Comparison) -> None:
    page = parsed(render(comparison, ANSWERS))
    for expected in (
        "1.00 [0.90, 1.10]",
        "0.60 [0.50, 0.70]",
        "KL (40.0 nats > 10)",
        "1,234",
        "98,765",
        "Smoke run.",
        "mine:judge",
        "PPO & no KL",
    ):
        assert expected in page.text, expected


def test_figures_are_drawings_with_a_name(comparison: Comparison) -> None:
    figures = re.findall(r"<svg.*?</svg>", render(comparison, ANSWERS), flags=re.DOTALL)
    assert len(figures) == 4  # reward against KL, two of PPO, one of the reward model
    for figure in figures:
        assert 'role="img"' in figure
        assert "aria-label=" in figure
        assert "currentColor" in figure
        ElementTree.fromstring(
            figure.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
        )


def test_many_ways_are_told_apart_and_named_below_the_drawing(comparison: Comparison) -> None:
    ways = [way("SFT", 0.0, 0.0), *(way(f"PPO {n}", n / 4, n / 2) for n in range(1, 12))]
    html = render(replace(comparison, ways=tuple(ways)), [])
    rows = re.findall(r'<th scope="row"><span class="mark (.*?)" style="(.*?)">', html)
    assert len(rows) == 12 == len(set(rows))
    drawing = re.findall(r"<svg viewBox=.*?</svg>", html, flags=re.DOTALL)[0]
    drawing = drawing.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    place = {e.text: float(e.get("y", 0)) for e in ElementTree.fromstring(drawing).iter("text")}
    axis = place["KL (nats an answer; logarithmic above 1)"]
    assert all(place[one.name] > axis > 0 for one in ways)


def test_nothing_is_minus_nought() -> None:
    assert str(Interval(-0.001, -0.004, 0.2)) == "0.00 [0.00, 0.20]"


def test_the_same_comparison_gives_the_same_page(comparison: Comparison) -> None:
    assert render(comparison, ANSWERS) == render(comparison, ANSWERS)


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
    record["status"] = "running"
    (tmp_path / "model").mkdir()
    assert read_run(tmp_path / "model") is None
    (tmp_path / "run.json").write_text(json.dumps({**record, "tokens": 7}))
    lines = [{"step": 1, "loss": 2.5, "note": None}, {"step": 2, "loss": 2.0, "eval/loss": 3.0}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')  # a line half written
    (tmp_path / "config.yaml").write_text("lr: 0.5")
    found = read_run(tmp_path / "model")
    assert found == read_run(tmp_path)
    assert found is not None
    assert (found.command, found.tokens) == ("sft", 7)
    assert found.metrics == {"loss": ([1, 2], [2.5, 2.0]), "eval/loss": ([2], [3.0])}
    assert (found.settings, found.folder) == ({"lr": 0.5}, str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(whole + "broken\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: not a line of a run"):
        read_run(tmp_path)


def test_the_browser_gets_each_prompt_with_every_answer_and_its_signs() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    scored = {"judge": [0.5, 1.5], "reward_model": [1.0, 2.0], "kl": [0.0, 0.0]}
    two = {"completions": ["a", "b"], "tokens": [[1], [2]], "truncated": [False, True]}
    gamed = {"judge": [0.9], "reward_model": [1.6], "kl": [10.5]}  # against means of 1 and 1.5
    looped = {"judge": [1.0], "reward_model": [9.0], "tokens": [[1, 2, 3, 1, 2, 3]]}
    rows = [
        answered("SFT", chat, "", **two, **scored),
        answered("SFT", "q", "c", reward_model=[None]),
        answered("PPO", chat, "x", **gamed),
        answered("PPO", "q", "y", reward_model=[None], tokens=looped["tokens"]),
        answered("DPO", chat, "z", **looped),
        answered("DPO", "q", "w", reward_model=[None]),
    ]
    found = browsable(rows)
    assert found["ways"] == ["SFT", "PPO", "DPO"]
    assert found["signs"] == ["proxy up, judge down", "KL", "repetition"]
    assert found["rows"][0]["p"] == "system: Be brief.\nuser: Hi"
    assert found["rows"][0]["w"] == [
        [["a", 0.5, 1.0, 0.0, 0, []], ["b", 1.5, 2.0, 0.0, 1, []]],
        [["x", 0.9, 1.6, 10.5, 0, [0, 1]]],
        [["z", 1.0, 9.0, 0.0, 0, [2]]],  # 1 of its 4 3-grams stood before; the judge is no lower
    ]
    assert found["rows"][1]["w"][1] == [["y", 0.0, None, 0.0, 0, [2]]]


def test_a_comparison_is_read_back_as_it_was_written(
    comparison: Comparison, tmp_path: Path
) -> None:
    settings = {"judge": "mine:judge", "models": ["PPO=nowhere"], "sft": "nowhere"}
    written = replace(comparison, settings=settings)
    numbers = json.loads(json.dumps(asdict(written)))
    for run in (numbers["ways"][1]["run"], numbers["reward_run"]):
        del run["metrics"]
    (tmp_path / "compare.json").write_text(json.dumps(numbers))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    found, rows = read_comparison(tmp_path)
    assert rows == ANSWERS
    assert found.ways[0] == written.ways[0]
    assert found.ways[2] == written.ways[2]
    assert found.ways[1] == replace(written.ways[1], run=replace(written.ways[1].run, metrics={}))  # type: ignore[type-var]
    assert (found.frontier, found.notes) == (written.frontier, written.notes)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_comparison(tmp_path)
