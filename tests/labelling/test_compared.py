"""Compared answers as tasks: what is asked, what is merged, what is told, and how blind it is."""

from collections import Counter

import pytest

from prefloop.errors import UserError
from prefloop.labelling.compared import read_compared
from prefloop.labelling.store.reading import responses_of
from prefloop.labelling.store.scoring import tasks_of
from tests.labelling.small import compare_folder, open_store, put

ANSWERS = {
    "SFT": [["a", "a2"], ["same", "s2"], ["x", "x"]],
    "PPO": [["b", "b2"], ["same", "p2"], ["x", "y"]],
    "best-of-4": [["a"], ["other"], ["x"]],
}


def stored(tmp_path):
    """Of each task: its texts in the order of the store, and how they ended."""
    store = open_store(tmp_path)
    with store.read() as t:
        found, tasks = responses_of(t, 1), tasks_of(t, 1)
    return [
        [(found[i]["completion"], found[i]["finish_reason"]) for i in g] for g in tasks.values()
    ]


def test_a_prompt_is_a_task_and_a_text_stands_once(tmp_path):
    folder = compare_folder(tmp_path / "compare", ANSWERS, cut=("a", "other"))
    result = put(tmp_path, folder)
    assert (result["tasks"], result["rows"]) == (2, 2)
    assert result["dropped"] == {
        "answer equal to another one": 4,
        "prompt that all ways answered alike": 1,
    }
    tasks = [sorted(task) for task in stored(tmp_path)]
    assert sorted(tasks) == [
        [("a", "length"), ("b", "stop")],
        [("other", "length"), ("same", "stop")],
    ]
    assert put(tmp_path, folder, seed=5)["tasks"] == 0  # the same again, whatever the seed


def test_more_samples_are_more_tasks_of_the_same_prompts(tmp_path):
    folder = compare_folder(tmp_path / "compare", ANSWERS)
    assert put(tmp_path, folder, samples=2, mode="pairwise")["tasks"] == 5
    second = [question.said.keys() for question in read_compared(str(folder))][1::2]
    assert [list(ways) for ways in second] == [["SFT", "PPO"]] * 3
    texts = [sorted(text for text, _ in task) for task in stored(tmp_path)]
    assert sorted(texts) == [["a", "b"], ["a2", "b2"], ["other", "same"], ["p2", "s2"], ["x", "y"]]


def test_a_chat_is_asked_as_a_chat(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    folder = compare_folder(tmp_path / "compare", {"SFT": [["a"]], "PPO": [["b"]]}, [chat])
    put(tmp_path, folder)
    assert sorted(text[0]["content"] for text, _ in stored(tmp_path)[0]) == ["a", "b"]


@pytest.mark.parametrize(
    ("answers", "changes", "told"),
    [
        (ANSWERS, {"samples": 3}, "--samples 3"),
        ({"SFT": [["a"]]}, {}, "two ways or more"),
        ({"SFT": [["a"]], "PPO": [["a"]]}, {}, "all ways answered alike"),
        ({f"w{n}": [[f"t{n}"]] for n in range(10)}, {}, "10 answers; labellers rank 2 to 9"),
        (ANSWERS, {"gold": True}, "needs `tiers`"),
    ],
)
def test_what_cannot_be_asked_is_told(tmp_path, answers, changes, told):
    folder = compare_folder(tmp_path / "compare", answers)
    with pytest.raises(UserError, match=told):
        put(tmp_path, folder, **changes)


def test_samples_are_of_a_comparison_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    with pytest.raises(UserError, match="no folder of prefloop compare"):
        put(tmp_path, tmp_path / "rows.jsonl", samples=2)


@pytest.mark.parametrize("column", ["judge", "way", "truncated"])
def test_a_damaged_folder_is_told_with_its_line(tmp_path, column):
    folder = compare_folder(tmp_path / "compare", ANSWERS)
    path = folder / "answers.jsonl"
    path.write_text(path.read_text().replace(f'"{column}"', '"other"', 1))
    with pytest.raises(UserError, match=r"answers.jsonl:1: needs prompt, way, completions"):
        put(tmp_path, folder)


def test_the_order_in_the_store_tells_nothing(tmp_path):
    """Each of three ways stands in each place a third of the time: within 4 deviations of 100."""
    ways = ("SFT", "PPO", "DPO")
    answers = {way: [[f"{number} {way[::-1]}"] for number in range(300)] for way in ways}
    put(tmp_path, compare_folder(tmp_path / "compare", answers))
    places = Counter(
        (text.split()[1], place)
        for task in stored(tmp_path)
        for place, (text, _) in enumerate(task)
    )
    assert len(places) == 9
    assert all(abs(count - 100) < 4 * (300 * 2 / 9) ** 0.5 for count in places.values())


def test_the_runs_of_a_way_take_turns(tmp_path):
    """Two runs of PPO with two answers each: one prompt begins with 1, the next with 2."""
    folder = compare_folder(tmp_path / "compare", {"SFT": [["a"], ["b"]]})
    for run in (1, 2):
        said = [[f"{run}.{answer}" for answer in range(2)]] * 2
        part = compare_folder(tmp_path / f"run-{run}", {"PPO": said})
        text = (part / "answers.jsonl").read_text().replace('"way"', f'"run": {run}, "way"')
        with (folder / "answers.jsonl").open("a") as file:
            file.write(text)
    found = [question.said["PPO"].text for question in read_compared(str(folder))]
    assert found == ["1.0", "2.0", "1.1", "2.1", "2.0", "1.0", "2.1", "1.1"]
    assert put(tmp_path, folder)["tasks"] == 2
