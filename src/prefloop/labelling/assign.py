"""Hand-out: who gets which task, under a lease, in which order; and what comes back.

`need` is never overshot: a task's `taken` counts its leases and its annotations, and one guarded
statement raises it. What a labeller gets next is a pure function of seed, labeller and number of
tasks before it; the order of the answers is one of seed, task and labeller, and is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from prefloop.labelling.store import Store, Transaction
from prefloop.labelling.store.settling import settle

REPEAT_AFTER = 5
"""A task comes back to its labeller after at least this many others."""
FLAGS = ("harmful", "false", "off-topic", "wrong-language", "other")


class Refused(Exception):
    """What a labeller asked cannot be done; `reason` is a word that the page can translate."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Judgement:
    """What a labeller says of a task; `tiers` is None where the task is skipped.

    Tiers and ratings speak of answers by their position in the task, not by the place shown.
    """

    tiers: Sequence[Sequence[int]] | None
    ratings: Sequence[int] | None = None
    strength: int | None = None
    confidence: int | None = None
    all_bad: bool = False
    flags: Sequence[Mapping[str, object]] = ()  # {"answer": position or None, "flag": one of FLAGS}
    comment: str = ""
    seconds: float = 0.0
    request_id: str = ""
    base_version: int = 0  # the version that the page had seen
    project_version: int | None = None  # of the guidelines that the page showed


@dataclass(frozen=True)
class Assignment:
    """A task in a labeller's hands, as the page needs it."""

    id: int
    task_id: int
    mode: str
    guidelines: str
    prompt_id: int
    response_ids: Sequence[int]  # in the task's order
    shown: Sequence[int]  # positions in `response_ids`, in the order shown
    state: str
    version: int
    draft: Mapping[str, Any] | None
    project_id: int
    project: str
    project_version: int
    kind: str
    said: Mapping[str, Any] | None = field(default=None)  # the newest annotation, when reopened


def next_assignment(
    store: Store, labeller_id: int, project: str | None = None
) -> Assignment | None:
    """The task a labeller has, else a new one; None when nothing is left for this labeller.

    Of one project, or of all that the labeller sees, the oldest first. Refused where the labeller
    sees no project of that name.
    """
    with store.write() as t:
        # 1. What is open already, as it was: a reload changes nothing.
        number = t.lock_labeller(labeller_id)
        projects = [p for p in t.projects(labeller_id) if project in (None, p["name"])]
        if project is not None and not projects:
            raise Refused("no-project")
        wanted = None if project is None else int(projects[0]["id"])
        if held := t.current(labeller_id, wanted):
            until = t.now + lease_seconds(held["settings"])
            t.set_assignment(held["id"], leased_until=until)
            return _assignment(t, held)
        # 2. What others left lying goes back first.
        leases = (lease_seconds(p["settings"]) for p in t.projects())
        t.release_expired(max(leases, default=0.0))
        for one in projects:
            settings = one["settings"]
            # 3. Gold, repeat or real.
            draw = Random(f"{settings['seed']}:{labeller_id}:{number}")
            choice = _choose(t, one["id"], settings, labeller_id, draw)
            if choice is None:
                continue
            task_id, count, strategy = choice
            # 4. The lease, with the order of the answers.
            order = list(range(count))
            Random(f"{settings['seed']}:{task_id}:{labeller_id}").shuffle(order)
            until = t.now + lease_seconds(settings)
            t.put_assignment(task_id, labeller_id, order, strategy, until)
            t.count_hand_out(labeller_id)
            held = t.current(labeller_id, one["id"])
            assert held is not None
            return _assignment(t, held)
    return None


def _choose(
    t: Transaction, project_id: int, settings: Mapping[str, Any], labeller_id: int, draw: Random
) -> tuple[int, int, str] | None:
    """(task, number of its answers, strategy) of what this labeller gets; it is taken.

    Practice comes before all else.
    """
    task_id = t.first_known(project_id, labeller_id, "practice")
    if task_id is not None and t.take(task_id):
        return task_id, t.answers_of(task_id), "practice"
    kind, by_strategy = draw.random(), draw.random() >= settings["random_share"]
    back = REPEAT_AFTER + draw.randrange(2 * REPEAT_AFTER)
    strategy = settings["strategy"] if by_strategy else "random"
    if kind < settings["gold_share"]:
        task_id = t.first_known(project_id, labeller_id, "gold")
        if task_id is not None and t.take(task_id):
            return task_id, t.answers_of(task_id), "gold"
    elif kind < settings["gold_share"] + settings["repeat_share"]:
        task = t.repeatable(project_id, labeller_id, back)
        if task is not None:
            repeat_id = t.put_repeat(task, labeller_id)
            return repeat_id, len(task["response_ids"]), "repeat"
    while (task_id := t.first_open(project_id, labeller_id, strategy)) is not None:
        if t.take(task_id):
            return task_id, t.answers_of(task_id), strategy
    return None


def lease_seconds(settings: Mapping[str, Any]) -> float:
    """How long a lease lasts without a sign of life."""
    return 60.0 * float(settings["lease_minutes"])


def save_draft(
    store: Store, labeller_id: int, assignment_id: int, draft: Mapping[str, Any]
) -> None:
    """Keep what a labeller has done so far and renew the lease; Refused when it is lost."""
    with store.write() as t:
        held = _held(t, labeller_id, assignment_id)
        if held["state"] in ("expired", "skipped") and not _take_again(t, held):
            raise Refused("stale-lease")
        if held["state"] == "done":
            return
        until = t.now + lease_seconds(held["settings"])
        t.set_assignment(assignment_id, draft=dict(draft), leased_until=until, state="open")
        if held["state"] == "skipped":  # it no longer is
            settle(t, held["task_id"], assignment_id, _before(t, held))


def submit(store: Store, labeller_id: int, assignment_id: int, said: Judgement) -> int:
    """Write a judgement as the assignment's next version, and return the version.

    The same request sent again changes nothing. Refused where the lease ran out and others have
    taken the task (what was said is then in the audit log), and where another tab was faster.
    """
    with store.write() as t:
        held = _held(t, labeller_id, assignment_id)
        before = t.annotation_of_request(said.request_id)
        if before is not None:
            if before["assignment_id"] != assignment_id:
                raise Refused("already-submitted")
            return int(before["version"])
        if held["version"] != said.base_version:
            raise Refused("already-submitted")
        if said.tiers is not None:
            _check(said, held)
        taken = held["state"] in ("open", "done") or said.tiers is None or _take_again(t, held)
        if taken:
            _write(t, held, said)
        else:
            details = {"assignment_id": assignment_id, "tiers": said.tiers}
            t.log("stale lease", labeller_id, **details, comment=said.comment)
    if not taken:
        raise Refused("stale-lease")
    return int(held["version"]) + 1


def _write(t: Transaction, held: Mapping[str, Any], said: Judgement) -> None:
    version, state, before = held["version"] + 1, held["state"], _before(t, held)
    skipped = said.tiers is None
    t.put_annotation(
        held["id"],
        version,
        tiers=None if said.tiers is None else [list(tier) for tier in said.tiers],
        ratings=None if said.ratings is None else list(said.ratings),
        strength=said.strength,
        confidence=said.confidence,
        all_bad=said.all_bad,
        flags=[dict(flag) for flag in said.flags],
        comment=said.comment.encode(errors="replace").decode(),  # no half characters
        seconds=said.seconds,
        request_id=said.request_id,
        project_version=said.project_version,
    )
    new_state = "skipped" if skipped else "done"
    t.set_assignment(held["id"], state=new_state, version=version, draft=None)
    if skipped and state in ("open", "done"):
        t.give_back(held["task_id"])
    if (new_state == "done") != (state == "done"):
        t.count_done(held["task_id"], 1 if new_state == "done" else -1)
    settle(t, held["task_id"], held["id"], before)


def _before(t: Transaction, held: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the sums by day count of an assignment; None where it is not finished."""
    if held["state"] not in ("done", "skipped"):
        return None
    newest = t.annotation(held["id"], held["version"])
    assert newest is not None
    return {**held, **newest}


def reopen(store: Store, labeller_id: int, before: int | None = None) -> Assignment | None:
    """The task this labeller finished or skipped last (before another), with what was said."""
    with store.read() as t:
        held = t.finished(labeller_id, before)
        if held is None:
            return None
        said = t.annotation(held["id"], held["version"])
        return _assignment(t, held, said)


def take_up(store: Store, labeller_id: int, assignment_id: int) -> Assignment:
    """A task of this labeller's own, with what was said of it."""
    with store.read() as t:
        held = _held(t, labeller_id, assignment_id)
        said = t.annotation(held["id"], held["version"])
        return _assignment(t, held, said)


def _take_again(t: Transaction, held: Mapping[str, Any]) -> bool:
    """Whether a task whose lease ran out, or that was skipped, still has room."""
    return t.take(held["task_id"])


def _held(t: Transaction, labeller_id: int, assignment_id: int) -> Mapping[str, Any]:
    held = t.assignment(assignment_id, labeller_id)
    if held is None:
        raise Refused("not-yours")
    return held


def _check(said: Judgement, held: Mapping[str, Any]) -> None:
    """A judgement that the page could not have sent is refused."""
    count = len(held["response_ids"])
    assert said.tiers is not None
    named = sorted(position for tier in said.tiers for position in tier)
    rated = said.ratings is not None and len(said.ratings) == count
    right = named == list(range(count)) and all(said.tiers)
    right &= held["mode"] != "rating" or rated
    flags = all(f.get("flag") in FLAGS for f in said.flags)
    places = all(f.get("answer") in (None, *range(count)) for f in said.flags)
    seen = said.project_version is None or 1 <= said.project_version <= held["project_version"]
    if not (right and flags and places and seen):
        raise Refused("malformed")


def _assignment(
    t: Transaction, held: Mapping[str, Any], said: Mapping[str, Any] | None = None
) -> Assignment:
    names = ("id", "task_id", "mode", "guidelines", "prompt_id", "response_ids", "shown")
    rest = ("state", "version", "draft", "project_id", "project", "project_version", "kind")
    return Assignment(**{name: held[name] for name in (*names, *rest)}, said=said)
