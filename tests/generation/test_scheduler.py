from __future__ import annotations

from prefloop.generation.scheduler import Request, Scheduler


def test_prompts_are_computed_within_the_budget_and_once() -> None:
    scheduler = Scheduler([3, 3, 9, 1], n=2, slots=3, prefill_tokens=7)
    assert scheduler.next_prefill() == [0, 1]
    assert scheduler.admit() == [Request(0, 0), Request(0, 1), Request(1, 0)]
    assert scheduler.next_prefill() == []  # no slot is free
    scheduler.finish([0])
    assert scheduler.next_prefill() == []  # (1, 1) is ready
    assert scheduler.admit() == [Request(1, 1)]
    scheduler.finish([0, 1, 2])
    assert scheduler.next_prefill() == [2]  # longer than the budget: alone
    assert scheduler.admit() == [Request(2, 0), Request(2, 1)]
    assert scheduler.next_prefill() == [3]
    assert scheduler.admit() == [Request(3, 0)]
    scheduler.finish([0, 1, 2])
    assert scheduler.admit() == [Request(3, 1)]
    scheduler.finish([0])
    assert scheduler.next_prefill() == []
    assert scheduler.active == []


def test_the_last_slots_fill_the_holes() -> None:
    scheduler = Scheduler([1] * 6, n=1, slots=6, prefill_tokens=99)
    scheduler.next_prefill()
    scheduler.admit()
    assert scheduler.finish([0, 2, 4]) == ([3, 5], [0, 2])
    assert [r.prompt_index for r in scheduler.active] == [3, 1, 5]
    assert scheduler.finish([1, 2]) == ([], [])
    assert [r.prompt_index for r in scheduler.active] == [3]


def test_the_longest_slot_follows_who_is_active() -> None:
    scheduler = Scheduler([2, 7, 4], n=1, slots=2, prefill_tokens=99)
    scheduler.next_prefill()
    scheduler.admit()
    scheduler.steps += 3
    assert scheduler.longest == 10
    scheduler.finish([1])
    assert scheduler.longest == 5
    scheduler.steps += 1
    scheduler.admit()
    assert scheduler.longest == 6  # 2 + 4, beside 4 + 0
    scheduler.finish([0])
    assert scheduler.longest == 4
