"""A plan over ranks: what divides and what does not, by hand; monitors; what is told early."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from prefloop import CheckConfig, UserError, check
from prefloop.recipes.plan_table import work_of
from prefloop.training.bare_models import Role
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import at_least, full_plan
from prefloop.training.tracing import (
    ACTIVATIONS,
    CAST,
    GATHERED,
    GATHERED_GRADIENTS,
    GPU,
    GRADIENTS,
    OPTIMISER,
    WEIGHTS,
    Part,
)
from tests.tiny import tiny_tokenizer
from tests.training.small import CPU, train, write_world
from tests.training.test_planning import (
    COMMANDS,
    INNER,
    VOCABULARY,
    WIDTH,
    llama,
    parameters_of,
)

LAYERS = 3  # rehearsed as they are
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER + 2 * WIDTH
REST = VOCABULARY * WIDTH + WIDTH  # tied embeddings and the last norm


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a scorer."""
    folder = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM(llama(LAYERS)).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(llama(LAYERS, num_labels=1)).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        tiny_tokenizer(chat=False).save_pretrained(folder / name)
    return folder


def run_of(command, models, **changes):
    common = {"model": str(models / "policy"), "data": "rows", "output": Path("run")}
    common |= {"device": "cpu", "dtype": "float32", "max_length": 128, "batch_size": 16}
    common |= {"micro_batch_tokens": 512}
    own = {"reward_model": str(models / "scorer"), "max_new_tokens": 32} if command == "ppo" else {}
    return COMMANDS[command](**common | own | changes)


def planned(settings, ranks=1, device=CPU):
    work, roles = replace(work_of(settings), ranks=ranks), roles_of(settings, device)
    return full_plan(work, settings, roles, device)


def test_weights_gradients_and_moments_divide_and_activations_do_not(models):
    """Of four ranks each has a quarter; two layers are gathered, and what belongs to none."""
    settings = run_of("sft", models)
    alone, shared = planned(settings), planned(settings, ranks=4)
    count = parameters_of(LAYERS, WIDTH, INNER, VOCABULARY, WIDTH // 2)
    assert count == LAYERS * LAYER + REST
    turns, steps = 2 * 4 * (WIDTH // 4 // 2), 4 * (1 + LAYERS * 9 + 1)
    held = shared.stages["backward"]
    assert held[Part("policy", WEIGHTS)] == count + turns // 4
    assert held[Part("policy", GRADIENTS)] == count
    assert held[Part("policy", OPTIMISER)] == 2 * count + steps // 4
    assert held[Part("policy", GATHERED)] == 4 * (REST + 2 * LAYER)
    assert held[Part("policy", GATHERED_GRADIENTS)] == 4 * (REST + LAYER)
    acts = Part("policy", ACTIVATIONS)
    assert held[acts] == alone.stages["backward"][acts] > 0
    assert not any(part.kind.endswith("gathered") for part in shared.stages["update"])


def test_layers_travel_in_the_type_of_their_products(models):
    """With them go autocast's copies, but for that of the tied head; so while answers are sampled,
    for which a GPU makes no copy but this, and a CPU one that it can multiply by fast.
    """
    settings = run_of("ppo", models, dtype="bfloat16")
    alone, shared = (planned(settings, ranks).stages for ranks in (1, 2))
    part, cast = Part("policy", GATHERED), Part("policy", CAST)
    assert shared["backward"][part] == 4 * REST + 2 * (2 * LAYER)
    assert shared["sampling"][part] == 4 * REST + LAYERS * (2 * LAYER + 2 * 2 * WIDTH)
    on_gpu = [planned(settings, ranks, GPU).stages["sampling"] for ranks in (1, 2)]
    assert on_gpu[0][cast] > on_gpu[1][cast] == 2 * VOCABULARY * WIDTH
    assert on_gpu[1][part] == shared["sampling"][part]
    assert alone["backward"][cast] == 2 * (VOCABULARY * WIDTH + LAYERS * (LAYER - 2 * WIDTH))
    assert shared["backward"][cast] == 2 * VOCABULARY * WIDTH


def test_with_float32_adapters_beside_them_they_travel_as_kept(models):
    """Autocast's copies do not divide, and are kept for the backward pass."""
    settings = run_of("sft", models, dtype="bfloat16", weights="float32", lora_rank=4)
    alone, shared = (planned(settings, ranks).stages["backward"] for ranks in (1, 2))
    assert shared[Part("policy", CAST)] == alone[Part("policy", CAST)] > 0
    added = 4 * (6 * WIDTH + INNER + 4 * WIDTH + 2 * INNER)
    assert shared[Part("policy", GATHERED)] == 4 * (REST + 2 * (LAYER + added))


def test_of_what_learns_in_one_step_embeddings_and_head_of_both_stay_gathered(models):
    """The critic has a head of one row in place of the tied one."""
    stages = planned(run_of("ppo", models), ranks=2).stages
    held = stages["forward"]
    assert held[Part("policy", GATHERED)] == 4 * (REST + 2 * LAYER)
    assert held[Part("critic", GATHERED)] == 4 * (REST + WIDTH)  # the two layers are counted once
    assert stages["sampling"][Part("policy", GATHERED)] == 4 * (REST + LAYERS * LAYER)


def test_with_adapters_hardly_any_gradient_travels(models):
    settings = run_of("dpo", models, lora_rank=4)
    held = planned(settings, ranks=2).stages["backward"]
    inputs, outputs = 6 * WIDTH + INNER, 3 * WIDTH + WIDTH + 2 * INNER
    added = 4 * (inputs + outputs)
    assert held[Part("policy", GATHERED)] == 4 * (REST + 2 * (LAYER + added))
    assert held[Part("policy", GATHERED_GRADIENTS)] == 4 * added


def test_check_divides_weights_and_rows_among_ranks(models, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"command: sft\nmodel: {models / 'policy'}\nmax_length: 128\nbatch_size: 4\n"
        "micro_batch_tokens: 512\ndtype: float32\n"
    )
    check(CheckConfig(config=path, memory="0.5", ranks=2))
    told = capsys.readouterr().out
    assert "GiB of each of 2 ranks at the peak" in told and "gathered" in told
    assert "micro-batches of 256 tokens" in told  # a step's two rows of its own
    assert "longest micro-batch that fits: 256 tokens" in told
    with pytest.raises(UserError, match="--ranks 8: a step has --batch-size 4 rows"):
        check(CheckConfig(config=path, ranks=8))


def test_check_divides_as_the_run_will(models, tmp_path, capsys):
    """Among the shards of the mesh, or not at all."""
    path, counted = tmp_path / "run.yaml", []
    common = f"command: sft\nmodel: {models / 'policy'}\nmax_length: 128\ndtype: float32\n"
    for line in ("shard: none", "mesh: 2x2", "mesh: 1x4"):
        path.write_text(f"{common}{line}\n")
        check(CheckConfig(config=path, ranks=4))
        counted.append("gathered" in capsys.readouterr().out)
    assert counted == [False, True, True]
    path.write_text(f"{common}mesh: 2x4\n")
    with pytest.raises(UserError, match="--mesh 2x4 is of 8 processes, and --ranks 4"):
        check(CheckConfig(config=path, ranks=4))


def test_a_base_in_4_bits_divides_and_is_gathered_as_bytes(models):
    """Half a byte a weight and one for 64 of them; norms and adapters in float32."""
    pytest.importorskip("bitsandbytes")
    settings = run_of("sft", models, lora_rank=4, weights="nf4")
    alone, shared = (planned(settings, ranks).stages["backward"] for ranks in (1, 4))
    inputs, outputs = 6 * WIDTH + INNER, 3 * WIDTH + WIDTH + 2 * INNER
    matrices = LAYER - 2 * WIDTH
    layer = matrices // 2 + matrices // 64 + 4 * (2 * WIDTH + 4 * (inputs + outputs))
    held = Part("policy", WEIGHTS)
    assert shared[held] == -(-alone[held] // 4)
    assert shared[Part("policy", GATHERED)] == 4 * REST + 2 * layer


def test_a_monitors_model_stays_whole(models):
    settings = run_of("dpo", models, monitor=str(models / "scorer"), monitor_data="rows")
    alone, shared = (planned(settings, ranks).stages["update"] for ranks in (1, 2))
    monitor, start = (Part(name, WEIGHTS) for name in ("monitor", "policy as it began"))
    assert shared[monitor] == alone[monitor]
    assert shared[start] == -(-alone[start] // 2)


@pytest.mark.parametrize("command", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_monitors_model_is_planned(command, models):
    """A scorer of float32 in every stage; of SFT also the policy as it began, and answers."""
    settings = run_of(command, models, max_new_tokens=32)
    watched = replace(settings, monitor=str(models / "scorer"), monitor_data="rows")
    before, after = planned(settings), planned(watched)
    turns = 2 * 4 * (WIDTH // 4 // 2)
    scorer = 4 * (LAYERS * LAYER + REST + WIDTH) + turns
    for held in after.stages.values():
        assert held[Part("monitor", WEIGHTS)] == scorer
    start = Part("policy as it began", WEIGHTS)
    whole = 4 * (LAYERS * LAYER + REST) + turns
    assert after.parts.get(start) == (whole if command == "sft" else None)
    assert ("sampling" in before.stages) == (command == "ppo") and "sampling" in after.stages
    function = replace(watched, monitor="rewards:length")
    assert not any(part.model == "monitor" for part in planned(function).parts)


def test_at_least_by_hand(models):
    """A million weights trained in float32: 16 bytes each; a frozen one in 4 bits: a half."""
    settings = run_of("sft", models)
    role = roles_of(settings, CPU)[0]
    assert role.numel == parameters_of(LAYERS, WIDTH, INNER, VOCABULARY, WIDTH // 2)
    million = role._replace(numel=10**6)
    frozen = million._replace(trained=False, kept=replace(role.kept, nf4=True))
    assert isinstance(frozen, Role)
    assert at_least(settings, [million, frozen, frozen._replace(on="policy")]) == 16.5e6
    adapters = run_of("sft", models, lora_rank=4)
    assert at_least(adapters, [million]) == 4e6
    short = run_of("sft", models, weights="bfloat16", dtype="bfloat16", optimizer="adamw8bit")
    narrow = million._replace(kept=replace(role.kept, matrices=torch.bfloat16))
    assert at_least(short, [narrow]) == 6e6


def test_too_much_is_told_before_the_models_load(tmp_path, capsys):
    """The folder holds a configuration of 1.8 10^12 weights and no weights."""
    write_world(tmp_path)
    huge = llama(8, hidden_size=2**16, intermediate_size=2**20, num_attention_heads=512)
    huge.save_pretrained(tmp_path / "huge")
    with pytest.raises(UserError):
        train("sft", tmp_path, tmp_path / "run", model=str(tmp_path / "huge"))
    told = capsys.readouterr().err
    assert "WARNING: the models' weights, gradients and moments alone take" in told
