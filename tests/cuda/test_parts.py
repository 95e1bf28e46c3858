"""What `make cuda` runs on a GPU, on the CPU at small sizes, by the same code."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ceilings import weight_bytes
from benchmarks.cuda import correct, decode, fits, meter, models, run
from benchmarks.cuda.parts import PARTS
from benchmarks.cuda.scale import FULL, SMALL, TINY, Line
from torch import nn

from prefloop.data.batches import pack
from prefloop.models import heads, shared
from prefloop.models.load import load_reward_model
from prefloop.models.weights import Storage, kept
from prefloop.recipes.plan_table import work_of
from prefloop.training.bare_models import weights_of
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import full_plan
from prefloop.training.tracing import Ledger

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
BFLOAT16 = Storage("bfloat16")
QUICK = ("ppo-8b", "dpo-8b")
RUNS = [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in FULL.fits]


def lines_of(part: str) -> dict[str, Line]:
    return {line["what"]: line for line in PARTS[part](TINY, CPU)}


# --- Parts ---------------------------------------------------------------------------------------


def test_fast_paths_are_compared_with_float64() -> None:
    found = lines_of("correctness")
    assert set(found) == {
        "Transformers, padded, bfloat16",
        "packed, float32",
        "packed, bfloat16",
        "decode steps, float32",
        "decode steps, bfloat16",
    }
    assert 0 < found["packed, float32"]["largest"] < 1e-5
    assert found["packed, bfloat16"]["usual"] > 100 * found["packed, float32"]["usual"]


def test_a_path_beyond_its_bound_is_told() -> None:
    """By hand: half as much again as Transformers' error; more than 1e-4 in float32."""
    theirs = correct.Error(0.5, 0.1, 0.2)
    near = correct._line("x, bfloat16", correct.Error(9.0, 0.12, 0.25), theirs)
    assert near["holds"] and "1.20 times" in near["result"] and "1.25 times" in near["result"]
    for far in (correct.Error(0.5, 0.15, 0.2), correct.Error(0.5, 0.1, 0.3)):
        assert not correct._line("x, bfloat16", far, theirs)["holds"]
    assert correct._line("x, float32", correct.Error(9e-5, 1e-5, 9e-5), None)["holds"]
    for far in (correct.Error(2e-4, 1e-5, 1e-5), correct.Error(1e-5, 1e-6, 2e-4)):
        line = correct._line("x, float32", far, None)
        assert not line["holds"] and "TOO FAR" in line["result"]


def test_a_wrong_path_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines stand nevertheless."""
    right = heads.answer_log_probs
    monkeypatch.setattr(heads, "answer_log_probs", lambda *args: 1.00003 * right(*args))
    part = PARTS["correctness"](TINY, CPU)
    assert [next(part)["holds"] for _ in range(5)] == [True, False, True, True, True]
    with pytest.raises(AssertionError, match=r"beyond their bounds: packed, float32$"):
        next(part)


@pytest.mark.parametrize("part", RUNS)
def test_a_run_is_near_its_plan(part: str) -> None:
    """All live tensors are counted one by one here."""
    pytest.importorskip("bitsandbytes")
    lines = lines_of(part)
    found, plan = lines["run"], lines["plan"]
    assert found["peak"] > 0 and found["load"] > 0
    assert plan["planned"] == sum(plan["parts"].values())
    assert plan["off"] == plan["planned"] / found["peak"] - 1
    assert abs(plan["off"]) < 0.2  # of 2 MiB, where little things count
    assert len(found["steps"]) == (4 if part == "ppo-8b" else 2)
    if part == "ppo-8b":  # two iterations, with a critic and scores
        assert {"objective/scores", "objective/kl", "loss/value_avg", "grad_norm/value"} <= set(
            found["metrics"]
        )


@pytest.mark.parametrize(
    ("part", "peers"), [("train-1b", True), pytest.param("train-8b", False, marks=pytest.mark.slow)]
)
def test_steps_are_timed(part: str, peers: bool) -> None:
    found = lines_of(part)
    theirs = {"sft, Transformers", "dpo, Transformers"} if peers else set()
    assert set(found) == {"products in bfloat16", "sft", "dpo"} | theirs
    for name in ("sft", "dpo"):
        line = found[name]
        assert line["seconds"] > 0 and 0 < line["mfu"] < 1
        assert line["peak_gib"] is None  # of a CPU nobody counts it


def test_answers_are_timed() -> None:
    found = lines_of("decode-1b")
    assert set(found) == {"copies", "1 answers", "4 answers"}
    for name in ("1 answers", "4 answers"):
        line = found[name]
        assert min(line["seconds"], line["transformers"]) > 0
        assert ("plain" in line) == (name == "1 answers")
        assert 0 < line["share"] < 1


def test_answers_of_a_model_in_4_bits_are_timed() -> None:
    pytest.importorskip("bitsandbytes")
    found = lines_of("decode-8b-nf4")
    assert set(found) == {"copies", "1 answers", "4 answers"}
    for name in ("1 answers", "4 answers"):
        assert found[name]["seconds"] > 0 and 0 < found[name]["share"] < 1
        assert "transformers" not in found[name]


def test_bytes_of_a_model_in_4_bits_by_hand(tmp_path: Path) -> None:
    """Half a byte a weight, a byte for each 64, of which each 256 have a scale of 4; the head in
    bfloat16, and adapters of rank 2 as they will be multiplied.
    """
    pytest.importorskip("bitsandbytes")
    models.write_base(tmp_path, SMALL)
    storage = Storage("bfloat16", "nf4")
    model = models.load_policy(str(tmp_path), CPU, storage, trained=True, lora_rank=2)
    sides = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    layer = 0
    for out, into in sides:
        blocks = out * into // 64
        layer += out * into // 2 + blocks + 4 * -(-blocks // 256) + 2 * 2 * (out + into)
    assert weight_bytes(model, torch.bfloat16) == 3 * layer + 2 * 64 * 512


def test_bytes_of_a_decode_step_by_hand(tmp_path: Path) -> None:
    models.write_base(tmp_path, SMALL)
    model = models.load_policy(str(tmp_path), CPU, BFLOAT16)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    cache = 2 * 3 * 2 * 16  # keys and values of three layers, two heads of 16
    right = 2 * (3 * layer + 64 * 512) + 2 * 5 * 10 * cache
    assert decode.step_bytes(model, 5, 10.0) == right


# --- Models --------------------------------------------------------------------------------------


def test_drawn_weights_are_kept_as_they_are_used() -> None:
    """Linear layers in 4 bits but the head, embeddings as a folder in bfloat16 has them."""
    bnb = pytest.importorskip("bitsandbytes")
    config = models.config_of(TINY.shapes["8B"])
    module: Any = models.draw(config, CPU, kept(Storage("bfloat16", "nf4"), CPU, False))
    assert module.config.num_hidden_layers == len(module.model.layers) == 3
    assert [x.self_attn.layer_idx for x in module.model.layers] == [0, 1, 2]
    quantised = [x for x in module.modules() if isinstance(x, bnb.nn.Linear4bit)]
    assert len(quantised) == 3 * 7
    assert all(x.weight.nbytes == x.in_features * x.out_features // 2 for x in quantised)
    assert type(module.lm_head) is nn.Linear
    assert module.lm_head.weight.dtype == torch.bfloat16
    first, second = (x.mlp.up_proj.weight for x in module.model.layers[:2])
    assert not torch.equal(first, second)
    whole: Any = models.draw(config, CPU, kept(BFLOAT16, CPU, True))
    assert {p.dtype for p in whole.model.layers.parameters()} == {torch.float32}
    for layer in whole.model.layers:
        assert float(layer.mlp.up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert bool((layer.input_layernorm.weight == 1).all())


def test_no_more_than_a_layer_is_there_twice() -> None:
    """Twelve layers in 4 bits: at their peak in memory, with one layer in float32 and bfloat16."""
    pytest.importorskip("bitsandbytes")
    config = models.config_of(SMALL | {"num_hidden_layers": 12, "hidden_size": 256})
    with Ledger() as ledger:
        ledger.enter_stage("load")
        module = models.draw(config, CPU, kept(Storage("bfloat16", "nf4"), CPU, False))
    sizes = {t.untyped_storage().data_ptr(): t.nbytes for t in weights_of(module)}
    layer = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 128
    peak = sum(ledger.peaks["load"].values())
    assert peak < 1.1 * sum(sizes.values()) + 6 * layer + 4 * layer


def test_the_drawn_reward_model_is_an_adapter(tmp_path: Path) -> None:
    """It is put on a policy's base, and scores there as it does alone."""
    models.write_base(tmp_path / "base", SMALL)
    models.write_reward_adapter(tmp_path / "base", tmp_path / "scorer", 2)
    policy = models.load_policy(str(tmp_path / "base"), CPU, trained=True, lora_rank=2)
    assert shared.stands_on_base(str(tmp_path / "base"), str(tmp_path / "scorer"))
    role = shared.reward_role(policy, str(tmp_path / "scorer"), "reward", policy.tokenizer)
    weights = {k.replace(".base_layer", ""): v for k, v in policy.hf.state_dict().items()}
    own = {k: v for k, v in weights.items() if "lora_" not in k}
    whole: Any = models.draw(models.config_of(SMALL), CPU, kept(Storage(), CPU, True))
    whole.load_state_dict(own)
    whole.save_pretrained(tmp_path / "base")
    alone = load_reward_model(str(tmp_path / "scorer"), CPU)
    rows = correct_rows()
    with torch.no_grad():
        ours, theirs = (heads.answer_scores(model, pack(rows)) for model in (role, alone))
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def correct_rows() -> list[Any]:
    draw = random.Random(0)
    return [models.random_row(draw, 5, (4, 7), 512), models.random_row(draw, 9, (3,), 512)]


# --- Plans of the real sizes ---------------------------------------------------------------------


@pytest.mark.parametrize("part", RUNS)
def test_the_real_runs_are_planned_within_the_cap(part: str, tmp_path: Path) -> None:
    """With room for gaps between tensors; and they need more than a card of 12 GB."""
    pytest.importorskip("bitsandbytes")
    command, shape = part.split("-")[0], "8B" if "8b" in part.split("-") else "1B"
    config = fits.settings(part, command, shape, FULL, tmp_path)
    device = torch.device("cuda")
    roles = roles_of(config, device)
    if command == "ppo":
        assert [role.on for role in roles] == [None, "policy", "policy"]
    plan = full_plan(work_of(config), config, roles, device)
    assert 9e9 < plan.peak < 0.9 * FULL.cap


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_cap_holds() -> None:
    device = torch.device("cuda", 0)
    with meter.capped(device, 2**30):
        assert torch.zeros(2**29, dtype=torch.uint8, device=device)[-1] == 0
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**30 + 2**20, dtype=torch.uint8, device=device)
    assert torch.zeros(2**30 + 2**20, dtype=torch.uint8, device=device)[-1] == 0


# --- How parts are run ---------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
for name in map(str.strip, sys.stdin):
    print("a trainer prints, too", flush=True)
    print("turn " + json.dumps({"what": name, "result": "1 | 2", "pid": os.getpid()}), flush=True)
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "fails":
        print("turn " + json.dumps({"failed": "ValueError: no"}), flush=True)
        sys.exit(1)
    print("turn " + json.dumps({"done": True}), flush=True)
"""


def test_a_part_that_fails_does_not_stop_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    """The next one begins in a process of its own; those that are well share theirs."""
    names, sizes = ["one", "two", "fails", "three", "dies", "four", "hangs", "late"], list[int]()
    command = [sys.executable, "-c", WORKER]
    found = run.run_parts(names, command, 2.0, lambda parts: sizes.append(len(parts)))
    assert sizes == list(range(1, 9))
    assert [found[n]["failed"] for n in ("one", "two", "three", "four")] == [None] * 4
    assert found["fails"]["failed"] == "ValueError: no"
    assert found["dies"]["failed"] == "its process ended with 3"
    assert found["hangs"]["failed"].startswith("not done within")
    assert found["late"]["failed"] == "not begun: 2 seconds were over"
    pids = {name: part["lines"][0]["pid"] for name, part in found.items() if part["lines"]}
    assert pids["one"] == pids["two"] == pids["fails"] and pids["three"] == pids["dies"]
    assert len(set(pids.values())) == 3
    rows = run.table(found)
    assert "| fails | fails | 1 \\| 2 |" in rows
    assert any(row.startswith("| fails | whole part | FAILED: ValueError: no; ") for row in rows)
    assert "one: one: 1 | 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("printed", "code", "failed"),
    [
        (["....", "4 passed in 1.00s"], 0, None),
        (["4 passed, 2 skipped in 1.00s"], 0, None),
        (
            ["..F", "FAILED x.py::test - no", "1 failed, 2 passed in 1s"],
            1,
            "pytest ended with 1: 1",
        ),
        (["4 skipped in 1.00s"], 0, "no test was run"),
        ([], 4, "pytest ended with 4"),
    ],
)
def test_what_pytest_tells(printed: list[str], code: int, failed: str | None) -> None:
    lines: list[Line] = []
    script = f"import sys; print({chr(10).join(printed)!r}); sys.exit({code})"
    found = run.run_tests(60.0, lines.append, [sys.executable, "-c", script])
    assert (found or "").startswith(failed or "") and bool(found) == bool(failed)
    told = [line["result"] for line in lines]
    assert told == [x for x in printed if "FAILED" in x] + (printed[-1:] or [""])


def test_tests_that_hang_are_ended() -> None:
    script = "import time; time.sleep(60)"
    found = run.run_tests(0.5, lambda line: None, [sys.executable, "-c", script])
    assert found == "not done within 0 seconds"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "failed", "told"),
    [
        ("assert True", None, "1 passed"),
        ("assert False", "pytest ended with 1: 1 failed", "FAILED"),
        ("pytest.skip('no GPU')", "no test was run", "1 skipped"),
    ],
)
def test_the_tests_are_a_part(body: str, failed: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n\ndef test_it():\n    {body}\n")
    lines: list[Line] = []
    words = "-m pytest -q -p no:cacheprovider -c /dev/null".split()
    found = run.run_tests(60.0, lines.append, [sys.executable, *words, str(file)])
    assert (found or "").startswith(failed or "") and bool(found) == bool(failed)
    assert told in lines[0]["result"]


@pytest.mark.slow
def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    """A device that is not there: every part says so, and the exit status."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["--tiny", "--device", "cuda:0", "--part", "decode-1b", "--output"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", *words, str(tmp_path / "cuda.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    why = "prefloop.errors.UserError: --device cuda:0: no CUDA device here; use --device cpu"
    assert f"| decode-1b | whole part | FAILED: {why}; " in ended.stdout
    written = json.loads((tmp_path / "cuda.json").read_text())
    assert written["parts"]["decode-1b"]["failed"] == why


@pytest.mark.slow
def test_everything_at_small_sizes(tmp_path: Path) -> None:
    """As on a GPU, by the command, but for the tests themselves."""
    words = ["--tiny", "--device", "cpu", "--output", str(tmp_path / "cuda.json"), "--part", *PARTS]
    subprocess.run([sys.executable, "-m", "benchmarks.cuda", *words], cwd=ROOT, check=True)
    written = json.loads((tmp_path / "cuda.json").read_text())
    assert [part["failed"] for part in written["parts"].values()] == [None] * len(PARTS)


def test_scales_have_the_same_parts() -> None:
    assert FULL.fits.keys() == TINY.fits.keys() <= PARTS.keys()
    assert FULL.shapes.keys() == TINY.shapes.keys()
