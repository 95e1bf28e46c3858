"""The verdict by people, from a labelling store taken back to compare's folder."""

import json
from html import unescape

import numpy as np
import pytest
from scipy.optimize import minimize

from prefloop.config import PeopleConfig
from prefloop.errors import UserError
from prefloop.evaluation.labelled import run
from prefloop.evaluation.people_table import matrix, terminal
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store.reading import texts_of
from tests.labelling.small import add, compare_folder, open_store, put

ANSWERS = {  # the judge prefers long texts, the reward model late letters
    "SFT": [["a1"], ["a2"], ["same"], ["a4"]],
    "PPO": [["bb1"], ["bb2"], ["same"], ["c4"]],
    "DPO": [["ccc1"], ["a2"], ["other"], ["c4"]],
}


@pytest.fixture
def made(tmp_path):
    folder = compare_folder(tmp_path / "compare", ANSWERS, reward_model=lambda text: ord(text[0]))
    put(tmp_path, folder, need=2)
    store = open_store(tmp_path)
    yield store, folder, PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(folder))
    store.close()


def judge(store, name, say):
    """All of a labeller's tasks; `say(texts)` gives a list of tied lists of texts, or None."""
    (who,) = add(store, name)
    while task := next_assignment(store, who):
        with store.read() as t:
            _, texts = texts_of(t, task.prompt_id, task.response_ids)
        said = say(texts)
        more = {}
        if isinstance(said, tuple):
            said, flagged, all_bad = said
            more = {"flags": [{"answer": texts.index(x), "flag": "false"} for x in flagged]}
            more["all_bad"] = all_bad
        tiers = said and [[texts.index(text) for text in tier] for tier in said]
        submit(store, who, task.id, Judgement(tiers, request_id=f"{name}-{task.id:04}", **more))


def first_best(texts):
    return [[text] for text in sorted(texts)]


def last_best(texts):
    return [[text] for text in sorted(texts)[::-1]]


def by_pair(verdict):
    return {(pair.first, pair.second): pair for pair in verdict.pairs}


def test_who_wrote_what_is_found_again(made):
    """Ann puts the earliest letter first: a1 > bb1 > ccc1, a2 > bb2, other > same, a4 > c4."""
    store, _, config = made
    judge(store, "ann", first_best)
    verdict = run(config)
    pairs = by_pair(verdict)
    told = {names: (p.wins, p.ties, p.losses) for names, p in pairs.items()}
    assert told == {
        ("SFT", "PPO"): (3, 0, 0),  # prompts 1, 2 and 4; in 3 they are the same text
        ("SFT", "DPO"): (2, 0, 1),  # 1, 3 (other is before same), 4
        ("PPO", "DPO"): (1, 0, 2),  # 1; DPO wrote SFT's a2, and `other`
    }
    assert (verdict.judgements, verdict.prompts, verdict.labellers) == (4, 4, 1)
    assert {names: p.same_text for names, p in pairs.items()} == {
        ("SFT", "PPO"): 0.25,
        ("SFT", "DPO"): 0.25,
        ("PPO", "DPO"): 0.25,
    }
    assert pairs["SFT", "PPO"].win_rate.mean == 1.0
    assert pairs["SFT", "PPO"].win_rate.low < 0.5  # of three
    # The judge: bb1, bb2 are longer, a4 and c4 tie; letters: PPO three times.
    assert pairs["SFT", "PPO"].judge == pytest.approx((0 + 0 + 0.5) / 3)
    assert pairs["SFT", "PPO"].reward_model == 0.0
    assert [one.way for one in verdict.strengths] == ["SFT", "PPO", "DPO"]
    assert verdict.strengths[0].value.mean == 0.0 > verdict.strengths[1].value.mean
    # Six pairs of texts. Late letters are the reward model's, and ann's are early ones: never.
    assert (verdict.agreement.pairs, verdict.agreement.shared) == (6, 0)
    assert verdict.agreement.reward_model.mean == 0.0
    # The judge is against her on a1, bb1, ccc1 and a2, bb2; for her on `other`; a4 and c4 tie.
    assert verdict.agreement.judge.mean == pytest.approx((1 + 0.5) / 6)
    assert verdict.agreement.people is None
    assert "how far people agree is not known" in verdict.sentences[-1]


def test_the_verdict_is_written_beside_the_comparison(made):
    store, folder, config = made
    judge(store, "ann", first_best)
    verdict = run(config)
    told = json.loads((folder / "people.json").read_text())
    assert json.loads((folder / "compare.json").read_text())["people"] == told
    assert told["pairs"][0]["win_rate"]["mean"] == 1.0
    assert tuple(told["sentences"]) == verdict.sentences
    page = unescape((folder / "report.html").read_text())
    assert "What people prefer" in page
    assert all(sentence in page for sentence in verdict.sentences)
    judge(store, "bob", last_best)
    assert run(config).sentences != verdict.sentences  # and again, over what was written


def test_people_among_each_other_are_the_ceiling(made):
    """Ann and bob contradict each other in everything: agreement 0, and each way wins half."""
    store, _, config = made
    judge(store, "ann", first_best)
    judge(store, "bob", last_best)
    verdict = run(config)
    assert (verdict.agreement.shared, verdict.agreement.people.mean) == (6, 0.0)
    assert verdict.agreement.ceiling is None
    assert {p.win_rate.mean for p in verdict.pairs} == {0.5}
    assert {p.more for p in verdict.pairs} == {None}
    assert verdict.agreement.judge.mean == 0.5
    assert "no number of judgements tells an even share apart" in verdict.sentences[0]
    alone = run(PeopleConfig(labels=config.labels, data=config.data, exclude=("bob",)))
    assert by_pair(alone)["SFT", "PPO"].wins == 3
    assert alone.left_out == {"labeller bob excluded": 4}
    with pytest.raises(UserError, match="--exclude eve: no labeller"):
        run(PeopleConfig(labels=config.labels, data=config.data, exclude=("eve",)))


def test_flags_and_skips_are_told_and_are_no_ties(made):
    """A tie with a flagged answer is left out; an order with one stays; all bad is told."""
    store, folder, config = made

    def say(texts):
        if "same" in texts:
            return None
        if "a4" in texts:
            return [["a4", "c4"]], ["c4"], False  # c4 is PPO's and DPO's
        if "bb2" in texts:
            return [["a2", "bb2"]], [], True
        return [["a1"], ["bb1", "ccc1"]], ["bb1"], False

    judge(store, "ann", say)
    verdict = run(config)
    told = {names: (p.wins, p.ties, p.losses) for names, p in by_pair(verdict).items()}
    assert told == {("SFT", "PPO"): (1, 1, 0), ("SFT", "DPO"): (1, 0, 0), ("PPO", "DPO"): (0, 1, 0)}
    assert verdict.flags == {"PPO": {"false": 2}, "DPO": {"false": 1}}
    assert verdict.left_out == {"skipped": 1, "tie with a flagged answer": 2}
    assert verdict.all_bad == 1
    page = (folder / "report.html").read_text()
    assert (
        "Flagged, PPO: false 2. " in page and "Not counted: tie with a flagged answer 2. " in page
    )


def test_other_work_in_the_project_is_left_out(made, tmp_path):
    store, _, config = made
    rows = tmp_path / "more.jsonl"
    rows.write_text('{"prompt": "prompt 1", "completions": ["a2", "elsewhere"]}\n')
    put(tmp_path, rows)
    judge(store, "ann", first_best)
    assert run(config).left_out == {"of answers that are not in the comparison": 1}


def test_nothing_to_say_is_an_error(made, tmp_path):
    _, folder, config = made
    with pytest.raises(UserError, match="nothing that people said"):
        run(config)
    with pytest.raises(UserError, match=r"no answers\.jsonl and compare.json"):
        run(PeopleConfig(labels=config.labels, data=str(tmp_path)))
    with pytest.raises(UserError, match="no such file"):
        run(PeopleConfig(labels="absent.db", data=str(folder)))


@pytest.mark.parametrize("mode", ["ranking", "pairwise"])
def test_samples_and_modes_give_the_same_verdict(tmp_path, mode):
    """Two samples: each of a prompt's pairs of ways counts once a sample."""
    answers = {"SFT": [["a1", "b1"], ["a2", "x"]], "PPO": [["c1", "a1"], ["c2", "y"]]}
    answers["best-of-2"] = [["d1"], ["d2"]]
    folder = compare_folder(tmp_path / "compare", answers)
    put(tmp_path, folder, mode=mode, samples=2)
    store = open_store(tmp_path)
    judge(store, "ann", first_best)
    pairs = by_pair(run(PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(folder))))
    told = {names: (p.wins, p.ties, p.losses, p.prompts) for names, p in pairs.items()}
    # a1 < c1, b1 > a1, a2 < c2, x < y; best-of-2 is last of all.
    assert told == {
        ("SFT", "PPO"): (3, 0, 1, 2),
        ("SFT", "best-of-2"): (2, 0, 0, 2),
        ("PPO", "best-of-2"): (2, 0, 0, 2),
    }


def test_a_clear_verdict_in_words_and_in_tables(tmp_path):
    """Forty prompts, DPO always before SFT, PPO and SFT by turns."""
    answers = {
        "SFT": [["b"]] * 40,
        "DPO": [["a"]] * 40,
        "PPO": [["c" if n % 2 else "aa"] for n in range(40)],
    }
    folder = compare_folder(tmp_path / "compare", answers)
    put(tmp_path, folder)
    store = open_store(tmp_path)
    judge(store, "ann", first_best)
    verdict = run(PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(folder)))
    assert verdict.sentences[0] == (
        "People prefer DPO to SFT: 100% [91%, 100%] of 40 judgements, ties half (40 prompts, "
        "1 person); 99% [89%, 100%] at equal length."
    )
    assert verdict.sentences[1].startswith("People do not tell PPO from SFT: 50% [35%, 65%] of 40")
    sft, dpo, _ = matrix(verdict)
    assert sft[:3] == ["SFT", "–", "0.00 [0.00, 0.09]"]
    assert dpo[1] == "1.00 [0.91, 1.00]"
    assert sft[4] == "0"
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(terminal(verdict))
    text = console.export_text()
    assert text.startswith("People prefer DPO to SFT")
    assert "40 judgements of 40 prompts by 1 person" in text


def test_equal_length_is_that_of_a_fit_by_scipy(tmp_path):
    """Ann goes by length alone, bob takes DPO."""
    lengths = [(3, 8), (4, 6), (9, 2), (5, 5), (7, 1), (2, 6), (6, 3), (1, 9)]
    answers = {
        "SFT": [["a" * one] for one, _ in lengths],
        "DPO": [["b" * other] for _, other in lengths],
    }
    put(tmp_path, compare_folder(tmp_path / "compare", answers), need=2)
    store = open_store(tmp_path)
    judge(store, "ann", lambda texts: [[text] for text in sorted(sorted(texts), key=len)[::-1]])
    judge(store, "bob", last_best)
    config = PeopleConfig(labels=str(tmp_path / "labels.db"), data=str(tmp_path / "compare"))
    (pair,) = run(config).pairs
    d = np.array([one - other for one, other in lengths], dtype=float)
    z = np.tanh(d / d.std())
    wins = (d > 0) / 2  # of SFT, by the two of them; where lengths are equal ann takes b, too

    def loss(at):
        logits = at[0] + at[1] * z
        tie = np.logaddexp(0, at[0]) - at[0] / 2
        return np.sum(np.logaddexp(0, logits) - wins * logits) + tie + 0.05 * at[1] ** 2

    theta = minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    assert pair.length_controlled.mean == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-4)
    assert pair.win_rate.mean == pytest.approx(wins.mean())


def test_answers_without_a_score_are_told(made):
    store, folder, config = made
    path = folder / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:2]:  # SFT's first two
        row["judge"] = [None]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(store, "ann", first_best)
    verdict = run(config)
    # a1 with bb1 and ccc1; a2 has a score as DPO's, and is shorter than bb2. Of the others bb1 is
    # shorter than ccc1, `other` is longer than `same`, and a4 and c4 are as long.
    why = "pair that the judge has no score of (for its agreement alone)"
    assert verdict.left_out == {why: 2}
    assert verdict.agreement.judge.mean == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert by_pair(verdict)["SFT", "PPO"].judge == 0.5
