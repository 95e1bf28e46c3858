"""`prefloop report RUN`: what the page of one or several runs says, and while they go."""

import json
from pathlib import Path

import pytest
import yaml

from prefloop.cli import main
from prefloop.config import PPOConfig, ReportConfig
from prefloop.config.resolve import as_dict
from prefloop.errors import UserError
from prefloop.evaluation.comparison import read_run
from prefloop.evaluation.figures import band, smoothed, thinned
from prefloop.evaluation.run_facts import (
    changed_settings,
    differing_settings,
    learned,
    learned_table,
    names_of,
    state,
)
from prefloop.evaluation.run_report import _read, run, series_of
from prefloop.runs import Run
from tests.evaluation.test_report import parsed

LINES = [
    {"step": 1, "loss": 2.0, "objective/scores": 0.25, "objective/kl": 0.0, "lr": 1e-4},
    {"step": 2, "loss": 1.0, "objective/scores": 0.5, "objective/kl": 1.0, "lr": 1e-4},
    {"step": 3, "loss": 0.5, "objective/scores": 1.25, "objective/kl": 2.5, "eval/scores": 0.75},
]


def make_run(folder, status="finished", lines=LINES, **more):
    """A run directory of PPO as one that stands on disk; `settings` are changed ones."""
    folder.mkdir(parents=True)
    changes = more.pop("settings", {})
    config = PPOConfig(
        model="m/sft", data="prompts.jsonl", output=folder, reward_model="rm", **changes
    )
    record = {
        "command": "ppo",
        "status": status,
        "seed": config.seed,
        "cpu_seconds": 120.0,
        "wall_seconds": 90.0,
        "peak_memory_gib": 2.5,
        "steps": 3,
        "tokens": 4321,
        "started": "2026-01-02T03:04:05+00:00",
        "revision": "abc123",
        "versions": {"torch": "2.13"},
        "rows": {"data": {"read": 10, "used": 9, "dropped": {"too long": 1}}},
        "sha256": {"prompts.jsonl": "feed"},
        "held_out_before": {"scores": 0.5, "absent": 1.0},
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config)))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_the_page_of_a_run_says_what_its_record_holds(tmp_path, capsys):
    found = {"name": "length", "step": 2, "text": "9 <b>tokens", "why": "Drift.", "try": "A bound."}
    made = make_run(tmp_path / "a&b", health=[found], best_step=2, settings={"lr": 0.25})
    assert main(["report", str(made)]) == 0
    assert capsys.readouterr().out == f"{made}/report.html\n"
    html = (made / "report.html").read_text()
    page = parsed(html)
    words = " ".join(page.text.split())
    for expected in (
        "a&b finished: 3 steps in 1 min 30 s.",
        "Best step by the monitor: 2.",
        "scores 0.5 0.75 +0.25",  # held out: before, after, change
        "a&b, step 2: length (9 <b>tokens) Drift. A bound.",
        "1 min 30 s 2 min 00 s 2.5 GiB 4,321",
        f"--lr 0.25 {PPOConfig.lr}",
        "--model m/sft (required)",
        "abc123 torch 2.13",
        "2026-01-02 03:04:05 UTC",
        "9 of 10 rows used, 1 dropped (too long); prompts.jsonl sha256 feed",
    ):
        assert expected in words, expected
    assert "--seed" not in words
    assert html.count("<svg") == 4  # score and KL; of the others, loss and lr
    assert 'http-equiv="refresh"' not in html
    assert all(link in ("data:,",) or link[1:] in page.ids for link in page.links)


@pytest.mark.parametrize(
    ("record", "is_written", "told"),
    [
        ({}, True, "finished: 3 steps in 1 min 30 s"),
        (
            {"status": "running", "total_steps": 12},
            True,
            "running, step 3 of 12, about 4 min 30 s left",
        ),
        ({"status": "running"}, True, "running, step 3"),
        ({"status": "running"}, False, "ended without a word at step 3 (killed?), or running on"),
        (
            {"status": "interrupted", "total_steps": 9},
            False,
            "interrupted after step 3 of 9; the same",
        ),
    ],
)  # 90 s for 3 steps, and 9 more
def test_a_run_says_how_far_it_is(tmp_path, record, is_written, told):
    assert state(read_run(make_run(tmp_path / "r", **record)), is_written).startswith(told)


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    made = make_run(tmp_path / "r", "running", [], held_out_before={}, total_steps=5)
    text = parsed(run(ReportConfig(runs=(str(made),))).read_text()).text
    assert "step 0 of 5" in text
    assert "What was learned" not in text


def test_a_page_is_written_again_until_the_run_has_ended(tmp_path):
    """The lock of a run that is open says that it goes; the wait is where it goes on."""
    config = PPOConfig(model="m", data="d", output=tmp_path / "r", reward_model="rm")
    page, seen = tmp_path / "page.html", []
    with Run.open(config, "ppo") as going:
        going.note(total_steps=2)

        def wait(seconds):
            seen.append((seconds, page.read_text()))
            going.log_metrics(len(seen), {"loss": 1.0})
            if len(seen) == 2:
                going.finish("finished", steps=2, tokens=7)

        run(ReportConfig(runs=(str(config.output),), output=page, every=12.5), wait)
    assert [seconds for seconds, _ in seen] == [12.5, 12.5]
    for number, (_, html) in enumerate(seen):
        assert f"running, step {number} of 2" in html
        assert '<meta http-equiv="refresh" content="13">' in html
    assert "finished: 2 steps" in page.read_text()
    assert "refresh" not in page.read_text()


def test_runs_that_differ_in_the_seed_alone_share_a_colour(tmp_path):
    made = [
        make_run(tmp_path / name, settings=settings)
        for name, settings in [
            ("one/ppo", {"seed": 1}),
            ("two/ppo", {"seed": 2}),
            ("two/hot", {"seed": 2, "kl_coef": 0.5}),
            ("two/again", {"seed": 2, "log_every": 7}),  # the seed is there already
        ]
    ]
    shown = _read(made)
    series = series_of(shown)
    assert [one.name for one in series] == ["one/ppo … two/ppo", "two/hot", "two/again"]
    assert [len(one.runs) for one in series] == [2, 1, 1]
    rows = differing_settings({one.name: one.run for one in shown})
    assert ["--kl-coef", "0.05", "0.05", "0.5", "0.05"] in rows
    assert {row[0] for row in rows} == {"--kl-coef", "--seed", "--log-every"}
    html = run(ReportConfig(runs=tuple(map(str, made)), output=tmp_path / "r.html")).read_text()
    assert "one/ppo … two/ppo (2 seeds)" in html
    headings, table = learned_table({one.name: one.run for one in shown[:2]})
    assert headings == ["Metric", "one/ppo: held-out rows", "two/ppo: held-out rows"]
    assert table == [["scores", "0.5 → 0.75", "0.5 → 0.75"]]


def test_without_held_out_rows_the_training_rows_tell(tmp_path):
    found = read_run(make_run(tmp_path / "r", held_out_before={}))
    assert learned(found) == (
        "training rows, first and last step",
        [("loss", 2.0, 0.5), ("objective/scores", 0.25, 1.25), ("objective/kl", 0.0, 2.5)],
    )


def test_settings_that_are_the_defaults_are_not_told(tmp_path):
    found = read_run(make_run(tmp_path / "r", settings={"whiten_rewards": True}))
    told = changed_settings(found)
    assert ("--whiten-rewards", "yes", "no") in told
    assert {name for name, _, _ in told} == {
        "--model",
        "--data",
        "--reward-model",
        "--whiten-rewards",
    }


def test_curves_by_hand():
    assert smoothed([1.0, 5.0, 2.0], span=1) == [1.0, 5.0, 2.0]
    # weights 1/4, 1/2, 1 of 0, 3, 6
    assert smoothed([0.0, 3.0, 6.0], span=3) == pytest.approx([0.0, 2.0, 7.5 / 1.75])
    assert band([([1, 2, 3], [0.0, 4.0, 9.0]), ([2, 3, 4], [2.0, 3.0, 1.0])]) == (
        [2, 3],
        [3.0, 6.0],
        [2.0, 3.0],
        [4.0, 9.0],
    )
    wave = [0.0, 5.0, -5.0, 1.0, 1.0, 1.0, 7.0, 2.0]
    assert thinned((range(8), wave), bins=2) == ([1, 2, 4, 6], [5.0, -5.0, 1.0, 7.0])
    assert thinned(([3, 4], [1.0, 2.0])) == ([3, 4], [1.0, 2.0])


def test_names_tell_runs_apart():
    assert names_of(["a/x/ppo", "a/y/ppo", "b/dpo"]) == ["x/ppo", "y/ppo", "b/dpo"]
    assert names_of(["a", "a"]) == ["a", "a"]


@pytest.mark.parametrize(
    ("made", "every", "told"),
    [
        ((), 0.0, "no run directory"),
        (("compare.json",), 5.0, "stands alone and does not change"),
        (("compare.json",), 0.0, "run `prefloop compare` again"),
    ],
)
def test_faults_are_one_line(tmp_path, made, every, told):
    for name in made:
        Path(tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=told):
        run(ReportConfig(runs=(str(tmp_path),), every=every))
