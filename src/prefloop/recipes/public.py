"""Public data with people's judgements or texts: each set as rows, fetched once and kept.

A set is looked for as `NAME.jsonl.gz` in the folder `$PREFLOOP_DATA`, then in the cache, then at
its public address, whose files are pinned by sha256; Debian's descriptions come from Debian's
signed package lists, through apt. Nothing of them is part of prefloop.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prefloop.errors import UserError, first_line
from prefloop.files import cache_dir, read_rows, write_jsonl
from prefloop.recipes.fetch import Pin, building, fetch_file, fetch_movie_ratings, sha256

Row = dict[str, Any]
HEADLINES = Pin(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
"""Headlines of a satirical and of a serious newspaper (Misra and Arora, 2019), in another wheel."""
GITHUB = "https://raw.githubusercontent.com/"
SECONDS = 60.0  # that a server may be silent
PENALTIES = {"No-error": 0.0, "Minor": 1.0, "Major": 5.0}


@dataclass(frozen=True)
class Address:
    """One file of a public repository at one commit, and its sha256."""

    path: str  # owner/repository/commit/path
    sha256: str


HH = Address(
    "anthropics/hh-rlhf/354e5c3cb8960630860dd5774a6ac2a58313bf4d/harmless-base/test.jsonl.gz",
    "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
)
PANDALM = Address(
    "WeOpenML/PandaLM/3871806e72b4832f815ecafd24d3503c73403f48/data/testset-v1.json",
    "cc154f9067c7382d7ea86f8f246511a5e1ac87e1fddd845c5938d789505b07a4",
)
MQM = Address(
    "google/wmt-mqm-human-evaluation/7fadea281aff8db61cc72fc3d469a4dca78b82a6/"
    "ted/ende/mqm_ted_ende.tsv",
    "3952dc904997dda31c03421243862cb8a093f9a712fd90dc97b9709b4bb387b3",
)
LLMBAR = "princeton-nlp/LLMBar/900616bff90b6c6c8e1681f7d079250637c55992/Dataset/LLMBar/"
LLMBAR_SUBSETS = {
    "Adversarial/GPTInst": "1002425f73c2cf54b6e6de99bce3f6c60fa2a17d13194772e37d7481c1351d42",
    "Adversarial/GPTOut": "1ff56e520d7607750a9866a3be0f5b850392ca4477a1f69d80f32bd3e310f561",
    "Adversarial/Manual": "0d9598769a39cdbbd265778c37e49939d41d5f76dcfb17bd75dcfa07516d3837",
    "Adversarial/Neighbor": "6712c7eda6342602e0bc7c06c282fa95e2110d4e741a284026a62d937f9780a0",
    "Natural": "f7127b7aa78104cb8e03a2b1b3ac0077e95b125714dd441a8ee63666145a3375",
}


@dataclass(frozen=True)
class Kept:
    """The rows of a set, and the file that holds them now."""

    path: Path
    rows: list[Row]

    def facts(self) -> dict[str, object]:
        """What says later which rows these were."""
        return {"file": self.path.name, "rows": len(self.rows), "sha256": sha256(self.path)}


def movie_ratings() -> Kept:
    """10,605 sentences of film reviews, `text`, and `ratings` of 15 to 29 people each, from -4 to
    4 (Hutto and Gilbert, 2014; MIT).
    """
    return kept("movie-ratings", lambda: map(asdict, fetch_movie_ratings()))


def harmless_pairs() -> Kept:
    """Pairs of answers to red-teaming chats, `chosen` and `rejected`, as people chose (Bai et al.,
    2022, HH-RLHF: harmless-base, test; MIT). Transcripts; one person a pair.
    """

    def make() -> Iterator[Row]:
        for line in gzip.decompress(download(HH)).decode("utf-8").splitlines():
            yield json.loads(line)

    return kept("hh-harmless", make)


def pandalm_pairs() -> Kept:
    """Two 7B models' answers to an instruction, and the order of each of three people, ties among
    them: `prompt`, `completions`, `raters`, `models` (Wang et al., 2023, PandaLM; Apache-2.0).
    """
    return kept("pandalm-human-pairs", lambda: parse_pandalm(download(PANDALM)))


def parse_pandalm(raw: bytes) -> Iterator[Row]:
    """Rows of the published test set: an annotator's 1 or 2 is the better answer, 0 a tie."""
    tiers = {0: [[0, 1]], 1: [[0], [1]], 2: [[1], [0]]}
    for row in json.loads(raw):
        parts = [row["instruction"].strip(), row["input"].strip()]
        yield {
            "prompt": "\n\n".join(filter(None, parts)),
            "completions": [row["response1"], row["response2"]],
            "raters": [tiers[row[f"annotator{n}"]] for n in (1, 2, 3)],
            "models": row["cmp_key"].split("_"),
        }


def llmbar_pairs() -> Kept:
    """Pairs whose better answer follows the instruction and whose worse one may only look better
    (Zeng et al., 2024, LLMBar; MIT): `prompt`, `chosen`, `rejected`, `subset`. Checked by experts.
    """

    def make() -> Iterator[Row]:
        for subset, digest in LLMBAR_SUBSETS.items():
            address = Address(f"{LLMBAR}{subset}/dataset.json", digest)
            for row in json.loads(download(address)):
                better, worse = row["label"], 3 - row["label"]
                yield {
                    "prompt": row["input"],
                    "chosen": row[f"output_{better}"],
                    "rejected": row[f"output_{worse}"],
                    "subset": subset.rpartition("/")[2],
                }

    return kept("llmbar-pairs", make)


def mqm_rankings() -> Kept:
    """German translations of English sentences of TED talks, ranked by professionals' MQM marks:
    `prompt`, `completions`, `tiers`, `mqm` (Freitag et al., 2021, WMT21; Apache-2.0).
    """
    return kept("mqm-ted-ende-rankings", lambda: parse_mqm(download(MQM).decode("utf-8")))


def parse_mqm(table: str) -> Iterator[Row]:
    """Sentences with two different translations or more, best first by their MQM score.

    An error costs 1, a major one 5, a non-translation 25, a minor one of punctuation 0.1; a score
    is minus the sum, its mean over raters and over systems that translated alike (Freitag et al.,
    2021, "Experts, Errors, and Context", section 3.3). The human reference is left out.
    """
    lines = [line.split("\t") for line in table.splitlines() if line.strip()]
    sources: dict[int, str] = {}
    targets: dict[tuple[int, str], str] = {}
    marks: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for fields in lines[1:]:
        row = dict(zip(lines[0], fields, strict=False))  # a last empty comment may be left out
        key = (int(row["seg_id"]), row["system"])
        sources[key[0]] = re.sub("</?v>", "", row["source"])
        if row["system"] != "ref":
            targets[key] = re.sub("</?v>", "", row["target"])
            marks[key][row["rater"]] -= _penalty(row["category"], row["severity"])
    for segment in sorted(sources):
        alike: dict[str, list[float]] = {}
        for key, text in targets.items():
            if key[0] == segment:
                alike.setdefault(text, []).append(_mean(marks[key].values()))
        scores = [round(_mean(of), 9) for of in alike.values()]
        levels = sorted(set(scores), reverse=True)
        tiers = [[place for place, s in enumerate(scores) if s == level] for level in levels]
        if len(scores) > 1:
            prompt = sources[segment]
            yield {"prompt": prompt, "completions": list(alike), "tiers": tiers, "mqm": scores}


def _penalty(category: str, severity: str) -> float:
    if severity == "Minor" and category == "Fluency/Punctuation":
        return 0.1
    return 25.0 if category.startswith("Non-translation") else PENALTIES[severity]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def headlines() -> Kept:
    """28,614 headlines, `text`, and whether the newspaper is satirical, `sarcastic`."""

    def make() -> Iterator[Row]:
        with zipfile.ZipFile(fetch_file(HEADLINES)) as wheel:
            raw = wheel.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8")
        for line in raw.splitlines():
            row = json.loads(line)
            text = next(m["content"] for m in row["input"] if m["role"] == "user")
            yield {"text": text, "sarcastic": row["ideal"] == "1"}

    return kept("headlines", make)


def descriptions(language: str) -> Kept:
    """Descriptions of Debian's packages by their writers and translators: `package`, `md5` (of the
    English text), `short` (one line), `long` (paragraphs apart by empty lines).
    """
    return kept(f"debian-descriptions-{language}", lambda: _from_apt(language))


def parse_descriptions(text: str) -> Iterator[Row]:
    """Rows of a `Translation-*` index; hard-wrapped lines are joined, lists keep their lines."""
    form = re.compile(
        r"Package: (?P<package>.+)\nDescription-md5: (?P<md5>\w+)\n"
        r"Description-[\w-]+: (?P<short>.+)(?P<long>(?:\n .*)*)"
    )
    for match in form.finditer(text):
        long = ""
        for line in match["long"].splitlines()[1:]:
            if line.strip() == ".":
                long += "\n\n"
            elif line.startswith("  ") or re.match(r"\s*[*-] ", line):
                long += "\n" + line.strip()
            else:
                long += ("" if not long or long.endswith("\n") else " ") + line.strip()
        yield {**match.groupdict(), "short": match["short"].strip(), "long": long.strip()}


def _from_apt(language: str) -> Iterator[Row]:
    """Debian's index of a language, fetched by apt into a folder of its own: no root is needed."""
    if shutil.which("apt-get") is None:
        raise UserError(
            "Debian's descriptions come through apt-get, which is not here; make "
            f"debian-descriptions-{language}.jsonl.gz on a Debian machine (`prefloop fetch-data` "
            "leaves it in ~/.cache/prefloop/data) and name its folder in $PREFLOOP_DATA"
        )
    with building(cache_dir() / "data" / f"apt-{language}") as folder:
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        options = {
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "Acquire::Languages": language,
            "Acquire::GzipIndexes": "false",
            "Acquire::IndexTargets::deb::Packages::DefaultEnabled": "false",
            "APT::Sandbox::User": "",  # the folder is ours alone
            "APT::Update::Post-Invoke": "",
        }
        command = ["apt-get", "update", "--quiet"]
        command += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = sorted((folder / "lists").glob(f"*_i18n_Translation-{language}"))
        if not files:
            told = (done.stderr.strip() or "no such list").splitlines()[-1]
            raise UserError(
                f"apt-get fetched no descriptions in {language!r} ({told}); check the network and "
                "that its sources name Debian's main archive"
            )
        known: set[str] = set()
        for file in files:
            for row in parse_descriptions(file.read_text(encoding="utf-8")):
                if row["md5"] not in known:
                    known.add(row["md5"])
                    yield row


def kept(name: str, make: Callable[[], Iterable[Row]]) -> Kept:
    """The set's rows where they are kept; made and kept in the cache where they are not yet."""
    file = f"{name}.jsonl.gz"
    target = cache_dir() / "data" / file
    given = os.environ.get("PREFLOOP_DATA")
    path = Path(given).expanduser() / file if given else target
    if not path.exists():
        path = target
    if not path.exists():
        write_jsonl(target, list(make()))
    return Kept(path, [row for _, row in read_rows(path)])


def download(address: Address, host: str = GITHUB) -> bytes:
    """The file's bytes; UserError where it cannot be had, or is another."""
    url = host + address.path
    try:
        with urlopen(url, timeout=SECONDS) as answer:
            raw: bytes = answer.read()
    except (URLError, OSError) as error:
        raise UserError(
            f"cannot fetch {url} ({first_line(error)}); check the network, or name a folder that "
            "holds the set in $PREFLOOP_DATA (docs/recipes.md)"
        ) from error
    if hashlib.sha256(raw).hexdigest() != address.sha256:
        raise UserError(
            f"{url}: not the pinned file (sha256 {address.sha256[:12]}...); fetch again"
        )
    return raw


def facts(sets: Sequence[Kept]) -> dict[str, object]:
    """Those of several sets, by the set's name."""
    return {one.path.name.removesuffix(".jsonl.gz"): one.facts() for one in sets}
