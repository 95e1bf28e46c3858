"""Cases from the outside: what users of such tools brought, run as the command line runs it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefloop.cli import main
from tests.outside.models import MAKERS

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Told:
    """What a command line ended with."""

    code: int
    out: str
    err: str


Run = Callable[..., Told]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tiny model of `MAKERS`, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        (folder / name).mkdir()
        make(folder / name)
    return folder


@pytest.fixture
def case(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of the case's inputs, the working directory; its name is the test module's."""
    name = request.module.__name__.rpartition(".test_")[2].replace("_", "-")
    folder = tmp_path / name
    shutil.copytree(CASES / name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name, module in list(sys.modules.items()):  # another case has a rewards.py of its own
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def prefloop(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(*words: object) -> Told:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Told(code, *capfd.readouterr())

    return run
