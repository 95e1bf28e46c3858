"""Reward models choose what is ranked first: their scores go into the store."""

import json

import pytest

from prefloop import commands
from prefloop.config.labelling import LabelScoreConfig
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.labelling.assign import next_assignment, submit
from prefloop.labelling.imports import add_samples, uncertainty_and_gap
from prefloop.rewards.judges import load_judge
from tests.labelling.small import add, in_order, open_store, put, rows
from tests.training.small import train, write_world

TWO = "def scores(prompts, answers):\n    return [float(len(a)) for a in answers]\n"
ONE = TWO.replace("float(len(a))", "len(a) + 5.0 * (a == ' says 7.0')")


@pytest.fixture
def judges(tmp_path, monkeypatch):
    (tmp_path / "first_judge.py").write_text(ONE)
    (tmp_path / "second_judge.py").write_text(TWO)
    monkeypatch.chdir(tmp_path)
    return ("first_judge:scores", "second_judge:scores")


def score(folder, *models, **changes):
    return commands.label_score(
        LabelScoreConfig(store=str(folder / "labels.db"), reward_model=models, **changes)
    )


def select(store, query):
    with store.read() as t:
        return t.connection.exec_driver_sql(query).all()


def test_the_most_disputed_task_comes_first(judges, tmp_path):
    """Only of task 7 the two models disagree (14 and 10, 9 and 10): deviation 2.5, gap 1.5."""
    data = [
        row | {"completions": [f" says {n}.0", f" tell {n}.1."]} for n, row in enumerate(rows(9))
    ]
    put(tmp_path, data, random_share=0.2)
    told = score(tmp_path, *judges)
    assert told == {"project": "main", "answers": 18, "tasks": 9}
    store = open_store(tmp_path)
    found = select(store, "SELECT uncertainty, gap FROM tasks ORDER BY uncertainty DESC")
    assert found[0] == pytest.approx((2.5, 1.5))
    assert found[1] == pytest.approx((0.0, 1.0))
    (event,) = select(store, "SELECT detail FROM events WHERE action = 'score'")
    assert json.loads(event[0])["models"] == list(judges)
    firsts = []
    for name in ("ann", "bob", "cyd", "dan", "eve", "fay"):
        (one,) = add(store, name)
        task = next_assignment(store, one)
        firsts.append(
            select(store, f"SELECT uncertainty FROM tasks WHERE id = {task.task_id}")[0][0]
        )
        submit(store, one, task.id, in_order(task, name))
    assert firsts.count(pytest.approx(2.5)) == 1
    strategies = select(store, "SELECT strategy FROM assignments")
    assert ("uncertainty",) in strategies


def test_scores_are_the_reward_models(tmp_path):
    """A trained model's, gap by hand from them; answers that came later are scored, too."""
    write_world(tmp_path)
    train("reward", tmp_path, tmp_path / "rm", max_steps=1)
    model = str(tmp_path / "rm" / "model")
    data = [{"prompt": f"p{n}", "completions": [" yes", " no", " maybe"]} for n in range(3)]
    put(tmp_path, data[:2])
    score(tmp_path, model, strategy="gap", device="cpu", dtype="float32")
    put(tmp_path, data, strategy="random")
    assert score(tmp_path, model, strategy="gap", device="cpu", dtype="float32")["answers"] == 9
    store = open_store(tmp_path)
    judge = load_judge(model, device="cpu")
    stored = select(
        store,
        "SELECT p.prompt, r.completion, r.scores, t.gap FROM responses r JOIN prompts p "
        "ON p.id = r.prompt_id JOIN tasks t ON t.prompt_id = p.id ORDER BY r.id",
    )
    assert len(stored) == 9
    for group in (stored[0:3], stored[3:6], stored[6:9]):
        prompts, answers, given, gaps = zip(*group, strict=True)
        exact = judge([json.loads(p) for p in prompts], [json.loads(a) for a in answers])
        assert [json.loads(s)[0] for s in given] == pytest.approx(exact, abs=1e-4)
        assert gaps[0] == pytest.approx(uncertainty_and_gap([exact])[1], abs=1e-4)


def test_new_answers_go_into_a_scored_project(judges, tmp_path):
    """They wait at the end until they are scored; the strategy stays."""
    put(tmp_path, rows(2))
    score(tmp_path, *judges)
    write_jsonl(tmp_path / "more.jsonl", rows(3))
    told = add_samples(f"{tmp_path / 'labels.db'}#main", tmp_path / "more.jsonl")
    assert told["tasks"] == 1
    store = open_store(tmp_path)
    (settings,) = select(store, "SELECT settings FROM projects")
    assert json.loads(settings[0])["strategy"] == "uncertainty"
    assert score(tmp_path, *judges)["tasks"] == 3


def test_bad_input_is_one_line(judges, tmp_path):
    put(tmp_path, rows(1))
    with pytest.raises(UserError, match="uncertainty needs two"):
        score(tmp_path, judges[0])
    with pytest.raises(UserError, match="no project other"):
        score(tmp_path, *judges, project="other")
    with pytest.raises(UserError, match="absent"):
        commands.label_score(
            LabelScoreConfig(store=str(tmp_path / "absent.db"), reward_model=judges)
        )
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(UserError, match="cannot import it"):
        score(tmp_path, "nothing_here:scores", strategy="gap")
    store = open_store(tmp_path)
    assert select(store, "SELECT count(*) FROM responses WHERE scores <> 'null'") == [(0,)]
