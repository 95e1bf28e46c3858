"""Pipelines: stages in order, what has not changed is skipped, outdated output is moved aside."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from prefloop.cli import main
from prefloop.config import RunConfig, SFTConfig
from prefloop.config.ranges import Seed
from prefloop.errors import UserError
from prefloop.recipes import pipeline
from prefloop.recipes.pipeline import Stage, fingerprint, run
from prefloop.runs import newest_checkpoint
from tests.training.small import write_world


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Settings of a command that copies a file into a folder of files."""

    data: str
    """What to copy."""
    output: Path
    """Where to."""
    seed: Seed = 0
    """Said in the copy."""

    def problems(self):
        """Any settings go together."""
        return ()


@dataclass(frozen=True)
class Command:
    config: type
    function: Callable[[CopyConfig], None]
    show: Callable[[None], None] = print


class Copier:
    """Counts its calls; stops when told to."""

    def __init__(self):
        self.calls = []
        self.stop_at = ""

    def __call__(self, config):
        self.calls.append(config.output.name)
        config.output.mkdir(parents=True, exist_ok=True)
        if config.output.name == self.stop_at:
            raise KeyboardInterrupt
        source = Path(config.data)
        text = (source / "copy" if source.is_dir() else source).read_text()
        (config.output / "copy").write_text(f"{text}{config.seed}")


PIPELINE = """
stages:
  - {name: one, command: copy, settings: {data: rows.txt}}
  - name: two
    command: copy
    settings: {data: "${one}", seed: 5}
"""


@pytest.fixture
def copier():
    return Copier()


@pytest.fixture
def go(tmp_path, monkeypatch, copier):
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a")
    Path("p.yaml").write_text(PIPELINE)
    commands = {"copy": Command(CopyConfig, copier)}
    return lambda: run(RunConfig(pipeline=Path("p.yaml")), commands)


def test_stages_run_in_order_and_refer_to_each_other(go, copier):
    go()
    assert copier.calls == ["one", "two"]
    assert Path("runs/p/two/copy").read_text() == "a05"


def test_what_has_not_changed_is_skipped(go, copier, capsys):
    go()
    go()
    assert copier.calls == ["one", "two"]
    assert capsys.readouterr().out.count("nothing changed, skipped") == 2


def test_changed_contents_run_what_depends_on_them(go, copier):
    go()
    Path("rows.txt").write_text("b")
    go()
    assert copier.calls == ["one", "two", "one", "two"]
    assert Path("runs/p/two/copy").read_text() == "b05"
    assert Path("runs/p/two.old-1/copy").read_text() == "a05"


TRAINS = """
stages:
  - {name: one, command: sft, ranks: 4, settings: {model: m, data: d}}
  - {name: two, command: copy, settings: {data: rows.txt}}
"""


def test_torchrun_starts_a_stage_that_has_ranks(go, copier, tmp_path):
    Path("p.yaml").write_text(TRAINS)
    commands = {"copy": Command(CopyConfig, copier), "sft": Command(SFTConfig, copier)}
    asked = []

    def start(command, config, settings, program):
        asked.append((command, config.model, settings, list(program)))
        config.output.mkdir(parents=True)

    for _ in range(2):  # the second time it is skipped
        run(RunConfig(pipeline=Path("p.yaml")), commands, start)
    [(command, model, settings, program)] = asked
    assert (command, model, settings) == ("sft", "m", Path("runs/p/stages/one.yaml"))
    found = get_args_parser().parse_args([*program[3:], "sft"])
    assert program[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert (found.nproc_per_node, found.standalone, found.module) == ("4", True, True)
    assert (found.training_script, found.training_script_args) == ("prefloop", ["sft"])
    assert copier.calls == ["two"]

    def fails(*_):
        raise RuntimeError("`prefloop sft` failed with exit code 1, and says why above")

    Path("p.yaml").write_text(TRAINS.replace("data: d", "data: e"))
    with pytest.raises(UserError, match=r"^one: .* says why above; once that is mended"):
        run(RunConfig(pipeline=Path("p.yaml")), commands, fails)


@pytest.mark.parametrize("bad", ["two, command: copy, ranks: 2", "two, command: sft, ranks: 0"])
def test_only_what_trains_has_ranks(go, copier, bad):
    Path("p.yaml").write_text(f"stages: [{{name: {bad}, settings: {{model: m, data: d}}}}]")
    commands = {"copy": Command(CopyConfig, copier), "sft": Command(SFTConfig, copier)}
    with pytest.raises(UserError, match=r"`ranks` is .; give the number"):
        run(RunConfig(pipeline=Path("p.yaml")), commands)


@pytest.mark.slow
def test_a_stage_trains_on_two_ranks_and_goes_on_to_the_next(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = {"data": "sft.jsonl", "device": "cpu", "max_steps": 2, "batch_size": 2}
    stages = [
        {"name": "a", "command": "sft", "ranks": 2, "settings": rows | {"model": "model"}},
        {"name": "b", "command": "sft", "settings": rows | {"model": "${a}"}},
    ]
    Path("p.yaml").write_text(yaml.safe_dump({"stages": stages}))
    assert main(["run", "p.yaml"]) == 0
    for name in "ab":
        assert json.loads(Path(f"runs/p/{name}/run.json").read_text())["steps"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stage_on_two_ranks_that_is_terminated_saves_and_goes_on(tmp_path):
    """The stage has no end of its own, so that each signal finds it at work."""
    write_world(tmp_path)
    rows = {"data": "sft.jsonl", "device": "cpu", "max_steps": 10**6, "batch_size": 2}
    settings = rows | {"model": "model", "save_minutes": 0, "log_every": 1}
    stage = {"name": "a", "command": "sft", "ranks": 2, "settings": settings}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"stages": [stage]}))
    output, done = tmp_path / "runs/p/a", 0
    for _ in range(2):
        with (tmp_path / "said").open("w+") as said:
            words = [sys.executable, "-m", "prefloop", "run", "p.yaml"]
            process = subprocess.Popen(words, cwd=tmp_path, stderr=said)
            while process.poll() is None and len(lines_of(output)) < done + 3:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 143, (tmp_path / "said").read_text()
            assert (tmp_path / "said").read_text().splitlines()[-1] == "prefloop: terminated"
        before, done = done, len(lines_of(output))
        assert done >= before + 3
        assert [line["step"] for line in lines_of(output)] == list(range(1, done + 1))
        assert newest_checkpoint(output).name == f"step-{done}"
    assert json.loads((tmp_path / "runs/p/pipeline.json").read_text())["a"]["status"] == "started"


def lines_of(output):
    """Whole lines of a run's metrics."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize(
    ("source", "file"), [("rows.txt=0.5", "rows.txt"), ("set#main:train=.5", "set/rows.txt")]
)
def test_contents_of_weighted_sources_and_splits_count(tmp_path, monkeypatch, source, file):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    stage = Stage("one", "copy", CopyConfig(data=source, output=Path("out")))
    prints = []
    for text in "aba":
        Path(file).write_text(text)
        prints.append(fingerprint(stage))
    assert prints[0] == prints[2] != prints[1]


def test_changed_settings_run_that_stage_only(go, copier):
    go()
    Path("p.yaml").write_text(PIPELINE.replace("seed: 5", "seed: 6"))
    go()
    assert copier.calls == ["one", "two", "two"]


def test_an_interrupted_stage_goes_on_in_its_own_output(go, copier):
    copier.stop_at = "two"
    with pytest.raises(KeyboardInterrupt):
        go()
    copier.stop_at = ""
    go()
    assert copier.calls == ["one", "two", "two"]
    assert not Path("runs/p/two.old-1").exists()


def test_a_full_disk_is_told_by_the_file_that_met_it(go, copier, monkeypatch):
    """The record cannot be written then, either: that is not what is told."""
    write, stops = pipeline.write_atomic, copier.calls

    def full(path, data):
        if stops:
            raise UserError(f"{path}: cannot be written")
        write(path, data)

    monkeypatch.setattr(pipeline, "write_atomic", full)
    Path("rows.txt").unlink()
    with pytest.raises(FileNotFoundError):
        go()
    assert json.loads(Path("runs/p/pipeline.json").read_text())["one"]["status"] == "started"


def test_the_record_keeps_each_stages_cost_with_that_before_an_interruption(
    go, copier, monkeypatch
):
    monkeypatch.setattr(pipeline, "cpu_seconds", lambda: 10.0 + 2.0 * len(copier.calls))
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: 50.0 + 1.5 * len(copier.calls))
    copier.stop_at = "two"
    with pytest.raises(KeyboardInterrupt):
        go()
    assert costs() == {"one": (2.0, 1.5), "two": (2.0, 1.5)}
    copier.stop_at = ""
    go()
    assert costs() == {"one": (2.0, 1.5), "two": (4.0, 3.0)}  # skipped; gone on with
    Path("rows.txt").write_text("b")
    go()
    assert costs() == {"one": (2.0, 1.5), "two": (2.0, 1.5)}  # anew


def costs():
    """CPU and wall seconds by stage."""
    stages = json.loads(Path("runs/p/pipeline.json").read_text())
    return {name: (of["cpu_seconds"], of["wall_seconds"]) for name, of in stages.items()}


def test_removed_output_is_made_again(go, copier):
    go()
    Path("runs/p/two/copy").unlink()
    Path("runs/p/two").rmdir()
    go()
    assert copier.calls == ["one", "two", "two"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stage:", "p.yaml: unknown key `stage`"),
        (
            "command: copy, ",
            "command: cpy, ",
            "stage 1 (one): no command `cpy`; did you mean copy?",
        ),
        ("name: two", "name: one", "stage 2 (one): `name` must be a word of its own"),
        ("${one}", "${three}", "stage 2 (two): `${three}` names no earlier stage; stages before"),
        ("seed: 5", "sed: 5", "stage 2 (two): unknown key `sed`; did you mean seed?"),
        ("seed: 5", "seed: -5", "stage 2 (two): --seed is -5; it must be 0 or more"),
        ("{data: rows.txt}", "rows.txt", "stage 1: give {name, command, settings}"),
        ("{data: rows.txt}", "{}", "stage 1 (one): `data` is missing"),
        (", settings: {data: rows.txt}", "", "stage 1 (one): `data` is missing"),
        ("name: two", "name: ..", "`name` must be a word of its own"),
        ("seed: 5", "output: runs/p/one", "stage 2 (two): runs/p/one is another's"),
        ("command: copy, ", "command: run, ", "no command `run`; choose from copy"),
    ],
)
def test_faults_are_found_before_anything_runs(go, copier, old, new, message):
    Path("p.yaml").write_text(PIPELINE.replace(old, new))
    with pytest.raises(UserError) as caught:
        go()
    assert message in str(caught.value)
    assert copier.calls == []
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["[]", '{"one": 3}', "{"])
def test_a_damaged_record_is_the_users_to_mend(go, text):
    Path("runs/p").mkdir(parents=True)
    Path("runs/p/pipeline.json").write_text(text)
    with pytest.raises(UserError, match=r"pipeline\.json: not a pipeline's record; remove it"):
        go()


ROUNDS = """
stages:
  - {name: base, command: copy, settings: {data: in.txt}}
  - rounds: 2
    start: ${base}
    stages:
      - {name: sample, command: copy, settings: {data: "${policy}", seed: 1}}
      - {name: train, command: copy, settings: {data: "${sample}", seed: 2}}
  - {name: last, command: copy, settings: {data: "${train-2}"}}
"""


def test_rounds_go_on_from_the_round_before(tmp_path, monkeypatch):
    """`in` is copied; each round adds 1 and 2 to what the round before left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("in")
    (tmp_path / "p.yaml").write_text(ROUNDS)
    copier = Copier()
    commands = {"copy": Command(CopyConfig, copier)}
    run(RunConfig(pipeline=tmp_path / "p.yaml"), commands)
    assert copier.calls == ["base", "sample-1", "train-1", "sample-2", "train-2", "last"]
    assert (tmp_path / "runs" / "p" / "last" / "copy").read_text() == "in012120"
    run(RunConfig(pipeline=tmp_path / "p.yaml"), commands)
    assert len(copier.calls) == 6  # nothing changed


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rounds: 2", "rounds: 0", "`rounds`, 1 or more"),
        ("start: ${base}", "start: ${bass}", "names no earlier stage"),
        ("start: ${base}", "begin: x", "unknown key `begin`"),
        ('"${policy}"', '"${sample-2}"', "names no earlier stage"),
        ('data: "${train-2}"', 'data: "${policy}"', "names no earlier stage"),
    ],
)
def test_faulty_rounds_are_told_before_anything_runs(tmp_path, monkeypatch, old, new, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("in")
    (tmp_path / "p.yaml").write_text(ROUNDS.replace(old, new))
    copier = Copier()
    with pytest.raises(UserError, match=told):
        run(RunConfig(pipeline=tmp_path / "p.yaml"), {"copy": Command(CopyConfig, copier)})
    assert copier.calls == []
