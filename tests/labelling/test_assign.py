"""Hand-out: `need`, leases, order, gold, repeats, strategies; with 20 labellers at once."""

import multiprocessing
import threading
from collections import Counter

import pytest
from sqlalchemy import text

from prefloop.labelling.assign import (
    Judgement,
    Refused,
    next_assignment,
    reopen,
    save_draft,
    submit,
)
from prefloop.labelling.store import Store
from tests.labelling.small import Clock, add, in_order, open_store, put, rows

MINUTE = 60.0


def select(store, query):
    with store.read() as t:
        return t.connection.execute(text(query)).all()


def taken_and_done(store):
    return select(store, "SELECT taken, done FROM tasks ORDER BY id")


def refused(reason):
    return pytest.raises(Refused, match=f"^{reason}$")


def test_a_task_in_the_hand_stays_until_it_is_done(tmp_path):
    put(tmp_path, rows(2))
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    assert next_assignment(store, ann) == first
    assert sorted(first.shown) == [0, 1, 2]
    assert next_assignment(store, bob).task_id != first.task_id
    assert submit(store, ann, first.id, in_order(first, "r1")) == 1
    assert next_assignment(store, ann) is None
    assert taken_and_done(store) == [(1, 1), (1, 0)] or taken_and_done(store) == [(1, 0), (1, 1)]


def test_need_is_counted_over_labellers(tmp_path):
    put(tmp_path, rows(1), need=2)
    store = open_store(tmp_path)
    ann, bob, cat = add(store, "ann", "bob", "cat")
    assert next_assignment(store, ann).task_id == next_assignment(store, bob).task_id
    assert next_assignment(store, cat) is None


def test_overlap_is_the_share_of_prompts_that_more_labellers_see(tmp_path):
    """1,000 prompts at 15 %: 150 are expected, with a standard deviation of 11."""
    put(tmp_path, rows(1000, answers=2), overlap=0.15, overlap_need=3)
    found = Counter(need for (need,) in select(open_store(tmp_path), "SELECT need FROM tasks"))
    assert set(found) == {1, 3}
    assert 110 < found[3] < 190


def test_the_order_shown_is_each_labellers_own_and_stays(tmp_path):
    put(tmp_path, rows(40, answers=4), need=2)
    seen = []
    for _ in range(2):  # the same in a store made anew
        store = open_store(tmp_path)
        ann, bob = add(store, "ann", "bob")
        orders = []
        for number in range(40):
            for labeller in (ann, bob):
                task = next_assignment(store, labeller)
                orders.append((task.task_id, labeller, tuple(task.shown)))
                submit(store, labeller, task.id, in_order(task, f"{labeller}-{number}"))
        seen.append(orders)
        store.close()
        for path in tmp_path.glob("labels.db*"):
            path.unlink()
        put(tmp_path, rows(40, answers=4), need=2)
    assert seen[0] == seen[1]
    firsts = Counter(order[0] for _, _, order in seen[0])
    assert all(8 <= firsts[i] <= 33 for i in range(4))  # 80 orders: 20 expected, 4 sd is 15
    assert any(a[2] != b[2] for a, b in zip(seen[0][::2], seen[0][1::2], strict=True))


def test_leases_run_out_and_the_work_goes_on(tmp_path):
    clock = Clock()
    put(tmp_path, rows(1), lease_minutes=30.0)
    store = open_store(tmp_path, clock)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    clock.now += 20 * MINUTE
    save_draft(store, ann, first.id, {"places": {"0": 1}})  # a sign of life renews it
    clock.now += 20 * MINUTE
    assert next_assignment(store, bob) is None
    clock.now += 11 * MINUTE
    second = next_assignment(store, bob)
    assert second.task_id == first.task_id
    with refused("stale-lease"):
        save_draft(store, ann, first.id, {"places": {"0": 2}})
    with refused("stale-lease"):
        submit(store, ann, first.id, in_order(first, "late"))
    events = select(store, "SELECT action, detail FROM events WHERE action = 'stale lease'")
    assert len(events) == 1  # what ann said is not lost
    assert "[[0], [1], [2]]" in events[0][1]
    submit(store, bob, second.id, in_order(second, "in time"))
    assert taken_and_done(store) == [(1, 1)]


def test_a_late_submission_is_taken_while_there_is_room(tmp_path):
    clock = Clock()
    put(tmp_path, rows(2), need=2)
    store = open_store(tmp_path, clock)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    clock.now += 31 * MINUTE
    next_assignment(store, bob)  # ann's lease is taken back
    assert submit(store, ann, first.id, in_order(first, "late")) == 1
    assert sorted(taken_and_done(store)) == [(0, 0), (2, 1)]


def test_an_expired_task_comes_back_to_its_labeller_as_it_was(tmp_path):
    clock = Clock()
    put(tmp_path, rows(1, answers=9))
    store = open_store(tmp_path, clock)
    (ann, bob) = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    clock.now += 31 * MINUTE
    second = next_assignment(store, bob)
    submit(store, bob, second.id, Judgement(tiers=None, request_id="skip"))
    again = next_assignment(store, ann)
    assert (again.id, again.shown) == (first.id, first.shown)


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_holds_nothing_up(tmp_path, jump):
    """Forwards: leases run out early, and submissions are still taken. Backwards: a lease from the
    future is taken back."""
    clock = Clock()
    put(tmp_path, rows(2))
    store = open_store(tmp_path, clock)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    clock.now += jump
    second = next_assignment(store, bob)
    if second.task_id != first.task_id:
        submit(store, ann, first.id, in_order(first, "a"))
    submit(store, bob, second.id, in_order(second, "b"))
    third = next_assignment(store, bob)
    if third is not None:
        submit(store, bob, third.id, in_order(third, "c"))
    assert taken_and_done(store) == [(1, 1), (1, 1)]


def test_versions_are_kept_and_the_newest_wins(tmp_path):
    put(tmp_path, rows(1))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    first = next_assignment(store, ann)
    submit(store, ann, first.id, in_order(first, "r1", confidence=1))
    again = reopen(store, ann)
    assert again.said["tiers"] == [[0], [1], [2]]
    changed = in_order(again, "r2", tiers=[[2, 1], [0]], confidence=3)
    assert submit(store, ann, first.id, changed) == 2
    stored = select(store, "SELECT version, tiers FROM annotations ORDER BY version")
    assert stored == [(1, "[[0], [1], [2]]"), (2, "[[2, 1], [0]]")]
    assert taken_and_done(store) == [(1, 1)]


def test_the_same_request_twice_writes_once(tmp_path):
    put(tmp_path, rows(2))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    first = next_assignment(store, ann)
    said = in_order(first, "r1")
    assert submit(store, ann, first.id, said) == submit(store, ann, first.id, said) == 1
    with refused("already-submitted"):  # a second tab that had seen version 0
        submit(store, ann, first.id, in_order(first, "r2"))
    assert select(store, "SELECT count(*) FROM annotations") == [(1,)]
    second = next_assignment(store, ann)
    with refused("already-submitted"):
        submit(store, ann, second.id, in_order(second, "r1"))


def test_another_labellers_task_is_refused(tmp_path):
    put(tmp_path, rows(1))
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    with refused("not-yours"):
        submit(store, bob, first.id, in_order(first, "r"))
    with refused("not-yours"):
        save_draft(store, bob, first.id, {})


@pytest.mark.parametrize(
    "said",
    [
        {"tiers": [[0], [1]]},
        {"tiers": [[0], [1], [2], [2]]},
        {"tiers": [[0, 1, 2], []]},
        {"tiers": [[0], [1], [3]]},
        {"flags": [{"flag": "rude", "answer": 0}]},
        {"flags": [{"flag": "false", "answer": 3}]},
    ],
)
def test_malformed_judgements_are_refused(tmp_path, said):
    put(tmp_path, rows(1))
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    first = next_assignment(store, ann)
    with refused("malformed"):
        submit(store, ann, first.id, in_order(first, "r", **said))
    assert taken_and_done(store) == [(1, 0)]


def test_skip_and_its_undo(tmp_path):
    put(tmp_path, rows(1))
    store = open_store(tmp_path)
    ann, bob = add(store, "ann", "bob")
    first = next_assignment(store, ann)
    submit(store, ann, first.id, Judgement(tiers=None, request_id="s"))
    assert taken_and_done(store) == [(0, 0)]
    assert next_assignment(store, ann) is None  # a skipped task does not come back by itself
    again = reopen(store, ann)
    assert (again.id, again.state, again.version) == (first.id, "skipped", 1)
    submit(store, ann, again.id, in_order(again, "r"))
    assert taken_and_done(store) == [(1, 1)]
    done = reopen(store, ann)
    skip = Judgement(tiers=None, request_id="s2", base_version=done.version)
    submit(store, ann, done.id, skip)
    assert taken_and_done(store) == [(0, 0)]
    assert next_assignment(store, bob).task_id == first.task_id


def test_gold_comes_to_each_labeller_once(tmp_path):
    put(tmp_path, rows(30))
    gold = [
        {**row, "prompt": f"gold {n}", "tiers": [[2], [0], [1]]} for n, row in enumerate(rows(3))
    ]
    put(tmp_path, gold, gold=True, gold_share=0.3)
    store = open_store(tmp_path)
    for labeller in add(store, "ann", "bob"):
        kinds = []
        while (task := next_assignment(store, labeller)) and len(kinds) < 15:
            submit(store, labeller, task.id, in_order(task, f"{labeller}-{task.id}"))
            kinds.append(task.task_id)
    found = select(
        store,
        "SELECT labeller_id, count(DISTINCT task_id), count(*) FROM assignments "
        "WHERE strategy = 'gold' GROUP BY labeller_id",
    )
    assert [row[1:] for row in found] == [(3, 3), (3, 3)]


def test_repeats_are_own_earlier_tasks_and_count_for_nothing_else(tmp_path):
    put(tmp_path, rows(60), repeat_share=0.3)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    order = []
    while task := next_assignment(store, ann):
        submit(store, ann, task.id, in_order(task, str(task.id)))
        order.append(task.task_id)
    repeats = dict(select(store, "SELECT id, repeat_of FROM tasks WHERE kind = 'repeat'"))
    assert 5 < len(repeats) < 40
    assert len(set(repeats.values())) == len(repeats)
    for repeat, original in repeats.items():
        assert order.index(repeat) - order.index(original) > 5
    assert len(order) == 60 + len(repeats)


def test_strategies_take_the_largest_first_and_keep_a_random_share(tmp_path):
    """With a random share of 0.2 the last of 100 tasks by gap comes early only by chance."""
    scored = [row | {"scores": [0.0, float(n)]} for n, row in enumerate(rows(100, answers=2))]
    put(tmp_path, scored, strategy="gap")
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    strategies, gaps = Counter(), []
    for number in range(50):
        task = next_assignment(store, ann)
        submit(store, ann, task.id, in_order(task, str(number)))
        (row,) = select(
            store,
            "SELECT a.strategy, t.gap FROM assignments a JOIN tasks t ON t.id = a.task_id "
            f"WHERE a.id = {task.id}",
        )
        strategies[row[0]] += 1
        if row[0] == "gap":
            gaps.append(row[1])
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] >= 98
    assert 3 <= strategies["random"] <= 22  # 10 expected, sd 2.8
    assert strategies["gap"] + strategies["random"] == 50


def test_priority_goes_before_every_strategy(tmp_path):
    data = [row | {"priority": int(n == 17)} for n, row in enumerate(rows(30))]
    put(tmp_path, data)
    store = open_store(tmp_path)
    (ann,) = add(store, "ann")
    first = next_assignment(store, ann)
    told = select(store, f"SELECT prompt FROM prompts WHERE id = {first.prompt_id}")
    assert told == [('"prompt 17"',)]


# --- at once -------------------------------------------------------------------------------------


def work(store, labeller, tasks):
    """Label until nothing is left."""
    done = 0
    while (task := next_assignment(store, labeller)) is not None:
        submit(store, labeller, task.id, in_order(task, f"{labeller}-{task.id}"))
        done += 1
        assert done <= tasks


def work_at_once(store, labellers, tasks):
    threads = [threading.Thread(target=work, args=(store, one, tasks)) for one in labellers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve(address, labellers, tasks):
    """What one process of several does."""
    store = Store(address)
    work_at_once(store, labellers, tasks)
    store.close()


def check_all_done(store, tasks, need):
    assert taken_and_done(store) == [(need, need)] * tasks
    doubled = select(
        store,
        "SELECT task_id, count(*) FROM assignments WHERE state = 'done' "
        f"GROUP BY task_id HAVING count(*) != {need} OR count(DISTINCT labeller_id) != {need}",
    )
    assert doubled == []
    assert select(store, "SELECT count(*) FROM annotations") == [(tasks * need,)]


def test_twenty_labellers_at_once(tmp_path):
    put(tmp_path, rows(40, answers=2), need=3)
    store = open_store(tmp_path)
    labellers = add(store, *(f"labeller {n}" for n in range(20)))
    work_at_once(store, labellers, 40)
    check_all_done(store, 40, 3)


@pytest.mark.slow
def test_twenty_labellers_at_once_in_processes(tmp_path):
    """Each of four processes is a server of its own on one SQLite file."""
    put(tmp_path, rows(40, answers=2), need=3)
    store = open_store(tmp_path)
    labellers = add(store, *(f"labeller {n}" for n in range(20)))
    store.close()
    context = multiprocessing.get_context("spawn")
    address = str(tmp_path / "labels.db")
    servers = [context.Process(target=serve, args=(address, labellers[n::4], 40)) for n in range(4)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
        assert server.exitcode == 0
    check_all_done(open_store(tmp_path), 40, 3)
