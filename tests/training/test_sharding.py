"""Models divided among 2 and 4 ranks: the same runs, a fraction of the memory, any resume."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.config import SFTConfig
from prefloop.errors import UserError
from prefloop.models.sharding import mesh_shape
from tests.ranks import on_ranks
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.cases import LINEAR, run_case
from tests.training.loading import write_deep
from tests.training.small import assert_close_runs, lines, only_checkpoint, train, weights

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = LINEAR | {"epochs": 2.0, "save_every": 1, "keep_checkpoints": 99}
NF4 = {"weights": "nf4", "lora_rank": 2}
EIGHT = {"optimizer": "adamw8bit"}
WIDE = {"dtype": "bfloat16", "weights": "bfloat16"}
ON_FOUR = {  # run: case, what changes on one rank, too, and what does on four alone
    "sft": ("sft", {}, {}),
    "pieces": ("dpo-sigmoid", {}, {"micro_batch_tokens": 1}),
    "recomputed": ("plackett-luce", {}, {"micro_batch_tokens": 1, "gradient_checkpointing": True}),
    "replicas": ("dpo-sigmoid", {}, {"mesh": "2x2", "gradient_checkpointing": True}),
    "kto-lora": ("dpo-kto", {"lora_rank": 2}, {}),
    "lora": ("dpo-plackett-luce", {"lora_rank": 2}, {"micro_batch_tokens": 40, "mesh": "2x2"}),
    "rm-lora": ("bradley-terry", {"lora_rank": 2}, {}),
    "ppo": ("ppo-gae", {"batch_size": 5}, {"micro_batch_tokens": 40}),
    "no-critic": ("ppo-rloo", {"batch_size": 5}, {}),
    "one-base": ("ppo-one-base", {"batch_size": 5}, {"mesh": "2x2"}),
    "nf4": ("sft", NF4, {"micro_batch_tokens": 40, "gradient_checkpointing": True}),
    "nf4-replicas": ("dpo-plackett-luce", NF4, {"micro_batch_tokens": 1, "mesh": "2x2"}),
    "nf4-one-base": ("ppo-one-base", NF4 | {"batch_size": 5}, {}),
}


def start(count, world, folder, jobs):
    outcomes = on_ranks(
        count, "-m", "tests.training.on_rank", str(world), str(folder), *map(json.dumps, jobs)
    )
    told = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert [code for _, code in outcomes] == [0] * count, (told, outcomes)
    return folder


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """One rank's run with a checkpoint a step, and what it holds."""
    folder = tmp_path_factory.mktemp("one")
    train("dpo", world, folder / "whole", **STEPS)
    return folder


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tiny_model("llama", hidden=64).save_pretrained(folder / "broad")
    tiny_tokenizer(chat=False).save_pretrained(folder / "broad")
    write_deep(folder / "deep")
    jobs = [
        {"command": "dpo", "to": "whole"} | STEPS,
        {"held": "held"},
        {"held": "held-lora", "lora_rank": 2},
        {"held": "held-nf4"} | NF4,
        {"command": "sft", "to": "nf4"} | STEPS | NF4,
        {"case": "ppo-one-base", "to": "nf4-one-base"} | NF4,
        {"rounded": "rounded"},
        {"exported": "exported", "file_bytes": 20_000},
        {"command": "sft", "to": "wide", "max_steps": 3} | WIDE,
        {"command": "sft", "to": "mesh", "mesh": "3x1"},
        {"command": "sft", "to": "eight", "model": str(folder / "broad")} | STEPS | EIGHT,
        {"eight": "moments"},
        {"loaded": "loaded", "model": str(folder / "deep")},
        {"command": "sft", "to": "kept-whole", "shard": "none"} | STEPS,
    ]
    return start(2, world, folder, jobs)


@pytest.fixture(scope="module")
def four(world, alone, two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    only_checkpoint(alone / "whole", folder / "again", 2)
    only_checkpoint(two / "nf4", folder / "nf4-again", 2)
    shutil.copytree(two / "moments", folder / "moments")
    jobs = [
        {"case": case, "to": name} | both | more for name, (case, both, more) in ON_FOUR.items()
    ]
    jobs += [
        {"command": "dpo", "to": "again"} | STEPS,
        {"command": "sft", "to": "nf4-again"} | STEPS | NF4,
        {"eight": "moments"},
        {"held": "held"},
        {"held": "held-lora", "lora_rank": 2},
        {"held": "held-nf4"} | NF4,
    ]
    return start(4, world, folder, jobs)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_change_nothing(name, world, four, tmp_path):
    case, both, _ = ON_FOUR[name]
    run_case(case, world, tmp_path / "one", **both)
    assert_close_runs(tmp_path / "one", four / name)


def assert_goes_on(whole, again, step):
    """Loss and gradient norm of each step and the final weights to 1e-6; differences of sums of
    log-probs, which float32 holds no better, as elsewhere.
    """
    first, second = lines(whole), lines(again)
    assert len(first) > step
    assert_close_runs(whole, again)
    for left, right in zip(first, second, strict=True):
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-6, abs=1e-6)
    found = weights(again)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-6)


def test_a_checkpoint_of_two_ranks_goes_on_on_one(world, two, tmp_path):
    """Its slices of weights and moments; the run is the one of two ranks, to rounding."""
    assert (two / "whole" / "checkpoints" / "step-2" / "slices").is_dir()
    only_checkpoint(two / "whole", tmp_path / "again", 2)
    train("dpo", world, tmp_path / "again", **STEPS)
    assert_goes_on(two / "whole", tmp_path / "again", 2)


def test_a_checkpoint_of_one_rank_goes_on_on_four(alone, four):
    assert not (alone / "whole" / "checkpoints" / "step-2" / "slices").exists()
    assert_goes_on(alone / "whole", four / "again", 2)


def test_a_base_in_4_bits_does_not_ask_how_many_ranks_there_are(world, two, four, tmp_path):
    """PPO's roles on one base; a checkpoint of two ranks on one and on four."""
    run_case("ppo-one-base", world, tmp_path / "one", **NF4)
    assert_close_runs(tmp_path / "one", two / "nf4-one-base")
    only_checkpoint(two / "nf4", tmp_path / "again", 2)
    train("sft", world, tmp_path / "again", **STEPS | NF4)
    assert_goes_on(two / "nf4", tmp_path / "again", 2)
    assert_goes_on(two / "nf4", four / "nf4-again", 2)


@pytest.mark.parametrize("name", ["held", "held-lora", "held-nf4"])
def test_each_rank_holds_its_share(name, two, four):
    """Bytes of PPO's four models, their gradients and moments: at most 0.55 and 0.3 of one's; of
    their bases in 4 bits, too.
    """
    for folder, count, most in ((two, 2, 0.55), (four, 4, 0.3)):
        found = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(count)]
        for held in found:
            assert held["gradients"] > 0
            assert held["moments"] > 0
            assert held["whole"] == found[0]["whole"]
            assert held["weights"] + held["gradients"] + held["moments"] <= most * held["whole"]
            assert (held["whole_base"] > 0) == (name == "held-nf4")
            assert held["base"] <= most * held["whole_base"]


def test_no_rank_loads_the_whole_model(two):
    """Its half, a layer (a twelfth), and holes between: 0.6; with all of it, it would be 1.4."""
    for rank in (0, 1):
        found = json.loads((two / f"loaded-{rank}.json").read_text())
        assert 0.45 * found["whole"] < found["peak"] < found["whole"]


def test_what_is_written_file_by_file_is_the_model(world, two):
    """In Transformers' hands, to the bit, in several files."""
    assert len(list((two / "exported").glob("model-*-of-*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    found = AutoModelForCausalLM.from_pretrained(two / "exported").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_bfloat16_weights_are_divided_beside_float32_norms(world, two, tmp_path):
    train("sft", world, tmp_path / "one", max_steps=3, **WIDE)
    one, other = lines(tmp_path / "one"), lines(two / "wide")
    for left, right in zip(one, other, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.01)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=0.05)
    assert weights(tmp_path / "one").keys() == weights(two / "wide").keys()


def test_layers_travel_in_bfloat16_and_compute_the_same_bits(two):
    """Norms stay float32, and sums of gradients over ranks and micro-batches."""
    for rank in (0, 1):
        found = json.loads((two / f"rounded-{rank}.json").read_text())
        assert found["types"] == ["torch.bfloat16", "torch.float32"]
        assert found["log_probs"]
        assert found["gradients"]
        assert found["two"] < 1e-6
        assert found["samples"]


def test_moments_of_8_bits_are_those_of_one_rank(world, two, four, tmp_path):
    """To the bit, from one rank to several and from several to others; a run on wide layers goes
    on on one rank.
    """
    for folder, count in ((two, 2), (four, 4)):
        for rank in range(count):
            found = json.loads((folder / f"moments-{rank}.json").read_text())
            assert found["eight"] == ["rows of blocks", "uneven rows", "even slices", "vector"]
            assert found["same"] == found["eight"]
            assert bool(found["told"]) == (count == 4)
            assert ("1 of 5 weights keep moments of 32 bits" in found["line"]) == (rank == 0)
    told = "a weight of 12 x 384, would be cut among 4 processes; go on with as many as before"
    assert told in json.loads((four / "moments-0.json").read_text())["told"]
    only_checkpoint(two / "eight", tmp_path / "again", 2)
    train("sft", world, tmp_path / "again", model=str(two / "broad"), **STEPS | EIGHT)
    assert_close_runs(two / "eight", tmp_path / "again", 1e-4)


def test_ranks_may_keep_models_whole(world, two, tmp_path):
    train("sft", world, tmp_path / "one", **STEPS)
    assert_close_runs(tmp_path / "one", two / "kept-whole")
    kept = two / "kept-whole" / "checkpoints" / "step-2"
    assert not (kept / "slices").exists()


def test_what_cannot_be_divided_is_told_by_all(two):
    for rank in (0, 1):
        told = (two / f"mesh-told-{rank}").read_text()
        assert "--mesh 3x1 is of 3 processes, and there are 2" in told


def test_one_process_has_nobody_to_divide_among(tmp_path):
    for name, value in (("shard", "full"), ("mesh", "1x2")):
        config = SFTConfig(model="m", data="d", output=tmp_path, **{name: value})
        with pytest.raises(UserError, match=f"--{name} {value}: there is one process"):
            mesh_shape(config)
