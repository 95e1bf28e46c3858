"""The engine over HTTP against a stand-in for vLLM (stand_in.py): exact, and nothing lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.generation.protocol import Sample
from prefloop.generation.remote import Remote
from prefloop.generation.sampler import Sampling
from prefloop.generation.server import Server
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from tests.rollouts.stand_in import StandIn, serving
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import CPU, perturbed

PROMPTS = ([5, 6, 7], [8, 9], [30, 31, 32, 33], [12])
SAMPLING = Sampling(max_new_tokens=6, temperature=0.7, stop_token_ids=frozenset(range(60, 90)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def policy(folder: Path, **options: Any) -> LoadedModel:
    return load_policy(str(folder), CPU, **options)


def remote(
    model: LoadedModel, servers: Sequence[StandIn], place: Path | None = None, **options: Any
) -> Remote:
    patience = options.pop("patience", 60.0)
    timeout = options.pop("timeout", 60.0)
    asked = [Server(server.url, timeout, patience) for server in servers]
    return Remote(asked, model, place, 8, patience, backoff=0.001, **options)


def require_all_by(model: LoadedModel, rows: list[list[Sample]], temperature: float = 0.7) -> None:
    """One sample a place, with the log-probs that the trainer computes of it."""
    assert [[(s.prompt_index, s.sample_index) for s in row] for row in rows] == [
        [(i, k) for k in range(len(row))] for i, row in enumerate(rows)
    ]
    examples = [
        Example(
            tuple(prompt), tuple(s.tokens for s in row), tuple((True,) * len(s.tokens) for s in row)
        )
        for prompt, row in zip(PROMPTS, rows, strict=True)
    ]
    ours = sequence_log_probs(model, examples, 4096, temperature)
    theirs = torch.tensor([sum(s.log_probs) for row in rows for s in row])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)


def test_answers_are_the_models_and_depend_on_nothing_else(folder: Path) -> None:
    model, told = policy(folder), Counter[tuple[int, int]]()
    with serving(folder, folder) as servers:
        engine = remote(model, servers)
        rows = engine.generate(
            PROMPTS,
            3,
            SAMPLING,
            seed=1,
            on_done=lambda s: told.update([(s.prompt_index, s.sample_index)]),
        )
        few = engine.generate(PROMPTS[2:3], 1, SAMPLING, seed=1, numbers=[2])
        greedy = engine.generate(PROMPTS[:1], 1, Sampling(4, temperature=0.0), seed=0)
        asked = [len(server.asked) for server in servers]
    require_all_by(model, rows)
    assert told == Counter((i, k) for i in range(4) for k in range(3))
    assert few[0][0].tokens == rows[2][0].tokens
    ends = {s.finish_reason: s for row in rows for s in row}
    assert ends.keys() == {"stop", "length"}
    assert ends["stop"].tokens[-1] in SAMPLING.stop_token_ids
    assert len(ends["length"].tokens) == 6
    plain = AutoModelForCausalLM.from_pretrained(folder)
    likeliest = plain(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax()
    assert greedy[0][0].tokens[0] == int(likeliest)
    assert min(asked) > 1  # both were asked


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "fault",
    [500, *(pytest.param(f, **SLOW) for f in (429, b"<html>", b'{"choices": []}', "drop"))],
    ids=str,
)
def test_faults_that_pass(fault: Any, folder: Path) -> None:
    model = policy(folder)

    def sometimes(path: str, _: Any, before: int) -> Any:
        return fault if path in ("/v1/completions", "/pause") and before % 4 == 1 else None

    with serving(folder, fault=sometimes) as servers:
        rows = remote(model, servers).generate(PROMPTS, 2, SAMPLING, seed=1)
    require_all_by(model, rows)


def test_new_weights_answer_also_from_servers_that_were_started_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two servers one dies with requests under way, the other between two iterations."""
    model, told = perturbed(policy(folder), seed=3), Counter[tuple[int, int]]()
    with serving(folder, folder) as (first, second):
        engine = remote(model, [first, second], tmp_path / "weights")
        engine.sync(model, 0)
        require_all_by(model, engine.generate(PROMPTS, 1, SAMPLING, seed=1))
        perturbed(model, seed=4)
        engine.sync(model, 1)
        first.kill()
        first.start()  # holds what stands on disk, and no request has failed

        def killed(sample: Sample) -> None:
            told.update([(sample.prompt_index, sample.sample_index)])
            if told.total() == 2:
                second.kill()
            if told.total() == 6:
                second.start()

        rows = engine.generate(PROMPTS, 5, SAMPLING, seed=2, on_done=killed)
        again = engine.generate(PROMPTS, 5, SAMPLING, seed=2)
        assert first.version == second.version == engine.weights.mark  # type: ignore[union-attr]
        kept = [path.name for path in (tmp_path / "weights").iterdir()]
    require_all_by(model, rows)
    assert told == Counter((i, k) for i in range(4) for k in range(5))
    assert {s.weights_version for row in rows for s in row} == {1}
    assert [[s.tokens for s in row] for row in rows] == [[s.tokens for s in row] for row in again]
    assert "left out until it holds the weights" in capsys.readouterr().err
    assert len(kept) == 2


def test_a_head_that_is_tied_and_packed_is_renewed(folder: Path, tmp_path: Path) -> None:
    """As vLLM holds it on the CPU; and nothing of it stays behind."""
    place = tmp_path / "tied"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    model = perturbed(policy(place), seed=3)
    for device, loads in (("cpu", 2), ("cuda", 1)):
        with serving(place, device=device) as (server,):
            engine = remote(model, [server], tmp_path / "weights")
            engine.sync(model, 0)
            require_all_by(model, engine.generate(PROMPTS, 2, SAMPLING, seed=1))
            assert len(server.read) == loads
            assert list((tmp_path / "weights").iterdir()) == server.read[:1]


@pytest.mark.slow
def test_an_adapter_is_asked_for_by_its_version(folder: Path, tmp_path: Path) -> None:
    model = perturbed(policy(folder, lora_rank=2), seed=5)
    with serving(folder, tunable=False) as (server,):
        engine = remote(model, [server], tmp_path / "weights")
        for version in range(3):
            engine.sync(model, version)
            if version == 1:
                server.kill()
                server.start()
            require_all_by(model, engine.generate(PROMPTS, 1, SAMPLING, seed=version))
            assert len(server.loaded) == 1
            perturbed(model, seed=6 + version)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sampling", "told"),
    [
        ({"mode": "raw_logprobs"}, SAMPLING, "those at temperature 1, and --temperature is 0.7"),
        ({}, Sampling(4, top_p=0.5), "those of what --top-p and --top-k leave"),
        ({"mode": "raw_logits"}, SAMPLING, "gives logits, not log-probs"),
        ({}, Sampling(4, temperature=0.001), "vLLM samples at 0.01 at least"),
        ({"fault": lambda *_: 401}, SAMPLING, "give its API key in PREFLOOP_ROLLOUT_API_KEY"),
        ({"fault": lambda p, *_: 404}, SAMPLING, "give a vLLM server's URL"),
        (
            {"fault": lambda p, *_: 400 if "completions" in p else None},
            SAMPLING,
            r"status 400 \(no\)",
        ),
        (
            {"fault": lambda p, b, n: 500 if "completions" in p and n else None},
            SAMPLING,
            r"prompt \d: http://127.0.0.1:\d+: status 500 \(no\)",
        ),
    ],
)
def test_what_cannot_be_exact_or_cannot_work_is_told(
    options: Any, sampling: Sampling, told: str, folder: Path
) -> None:
    with serving(folder, **options) as servers, pytest.raises(UserError, match=told):
        remote(policy(folder), servers).generate(PROMPTS, 1, sampling, seed=0)


@pytest.mark.slow
def test_other_weights_than_the_models_are_told(folder: Path, tmp_path: Path) -> None:
    """A server that cannot be given weights serves the model, or none."""
    model = policy(folder)
    with serving(folder, tunable=False, adapters=False) as servers:
        require_all_by(model, remote(model, servers).generate(PROMPTS, 1, SAMPLING, seed=0))
        with pytest.raises(UserError, match="start it with VLLM_SERVER_DEV_MODE=1"):
            remote(model, servers, tmp_path / "weights").sync(model, 0)
        tuned = policy(folder, lora_rank=2)
        with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            remote(tuned, servers, tmp_path / "weights").sync(tuned, 0)


@pytest.mark.slow
def test_raw_log_probs_are_exact_at_temperature_1(folder: Path) -> None:
    model = policy(folder)
    with serving(folder, mode="raw_logprobs") as servers:
        rows = remote(model, servers).generate(PROMPTS, 1, Sampling(5, top_k=3), seed=0)
    require_all_by(model, rows, 1.0)


@pytest.mark.slow
def test_a_server_that_stays_silent_is_left_out(folder: Path) -> None:
    """Its answers come from the other; asked again after two seconds, it is silent no more."""
    model = policy(folder)

    def silent(path: str, _: Any, before: int) -> str | None:
        return "silence" if path == "/v1/completions" and before == 1 else None

    with serving(folder, folder, fault=silent) as servers:
        rows = remote(model, servers, timeout=2.0).generate(PROMPTS, 3, SAMPLING, seed=1)
    require_all_by(model, rows)


@pytest.mark.slow
def test_nobody_there_ends_the_command(folder: Path) -> None:
    with serving(folder) as servers:
        servers[0].kill()
        engine = remote(policy(folder), servers, patience=0.2)
        with pytest.raises(UserError, match=r"no reply for .* seconds \(http://127"):
            engine.generate(PROMPTS, 1, SAMPLING, seed=0)
