import gzip
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.recipes import public
from prefloop.recipes.public import Address, download, kept

BODY = b'{"text": "one"}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFLOOP_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/there" else 404)
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_pinned_file_is_downloaded(host: str) -> None:
    assert download(Address("there", hashlib.sha256(BODY).hexdigest()), host) == BODY


def test_another_file_at_the_address_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="not the pinned file"):
        download(Address("there", "0" * 64), host)


def test_a_source_out_of_reach_is_one_line(host: str) -> None:
    for address in (f"{host}gone", "http://127.0.0.1:9/"):
        with pytest.raises(UserError, match=r"cannot fetch .*PREFLOOP_DATA") as caught:
            download(Address("", "0" * 64), address)
        assert "\n" not in str(caught.value)


def test_a_set_is_made_once_and_a_given_folder_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make() -> list[dict[str, int]]:
        made.append(1)
        return [{"row": 1}]

    assert kept("a", make).rows == kept("a", make).rows == [{"row": 1}]
    assert made == [1]
    assert kept("a", make).path == cache / "data" / "a.jsonl.gz"
    monkeypatch.setenv("PREFLOOP_DATA", str(tmp_path / "given"))
    assert kept("a", make).rows == [{"row": 1}]  # not there: from the cache
    write_jsonl(tmp_path / "given" / "a.jsonl.gz", [{"row": 2}])
    facts = kept("a", make).facts()
    assert kept("a", make).rows == [{"row": 2}]
    digest = hashlib.sha256((tmp_path / "given" / "a.jsonl.gz").read_bytes()).hexdigest()
    assert facts == {"file": "a.jsonl.gz", "rows": 1, "sha256": digest}


def test_pandalms_annotators_become_orders() -> None:
    raw = {"instruction": "Do it. ", "input": "", "response1": "a", "response2": "b"}
    raw |= {"annotator1": 1, "annotator2": 2, "annotator3": 0, "cmp_key": "x_y"}
    (row,) = public.parse_pandalm(json.dumps([raw | {"idx": 3}]).encode())
    assert row["prompt"] == "Do it."
    assert row["raters"] == [[[0], [1]], [[1], [0]], [[0, 1]]]
    assert row["models"] == ["x", "y"]


def test_mqm_scores_worked_by_hand() -> None:
    """B: a major error and a minor one of punctuation, 5.1; A and C wrote the same: 1 and 0 errors,
    -0.5 in the mean; D: two raters, 25 and 0.
    """
    rows = [
        "system doc doc_id seg_id rater source target category severity comment",
        "A d 1 1 r1 <v>One</v> eins Style/Awkward Minor c",
        "B d 1 1 r1 One zwei Accuracy/Mistranslation Major c",
        "B d 1 1 r1 One zw<v>e</v>i Fluency/Punctuation Minor c",
        "C d 1 1 r2 One eins No-error No-error c",
        "D d 1 1 r1 One drei Non-translation! Major c",
        "D d 1 1 r2 One drei No-error No-error c",
        "ref d 1 1 r2 One Eins No-error No-error c",
        "A d 1 2 r2 Two zwei No-error No-error c",
    ]
    (row,) = public.parse_mqm("\n".join(line.replace(" ", "\t") for line in rows))
    assert row["prompt"] == "One"
    assert row["completions"] == ["eins", "zwei", "drei"]
    assert row["mqm"] == [-0.5, -5.1, -12.5]
    assert row["tiers"] == [[0], [1], [2]]


INDEX = """Package: a
Description-md5: 0f
Description-en: first line
 Wrapped over
 two lines:
  * an item
 .
 Second paragraph.

Package: b
Description-md5: 1f
Description-en: nothing more
"""


def test_descriptions_are_unwrapped() -> None:
    first, second = public.parse_descriptions(INDEX)
    assert first["short"] == "first line" and first["md5"] == "0f"
    assert first["long"] == "Wrapped over two lines:\n* an item\n\nSecond paragraph."
    assert (second["package"], second["short"], second["long"]) == ("b", "nothing more", "")


def test_no_apt_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get, which is not here"):
        public.descriptions("de")


def test_harmless_pairs_come_as_they_are_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    (tmp_path / "hh-harmless.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    monkeypatch.setenv("PREFLOOP_DATA", str(tmp_path))
    assert public.harmless_pairs().rows == [row]
