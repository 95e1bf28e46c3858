"""No setting of `label ...`, `chat`, `demo` and `run` is accepted and ignored.

As test_settings.py: each, changed alone, is told or shows in what is printed, written or stored.
"""

import io
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from prefloop.commands import COMMANDS
from prefloop.console.chat import chat
from prefloop.errors import UserError
from prefloop.labelling.store import Store
from prefloop.labelling.web import server
from prefloop.recipes.overoptimisation import label_sets, study_of
from prefloop.recipes.pipeline import read_stages
from prefloop.recipes.sentiment import FULL, QUICK, Plan
from tests import test_settings
from tests.evaluation.test_run_report import make_run
from tests.labelling.small import add, compare_folder
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import REWARDS, write_rows, write_world
from tests.training.test_template_args import TEMPLATE

JUDGES = (f"{REWARDS}:by_length", f"{REWARDS}:constant")
WAYS = ("SFT", "PPO", "DPO")
TIERS = [[[1], [0, 2]], [[0], [1], [2]], [[2], [0], [1]], [[0, 1], [2]]]
EXTRAS = "SELECT name, mode, guidelines, settings FROM projects"
DUMPS = (
    EXTRAS,
    "SELECT prompt, extra FROM prompts ORDER BY id",
    "SELECT kind, response_ids, need, draw, gold_tiers, uncertainty, gap FROM tasks ORDER BY id",
    "SELECT name, role FROM labellers ORDER BY id",
    "SELECT tiers FROM annotations ORDER BY id",
    "SELECT members_only FROM projects",
    "SELECT completion, scores FROM responses ORDER BY id",
)
STORE = {"store": "labels.db"}
TALK = {"device": "cpu", "max_new_tokens": 20, "max_length": 300}
MODES = {
    "label import": [
        {"store": "new.db", "data": "rows.jsonl"},
        {"store": "new.db", "data": "rows.jsonl", "overlap": 0.0},
    ],
    "label score": [
        STORE | {"reward_model": JUDGES},
        STORE | {"reward_model": ("chat-rm", "chat-rm-2")},
    ],
    "label export": [
        STORE | {"output": "out.jsonl", "form": form, **more}
        for form, more in [
            ("rankings", {}),
            ("dpo", {}),
            ("hh", {}),
            ("kto", {}),
            ("audit", {}),
            ("rankings", {"eval_fraction": 0.5}),
        ]
    ],
    "label report": [STORE],
    "evaluate people": [{"labels": "labels.db", "data": "compared"}],
    "label add-user": [STORE | {"name": "eve"}],
    "label backup": [STORE | {"output": "copy.db"}],
    "label serve": [STORE, STORE | {"public_url": "https://labels.example.org"}],
    "chat": [
        {"model": "chat", "device": "cpu", "max_new_tokens": 20, "max_length": 300},
        {"model": "chat", "device": "cpu", "max_new_tokens": 20, "temperature": 0.0},
        {"model": "chat", "against": "chat-2", "to_labels": "talk.db"} | TALK,
    ],
    "demo": [{}, {"quick": True}],
    "overoptimise": [{}, {"quick": True}],
    "run": [{"pipeline": "one.yaml"}],
    "report": [{"runs": ("made",)}],
    "init": [{"use": "chat", "output": "new.yaml"}],
}
CHANGES = test_settings.CHANGES | {
    "store": "absent/other.db",
    "project": "other",
    "data": "more.jsonl",
    "gold": True,
    "practice": True,
    "labeller": "ann",
    "mode": "pairwise",
    "guidelines": Path("guide.md"),
    "need": 3,
    "overlap": 0.9,
    "overlap_need": 4,
    "members": ("ann",),
    "gold_share": 0.3,
    "repeat_share": 0.3,
    "strategy": "gap",
    "random_share": 0.5,
    "lease_minutes": 5.0,
    "samples": 2,
    "labels": "absent/other.db",
    "reward_model": (*JUDGES, f"{REWARDS}:not_there"),
    "template_args": '{"enable_thinking": false}',
    "micro_batch_tokens": 3,
    "form": "hh",
    "consensus": "majority",
    "label_margins": True,
    "exclude": ("l1",),
    "eval_fraction": 0.3,
    "wait": True,
    "wait_seconds": 1.0,
    "name": "ann",
    "role": "admin",
    "url": "https://example.org",
    "host": "127.0.0.2",
    "port": 8123,
    "public_url": "https://other.example.org",
    "session_hours": 1.0,
    "system": "Be brief.",
    "against": "chat-2",
    "seed": 12,
    "quick": True,
    "pipeline": Path("two.yaml"),
    "sizes": (3, 5),
    "repeats": 2,
    "dry_run": True,
    "use": "style",
    "runs": ("absent",),
    "every": 5.0,
    "model": "chat-2",
    "max_length": 30,
    "output": Path("elsewhere.jsonl"),
}
ALONE = {  # (command, setting): why it may be given where it changes nothing
    ("label export", "wait"): "all tasks of this store are done",
    ("label export", "label_margins"): "imported rows say neither strength nor confidence",
    ("label export", "output"): "the same rows, elsewhere: the path is told",
    ("label score", "micro_batch_tokens"): "changes no result (tests/data/test_batches.py)",
    ("label score", "dtype"): "scores of models are compared to four digits",
    ("report", "every"): "the run has ended (tests/evaluation/test_run_report.py)",
    ("run", "dry_run"): "here stages are only read (tests/recipes/test_dry_run.py)",
    ("chat", "dtype"): "rounding seldom changes which token is likeliest",
    ("chat", "weights"): "as with dtype",
    ("chat", "seed"): "greedy answers draw nothing, as in generate",
    ("chat", "max_length"): "it is read where the conversation outgrows it",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from prefloop.models.export import export_model
    from prefloop.models.load import load_scorer
    from tests.training.small import CPU

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    for seed, name in enumerate(("chat", "chat-2")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer(template=TEMPLATE, eos="<|im_end|>").save_pretrained(folder / name)
    export_model(load_scorer(str(folder / "chat"), CPU, seed=3), folder / "chat-rm")
    export_model(load_scorer(str(folder / "chat-2"), CPU, seed=7), folder / "chat-rm-2")
    (folder / "guide.md").write_text("Be kind.")
    make_run(folder / "made")
    said = [["a boat", "in", "the bath took it"], ["ant", "thin", "oath"]]
    chats = [[{"role": "user", "content": p}] for p in ("Hi", "Why?", "the boat", "an oath")]
    rows = [
        {"prompt": p, "completions": said[n % 2], "tiers": TIERS[(n + k) % 4], "labeller": f"l{k}"}
        for n, p in enumerate(chats)
        for k in range(3)
    ]
    write_rows(
        folder / "rows.jsonl", [{k: v for k, v in r.items() if k != "labeller"} for r in rows[::3]]
    )
    write_rows(folder / "more.jsonl", rows[:1])
    write_rows(folder / "labelled.jsonl", rows)
    answers = {way: [[said[n % 2][k]] for n in range(4)] for k, way in enumerate(WAYS)}
    compare_folder(folder / "compared", answers, chats)
    settings = {"model": "chat", "data": "rows.jsonl"}
    seedless = {"name": "seedless", "command": "dpo", "settings": settings}
    for name, seed in (("one", 1), ("two", 2)):
        settings = {"model": "model", "output": "given", "data": "sft.jsonl", "seed": seed}
        stage = {"name": "sft", "command": "sft", "settings": settings}
        del settings["output"]
        (folder / f"{name}.yaml").write_text(json.dumps({"stages": [stage, seedless]}))
    return folder


def dumped(address):
    store = Store(address, must_exist=True)
    with store.read() as t:
        found = [[list(row.values()) for row in t.all(text(query))] for query in DUMPS]
    store.close()
    return repr(found)


def served(config):
    """How the server is reached, by which names, and how long a session lasts."""
    found = []

    def look(settings):
        client = TestClient(settings.app, base_url=f"http://{settings.host}:{settings.port}")
        entered = client.get("/enter?token=token-l9", follow_redirects=False)
        age = re.search(r"Max-Age=(\d+)", entered.headers.get("set-cookie", ""))
        hosts = ("labels.example.org", "other.example.org")
        names = [
            TestClient(settings.app, base_url=f"http://{h}").get("/").status_code for h in hosts
        ]
        found.extend((settings.host, settings.port, entered.status_code, age and age[1], names))

    server.run(config, look)
    return found


def outcome(name, capsys, changes):
    """The error's line, or what was printed, written and stored."""
    config = COMMANDS[name].config(**changes)
    capsys.readouterr()
    try:
        if name == "label serve":
            return served(config), capsys.readouterr().err
        if name == "chat":
            out = io.StringIO()
            verdict = "a\n" if config.against else ""
            chat(config, io.StringIO(f"Hi\n{verdict}the boat took the ant\n{verdict}"), out)
            stored = dumped(config.to_labels) if config.to_labels else ""
            return out.getvalue(), stored
        if name == "demo":
            return (asdict(Plan(config.output, config.seed, QUICK if config.quick else FULL)),)
        if name == "overoptimise":
            return study_of(config), label_sets(config)
        if name == "run":
            root = config.output or Path("runs")
            stages = read_stages(config.pipeline, root, COMMANDS, config.seed)
            return ([repr(stage) for stage in stages],)
        COMMANDS[name].show(COMMANDS[name].function(config))
        told = re.sub(r"token=\S+", "", capsys.readouterr().out)
        output = getattr(config, "output", None)
        written = ""
        if isinstance(output, Path) and output.exists():
            written = output.read_text()
        written = re.sub(r'"(created|time|seconds)": [\d.]+', "", written)
        if name == "label export" and config.form == "audit":  # its log grows
            written = [line for line in written.splitlines() if '"type": "event"' not in line]
        stored = dumped(config.store) if name in ("label import", "label score") else ""
        people = dumped(config.store) if name == "label add-user" else ""
        return told, written, stored, people
    except UserError as error:
        return str(error)


@pytest.fixture
def fresh(world, tmp_path, monkeypatch):
    """`fresh()` makes the next copy of the world the working directory, with a labelled store."""
    import shutil

    number = 0

    def make():
        nonlocal number
        number += 1
        place = tmp_path / str(number) / "here"
        place.mkdir(parents=True)
        for item in world.iterdir():
            (place / item.name).symlink_to(item)
        monkeypatch.chdir(place)
        importer = COMMANDS["label import"]
        importer.function(importer.config(store="labels.db", data="labelled.jsonl"))
        store = Store("labels.db")
        add(store, "l9")
        store.close()
        shutil.rmtree(place / "out", ignore_errors=True)

    return make


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODES)
def test_no_setting_is_accepted_and_ignored(name, fresh, capsys):
    known, ignored, found = {}, [], set()
    every = {field.name for field in fields(COMMANDS[name].config)}

    def ends(changes):
        key = repr(sorted(changes.items()))
        if key not in known:
            fresh()
            paths = ("pipeline",) if name == "label backup" else ("output", "pipeline")
            given = {k: Path(v) if k in paths else v for k, v in changes.items()}
            known[key] = outcome(name, capsys, given)
        return known[key]

    for base in MODES[name]:
        assert isinstance(ends(base), tuple), ends(base)
        for setting in sorted(every):
            value = CHANGES[setting]
            if base.get(setting) == value:
                value = {"form": "dpo", "quick": False, "against": None}.get(setting, value)
            after = ends(base | {setting: value})
            if after == ends(base):
                ignored.append((base, setting))
            else:
                found.add(setting)
    assert {setting for _, setting in ignored if (name, setting) not in ALONE} == set()
    assert every - found <= {setting for command, setting in ALONE if command == name}


def test_every_command_that_takes_settings_is_tried():
    from tests.training.small import CONFIGS

    tried = MODES.keys() | test_settings.MODES.keys() | CONFIGS.keys()
    # tests/models/test_publish.py, tests/recipes/test_uses_data.py, tests/console
    elsewhere = {"fetch-model", "fetch-data", "export", "completion"}
    assert COMMANDS.keys() - tried <= elsewhere
