"""Rollouts from a real vLLM server on the CPU, by SmolLM2-135M; `make vllm`.

In float32, where trainer and server agree to 1e-4 nats, and in bfloat16, where each rounds in its
own way: there both are compared with float64 on the same weights, by plain Transformers.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefloop.config import PPOConfig
from prefloop.config.ranges import DType
from prefloop.data.batches import to_batches
from prefloop.data.tokenize import Example
from prefloop.files import cache_dir
from prefloop.generation.protocol import Sample
from prefloop.generation.remote import Remote
from prefloop.generation.sampler import Sampling
from prefloop.generation.server import Server
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage
from prefloop.training import ppo
from tests.clients.conftest import python_of
from tests.training.small import CPU, lines, write_rows

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3000)]
MODEL = cache_dir() / "models" / "smollm2-135m-instruct"
NEAR: dict[DType, float] = {"float32": 1e-4, "bfloat16": 0.06}
"""Trainer to server, in the mean. docs/rollouts.md says why bfloat16 gives no .02."""
TRAINER: dict[DType, float] = {"float32": 1e-4, "bfloat16": 0.035}
SERVER: dict[DType, float] = {"float32": 1e-4, "bfloat16": 0.045}
"""Each to float64, in the mean."""
FAR = 0.2  # what other weights give
STARTS = 900.0  # seconds that a server may take to start
TEMPERATURE = 0.7
ASKED = ("The capital of France is", "Once upon a time", "Water boils", "To bake bread, you")


class Process:
    """A vLLM server of its own process group, killed as a machine would lose it."""

    def __init__(self, folder: Path, dtype: DType) -> None:
        self.log, self.dtype = folder / "vllm.log", dtype
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.python, self.seconds = python_of("vllm"), 0.0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", str(MODEL), "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--dtype", self.dtype, "--max-model-len", "256", "--max-num-seqs", "16"]
        words += ["--enforce-eager", "--logprobs-mode", "processed_logprobs"]
        words += ["--enable-lora", "--max-lora-rank", "8"]
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        quiet |= {"TORCHDYNAMO_DISABLE": "1"}  # nothing is worth compiling here
        quiet |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        quiet |= {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(self.log.parent)}
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, env=quiet, start_new_session=True
            )
        while not self._healthy():
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            assert time.monotonic() - began < STARTS, self.log.read_text()[-6000:]
            time.sleep(0.5)
        self.seconds = time.monotonic() - began
        print(f"vLLM in {self.dtype} started in {self.seconds:.0f} s")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module", params=list(NEAR))
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Process]:
    if request.config.option.markexpr != "vllm":
        pytest.skip("starts a vLLM server, in a venv of 3.4 GB: make vllm")
    if not MODEL.is_dir():
        pytest.skip("needs SmolLM2-135M: prefloop fetch-model")
    process = Process(tmp_path_factory.mktemp("vllm"), request.param)
    try:
        yield process
    finally:
        process.kill()


def policy(server: Process, **options: Any) -> LoadedModel:
    return load_policy(str(MODEL), CPU, Storage(server.dtype, "float32"), **options)


def moved(model: LoadedModel, scale: float) -> None:
    """Moves each weight by that share of its tensor's deviation, at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.trainable():
            noise = torch.randn(weight.shape, generator=generator)
            weight += scale * noise * weight.std(correction=0).clamp(min=0.02)


def prompts(model: LoadedModel) -> list[list[int]]:
    return [model.tokenizer(text)["input_ids"] for text in ASKED]


def log_probs(model: LoadedModel, rows: list[list[Sample]]) -> tuple[Tensor, Tensor]:
    """Of all tokens, as the trainer computes them and as the server told."""
    pairs = [(p, s) for p, row in zip(prompts(model), rows, strict=True) for s in row]
    examples = [
        Example(tuple(p), (s.tokens,), ((True,) * len(s.tokens),), index=i, where="")
        for i, (p, s) in enumerate(pairs)
    ]
    with torch.no_grad():
        ours = [
            answer_log_probs(model, batch, TEMPERATURE)
            for batch in to_batches(examples, 2048, CPU, not model.packed)
        ]
    return torch.cat(ours), torch.tensor([p for _, s in pairs for p in s.log_probs])


@torch.no_grad()
def exact(model: LoadedModel, rows: list[list[Sample]], dtype: DType) -> Tensor:
    """The same in float64, by plain Transformers on the weights as they are in that type."""
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).double().eval()
    found = []
    for prompt, row in zip(prompts(model), rows, strict=True):
        for tokens in (sample.tokens for sample in row):
            logits = plain(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            chosen = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor([tokens]).T)
            found.append(chosen.squeeze(1))
    return torch.cat(found)


class Gap(NamedTuple):
    """|log pi| differences, nats a token."""

    mean: float
    largest: float


def gap(of: str, one: Tensor, other: Tensor) -> Gap:
    difference = (one.double() - other.double()).abs()
    found = Gap(float(difference.mean()), float(difference.max()))
    print(f"{of}: {len(one)} tokens, mean {found.mean:.2e}, largest {found.largest:.2e}")
    return found


def mean_gap(model: LoadedModel, rows: list[list[Sample]]) -> float:
    return gap("trainer to server", *log_probs(model, rows)).mean


def engine(server: Process, model: LoadedModel, place: Path) -> Remote:
    return Remote([Server(server.url, 300.0, 900.0)], model, place, 8, 900.0)


def sampling(model: LoadedModel, tokens: int = 24) -> Sampling:
    stop = model.tokenizer.eos_token_id
    return Sampling(tokens, temperature=TEMPERATURE, stop_token_ids=frozenset([stop]))


def test_each_side_against_float64(server: Process, tmp_path: Path) -> None:
    model = policy(server)
    remote = engine(server, model, tmp_path)
    rows = remote.generate(prompts(model), 8, sampling(model), seed=1)
    ours, theirs = log_probs(model, rows)
    true = exact(model, rows, server.dtype)
    print(server.dtype)
    assert gap("trainer to float64", ours, true).mean < TRAINER[server.dtype]
    assert gap("server to float64", theirs, true).mean < SERVER[server.dtype]
    assert gap("trainer to server", ours, theirs).mean < NEAR[server.dtype]


def test_log_probs_match_and_new_weights_answer(server: Process, tmp_path: Path) -> None:
    model, before = policy(server, trained=True), policy(server)
    remote = engine(server, model, tmp_path)
    remote.sync(model, 0)
    first = remote.generate(prompts(model), 2, sampling(model), seed=1)
    assert mean_gap(model, first) < NEAR[server.dtype]
    assert [len(row) for row in first] == [2] * len(ASKED)
    moved(model, 0.05)
    remote.sync(model, 1)
    second = remote.generate(prompts(model), 2, sampling(model), seed=1)
    assert mean_gap(model, second) < NEAR[server.dtype]
    assert mean_gap(before, second) > FAR
    assert {s.weights_version for row in second for s in row} == {1}


def test_an_adapter_answers(server: Process, tmp_path: Path) -> None:
    model, before = policy(server, lora_rank=4), policy(server)
    moved(model, 2.0)
    remote = engine(server, model, tmp_path)
    remote.sync(model, 0)
    rows = remote.generate(prompts(model), 2, sampling(model), seed=1)
    assert mean_gap(model, rows) < NEAR[server.dtype]
    assert mean_gap(before, rows) > FAR


def test_a_server_that_is_killed_and_started_again(server: Process, tmp_path: Path) -> None:
    """Each place gets one answer, by the weights that the dead server had been given."""
    model, told = policy(server, trained=True), Counter[tuple[int, int]]()
    moved(model, 0.05)
    remote = engine(server, model, tmp_path)
    remote.sync(model, 3)
    again: list[threading.Thread] = []

    def on_done(sample: Sample) -> None:
        told.update([(sample.prompt_index, sample.sample_index)])
        if told.total() == 4:
            server.kill()
            again.append(threading.Thread(target=server.start))
            again[0].start()

    rows = remote.generate(prompts(model), 5, sampling(model), seed=2, on_done=on_done)
    again[0].join()
    assert told == Counter((i, k) for i in range(len(ASKED)) for k in range(5))
    assert mean_gap(model, rows) < NEAR[server.dtype]


def test_ppo_runs_three_iterations(server: Process, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED])
    config = PPOConfig(
        model=str(MODEL),
        data=str(data),
        output=tmp_path / "run",
        reward_function="tests.training.rewards:by_length",  # type: ignore[arg-type]
        advantage="rloo",
        samples_per_prompt=2,
        batch_size=4,
        ppo_epochs=1,
        max_steps=3,
        max_new_tokens=12,
        lr=1e-6,
        dtype=server.dtype,
        device="cpu",
        rollout_engine=server.url,
        importance_cap=2.0,
    )
    ppo.run(config)
    rows = lines(tmp_path / "run")
    print([(row["val/sampler_gap"], row["val/importance"]) for row in rows])
    assert len(rows) == 3
    assert max(row["val/sampler_gap"] for row in rows) < NEAR[server.dtype]
    assert {r["weights_version"] for r in lines(tmp_path / "run", "samples.jsonl")} == {0, 1, 2}
