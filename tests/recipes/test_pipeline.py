"""Pipelines: stages in order, what has not changed is skipped, outdated output is moved aside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefloop.config import RunConfig, UserError
from prefloop.recipes.pipeline import run


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Settings of a command that copies a file into a folder of files."""

    data: str
    """What to copy."""
    output: Path
    """Where to."""
    seed: int = 0
    """Said in the copy."""


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
