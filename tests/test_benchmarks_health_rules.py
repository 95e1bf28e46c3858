"""The study of the rules of health, on courses written by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks import health_rules as h
from benchmarks.health_runs import Apart, Task
from benchmarks.health_scores import answers_of, mean_taste

from prefloop.generation.protocol import Sample
from prefloop.recipes.annotators import Annotator
from prefloop.rewards import health

KL_NAMES = {rule.name: [] for rule in h.RULES}


def course(gold, seen=None, way="none", monitors=None, kl=None, number=0, proxies=()):
    """Four prompts; measurements at steps 0, 5, 10, ...; odd prompts differ by their number."""
    gold = np.array([[g, g + noise, g, g - noise] for g, noise in gold])
    steps = [5 * i for i in range(len(gold))]
    kl = kl or [float(i * i) for i in range(len(gold))]
    return h.Course(
        "run", "films", way, number, steps, kl, gold, monitors or {}, proxies,
        KL_NAMES | (seen or {}), health.KL.limit,
    )  # fmt: skip


TURNS = [(0.0, 0.0), (2.0, 0.0), (1.9, 0.5), (1.0, 0.1), (-1.0, 0.1)]
CALM = [(0.0, 0.0), (1.0, 0.1), (2.0, 0.1)]


def test_a_turn_by_hand():
    """Odd prompts at step 10 lie 0.1 ± 0.5 below the peak: differences -0.4 and 0.6, mean 0.1,
    error 0.5, so 0.2 errors; at step 15 they are 0.9 and 1.1: mean 1, error 0.1, ten errors.
    """
    run = course(TURNS)
    assert run.peak == 1
    assert [run.below(i) for i in (2, 3)] == pytest.approx([0.2, 10.0])
    assert run.turned and run.seen_at == 3
    assert run.means.tolist() == pytest.approx([0.0, 2.0, 1.9, 1.0, -1.0])
    assert not course(CALM).turned
    assert [run.at(step) for step in (0, 4, 5, 19)] == [0, 0, 1, 3]


def test_alarms_by_hand():
    """Peak at step 5, seen at step 15; one run that did not turn has an alarm."""
    rule = health.REPETITION
    runs = [
        course(TURNS, {rule.name: [(4, 0.05), (5, 0.2)]}),  # at the peak
        course(TURNS, {rule.name: [(12, 0.3)]}),  # at the measurement of step 10
        course(TURNS, {rule.name: [(20, 0.3)]}),
        course(TURNS),
        course(CALM, {rule.name: [(5, 0.11)]}),
        course(CALM, {rule.name: [(5, 0.1)]}),  # not above the threshold
    ]
    found = h.counted(runs, h.earliest([rule]))
    numbers = [found[word] for word in ("before", "in time", "late", "missed", "false")]
    assert numbers == [1, 1, 1, 1, 1]
    # leads of 0, -7 and -15 steps; KL 1 at the peak and 1, 4 and 16 at the alarms
    assert (found["lead, steps"], found["lead, nats"]) == (-7, -3.0)
    # gold at step 5, 10, 20 and 20, and of the calm ones at 5 and at the end
    assert found["gold"] == pytest.approx((2.0 + 1.9 - 1.0 - 1.0 + 1.0 + 2.0) / 6)
    assert h.youden(runs, h.earliest([rule])) == 0.0  # 2 of 4, less 1 of 2
    assert h.first(runs[0], rule, 0.01) == 4


def test_a_threshold_is_chosen_among_what_runs_reach():
    """0.2 parts those that turned (0.5, 0.3) from the others (0.2, 0.0)."""
    name = health.REPETITION.name
    runs = [course(TURNS, {name: [(5, 0.5)]}), course(TURNS, {name: [(10, 0.3)]})]
    runs += [course(CALM, {name: [(5, 0.2)]}), course(CALM, {name: [(5, 0.0)]})]
    assert h.better_limit(runs, health.REPETITION) == (0.2, 1.0)
    entropies = [course(TURNS, {"entropy": [(5, 0.2)]}), course(CALM, {"entropy": [(5, 0.4)]})]
    assert h.better_limit(entropies, health.ENTROPY) == (0.4, 1.0)  # fires below it


def line(step, **values):
    return {"step": step} | {name.replace("_", "/", 1): value for name, value in values.items()}


def test_the_rules_are_tried_again_as_the_run_tried_them():
    """Length from 10 to 20 tokens by eight iterations: medians of the first four and of the last
    eight. The monitor falls twice in a row by three errors and more while the training score rises.
    """
    measured = {"monitor/kl": 1.0, "monitor/truncated": 0.0, "monitor/distinct_2": 1.0}
    measured |= {"monitor/repeated": 0.0, "monitor/copied": 0.0, "monitor/length": 10.0}
    lines = [{"step": 0, "monitor/score": 0.0} | measured]
    for step in range(1, 9):
        lines.append({"step": step, "length_mean": 10.0 if step < 5 else 20.0})
        lines[-1] |= {"objective/scores": float(step)}
    scores = [[0.0, 0.0], [5.0, 5.0], [1.0, 2.0], [0.0, 1.0]]
    for number, step in enumerate((2, 4, 6), 1):
        lines[step] |= {"monitor/score": float(np.mean(scores[number]))} | measured
    lines[6] |= {"monitor/repeated": 0.3, "monitor/copied": 0.4, "monitor/kl": 12.0}
    seen, proxies = h.replay(lines, scores)
    assert seen["length"] == [(0, 1.0), (2, 1.0), (4, 1.0), (6, 1.0), (8, 1.5)]
    assert seen["KL"][-1] == (6, 12.0)
    assert seen["repetition"][-1] == (6, 0.3)
    assert seen["copying"][-1] == (6, 0.4)
    # differences 4 and 3: mean 3.5, error 0.5; then 5 and 4: 4.5 by 0.5; the least of the two
    assert seen[health.GAMED.name] == [(4, 0.0), (6, pytest.approx(7.0))]
    assert seen[health.JUDGE.name] == []
    assert math.isnan(proxies[0]) and proxies[1:] == [1.5, 2.5, 3.5]


def test_the_step_that_is_kept_by_hand():
    """One monitor likes step 15 best, where gold is 1.0 of 2.0, the other step 5, the peak."""
    monitor = np.array([[0.0], [1.0], [2.0], [3.0], [2.0]])
    other = np.array([[0.0], [3.0], [3.0], [1.0], [0.0]])
    runs = [course(TURNS, monitors={"m": monitor}), course(TURNS, monitors={"m": other})]
    assert [h.kept(run, "m") for run in runs] == [3, 1]
    found = h.keeping([*runs, course(CALM, monitors={"m": monitor[:3]})], "m")
    assert (found["turned"], found["runs"]) == (2, 2)
    assert found["of the peak"][0] == pytest.approx((1.0 + 2.0) / (2.0 + 2.0))
    assert found["within 5 %"][0] == 1
    assert found["the end's"] == pytest.approx(-2.0 / 4.0)


def test_forecasts_by_hand():
    """Turns at 9 nats in the half that chooses, at 9 and 36 in the other; slopes tell nothing."""
    rise = [(0.0, 0.1), (1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (0.0, 0.1)]
    monitors = {"neighbour": np.array([[0.0, 1.0]] * 5)}
    proxies = [0.0] * 5

    def run(number, factor):
        kl = [factor * i * i for i in range(5)]
        return course(rise, monitors=monitors, kl=kl, number=number, proxies=proxies)

    told = h.turns([run(0, 1.0), run(1, 1.0), run(2, 1.0), run(3, 4.0)])
    middle = told["median of the other half's turns"]
    assert middle["runs"] == 2 and middle["median factor"] == pytest.approx(2.0)  # of 1 and 4
    assert middle["within a factor of 2"][0] == 1
    line = told["line in slopes up to EARLY nats"]
    assert line["median factor"] == pytest.approx(2.0)
    gao = told["Gao's form of the monitor, half the way"]
    assert (gao["none"], gao["median factor"]) == (2, None)


def test_gold_is_the_worst_where_nothing_is_new():
    """Plain 2 and half of it repeated: 2 - 0.5 * 6; all repeated is -4 whatever plain says."""
    shares = {"a": 0.0, "b": 0.5, "c": 1.0}
    task = Task([], [], {}, lambda prompts, texts: [2.0 for _ in texts], shares.__getitem__, None)
    assert task.gold(["", "", ""], ["a", "b", "c"]) == [2.0, -1.0, -4.0]


def test_readers_of_a_text_take_turns():
    """The third and, in turn, the first: 2 and -1 for a plot."""
    readers = [Annotator({"plot": taste}) for taste in (-1.0, 5.0, 2.0)]
    assert mean_taste(readers, 2, 2, "A plot.") == 0.5
    assert mean_taste(readers, 5, 1, "A plot.") == 2.0


class Echo:
    """An engine whose answers are a prompt's number and the version of the weights."""

    def __init__(self):
        self.version = 0

    def sync(self, model, version):
        self.version = version

    def generate(self, prompts, n, sampling, seed, numbers=None, on_done=None):
        numbers = numbers or range(len(prompts))
        reason = "length" if self.version else "stop"
        pairs = zip(prompts, numbers, strict=True)
        return [
            [Sample(i, j, (*ids, number), (), reason, self.version) for j in range(n)]
            for i, (ids, number) in enumerate(pairs)
        ]


def test_other_prompts_are_answered_at_each_measurement(tmp_path):
    """The monitor gets its own answers, as without; rollouts have none of the others'."""
    model = SimpleNamespace(encoder=SimpleNamespace(decode=lambda ids: "-".join(map(str, ids))))
    engine = Apart(Echo(), model, tmp_path / "watched.jsonl", [(7,), (8,)])
    for version in (-1, 3, -1):
        engine.sync(model, version)
        n = 2 if version == 3 else 1
        found = engine.generate([(5,), (6,)], n, None, 0, None if n == 2 else (0, 1))
        assert [[one.tokens for one in group] for group in found] == [[(5, 0)] * n, [(6, 1)] * n]
    gold = answers_of(tmp_path, "gold")
    assert gold.prompts == ["7", "8"]
    assert gold.completions == [["7-2", "8-3"]] * 2
    assert gold.ended == [[False, False]] * 2
    assert answers_of(tmp_path, "monitor").completions == [["5-0", "6-1"]] * 2
    assert gold.by(lambda prompts, texts, ended: [len(t) for t in texts]).tolist() == [[3, 3]] * 2
