"""What the benchmark of warnings counts, on runs written by hand."""

import json
import math

import pytest
from benchmarks import health


def write_run(folder, scores, kl, health_signs=(), error=0.1):
    """Measurements at steps 0, 10, 20, ... with the same standard error."""
    folder.mkdir(parents=True)
    half = 1.959964 * error
    rows = [
        {"step": 10 * n, "monitor/score": s, "monitor/low": s - half, "monitor/high": s + half}
        | {"monitor/kl": k}
        for n, (s, k) in enumerate(zip(scores, kl, strict=True))
    ]
    rows.insert(1, {"step": 1, "loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    signs = [{"name": name, "step": step} for name, step in health_signs]
    (folder / "run.json").write_text(json.dumps({"health": signs}))


KL = (0.0, 1.0, 4.0, 9.0, 16.0)
TURNS = (0.0, 1.0, 0.9, 0.5, 0.4)  # the error of a difference is 0.14: 0.5 is the first below 1


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a/before", TURNS, KL, [("KL", 10), ("judge down", 40)])
    write_run(tmp_path / "a/in-time", TURNS, KL, [("KL", 30)])
    write_run(tmp_path / "late", TURNS, KL, [("KL", 40)])
    write_run(tmp_path / "missed", TURNS, KL)
    write_run(tmp_path / "calm", (0.0, 0.5, 1.0, 0.9, 0.8), KL, [("length", 20)])
    write_run(tmp_path / "quiet", (0.0, 0.5, 1.0, 1.1, 1.2), KL)
    write_run(tmp_path / "short", (0.0, 1.0), KL[:2])
    return tmp_path


def test_courses_by_hand(runs):
    """0.8 after 1.0 is within two errors (0.28), 0.4 after 1.0 is not."""
    courses = {course.name: course for course in health.read(runs)}
    assert list(courses) == ["a/before", "a/in-time", "calm", "late", "missed", "quiet"]
    assert {name for name, c in courses.items() if c.turned} == {
        "a/before", "a/in-time", "late", "missed",
    }  # fmt: skip
    assert (courses["late"].peak, courses["late"].seen_at) == (1, 30)
    assert courses["calm"].errors == pytest.approx((0.1,) * 5)


def test_alarms_by_hand(runs):
    table = health.alarms(health.read(runs))
    kl = {"before the peak": 1, "in time": 1, "late": 1, "missed": 1, "false": 0, "not turned": 2}
    assert {key: table["KL"][key] for key in kl} == kl
    assert table["any"]["false"] == table["length"]["false"] == 1
    assert (table["judge down"]["late"], table["judge down"]["missed"]) == (1, 3)
    assert table[health.OTHERS]["before the peak"] == 1
    # Wilson of 1 in 2, z² = 3.8415: 1/2 ± 1.96 √(1/8 + z²/16) / (1 + z²/2)
    rate, low, high = table["any"]["false rate"]
    assert (rate, low, high) == pytest.approx((0.5, 0.09453, 0.90547), abs=1e-5)


def course(kl, alpha, beta, to):
    """A run that follows Gao's form."""
    roots = [math.sqrt(k) for k in kl]
    gold = [2.0 + d * (alpha - beta * math.log(d or 1.0)) for d in roots]
    steps = tuple(range(len(kl)))
    return health.Course("run", steps[:to], tuple(gold[:to]), (0.01,) * to, tuple(kl[:to]), {})


def test_forecasts_by_hand():
    """d (1 - log(d) / 2) turns at d = e: at a KL of e² = 7.39; half the way is 1.85 nats."""
    kl = [0.0, 0.2, 0.5, 1.0, 1.5, 4.0, math.e**2, 12.0, 40.0]
    run = course(kl, 1.0, 0.5, len(kl))
    assert run.turned and run.kl[run.peak] == math.e**2
    assert health.forecast(run) == pytest.approx(math.e**2, rel=1e-6)
    told = health.forecasts([run, course([4 * k for k in kl], 1.0 + math.log(2) / 2, 0.5, 9)])
    assert told["turned"] == 2
    assert told["forecast"]["median factor"] == pytest.approx(1.0, abs=1e-4)
    assert told["forecast"]["within a factor of 2"] == 1.0
    assert told["mean of the other runs"]["median factor"] == pytest.approx(4.0)
    assert told["mean of the other runs"]["within a factor of 2"] == 0.0


def test_what_shows_no_turn_has_no_forecast():
    """A straight rise before the peak, and too few points."""
    kl = (0.0, 0.25, 1.0, 2.25, 4.0, 36.0, 49.0)
    gold = (0.0, 0.5, 1.0, 1.51, 2.03, 3.0, 1.0)
    assert health.forecast(health.Course("r", (0,) * 7, gold, (0.1,) * 7, kl, {})) is None
    few = health.Course("r", (0,) * 4, (0.0, 1.0, 2.0, 1.0), (0.1,) * 4, (0.0, 1.0, 9.0, 16.0), {})
    assert health.forecast(few) is None


def test_it_is_printed(runs, capsys):
    found = health.measure(runs)
    told = capsys.readouterr().out
    assert "6 runs, 4 of them turned" in told
    assert "| KL | 1 | 1 | 1 | 1 | 0 | 2 | 0% [0%, 66%] |" in told
    assert found["turned"] == 4
    json.dumps(found)
