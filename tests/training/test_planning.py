"""A plan against the run itself: weights, gradients and optimiser to the last byte; the peaks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefloop import CheckConfig, UserError, check
from prefloop.cli import main
from prefloop.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from prefloop.data.batches import pack
from prefloop.errors import Terminated
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.shared import critic_role
from prefloop.models.weights import storage_of
from prefloop.recipes.plan_table import work_of
from prefloop.training import optim
from prefloop.training.bare_models import weights_of
from prefloop.training.full_rows import full_rows
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import full_plan, largest, longest_micro_batch, plan
from prefloop.training.start import model_options
from prefloop.training.tracing import (
    ACTIVATIONS,
    CACHE,
    GRADIENTS,
    OPTIMISER,
    TO_GENERATE,
    WEIGHTS,
    Ledger,
    Part,
)
from tests.tiny import tiny_tokenizer
from tests.training.small import CPU, flags, settings, train, write_world

CUDA = torch.device("cuda")
COMMANDS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig}
LORA = {"dtype": "bfloat16", "lora_rank": 4}
FORMS = [(command, form) for command in COMMANDS for form in ({}, LORA)]
FORMS += [("ppo", LORA | {"share_base": "never"})]
UPPER = LORA | {"lora_targets": (r".*\.layers\.[34]\..*_proj",)}
FORMS += [("sft", UPPER), ("ppo", UPPER)]
FORMS += [("sft", {"dtype": "bfloat16"}), ("sft", {"gradient_checkpointing": True})]
LAYERS, WIDTH, INNER, VOCABULARY = 5, 64, 128, 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Five layers: two and three are rehearsed."""
    folder = tmp_path_factory.mktemp("planning") / "model"
    LlamaForCausalLM(llama()).save_pretrained(folder)
    tiny_tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


def llama(layers=LAYERS, **changes):
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | changes
    )


def run_of(command, model, **changes):
    common = {"model": model, "data": "rows", "output": Path("run"), "device": "cpu"}
    common |= {"dtype": "float32", "max_length": 128, "micro_batch_tokens": 512, "batch_size": 16}
    own = {"reward_model": model, "max_new_tokens": 32} if command == "ppo" else {}
    return COMMANDS[command](**common | own | changes)


def planned(settings, device=CPU, read=None):
    roles = roles_of(settings, device, read) if read else roles_of(settings, device)
    return full_plan(work_of(settings), settings, roles, device)


def peaks(stages, kinds=None):
    """Bytes at each stage's peak; a backward pass is one stage."""
    found = {}
    for name, parts in stages.items():
        size = sum(s for part, s in parts.items() if kinds is None or part.kind in kinds)
        name = "backward" if name.startswith("backward") else name
        found[name] = max(found.get(name, 0), size)
    return found


def measured(settings, rows):
    """The peaks of the second of two micro-batches, of tensors that are there."""
    work, ledger, models = work_of(settings), Ledger(), {}
    for role in roles_of(settings, CPU):
        if role.on:  # the critic of a run with adapters
            host = models[role.on]
            host.adapters = host.adapters or ()
            lora = models["policy"].module.peft_config["default"]
            models[role.name] = critic_role(host, "critic", lora)
            continue
        load = load_scorer if role.scorer else load_policy
        options = model_options(settings) if role.trained else {"storage": storage_of(settings)}
        models[role.name] = load(settings.model, CPU, **options)
        if not role.trained:
            models[role.name].module.requires_grad_(False)
    method = work.method(settings, models)
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, settings, method.learning_rates)
    for parameter in (p for group in parameters.values() for p in group):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with ledger:
        for model in models.values():
            for tensor in weights_of(model.module):
                ledger.claim(tensor, Part("", WEIGHTS))
            for tensor in model.own_head.parameters() if model.own_head else ():
                ledger.claim(tensor, Part("", WEIGHTS))
            for parameter in model.trainable():
                ledger.claim(parameter.grad, Part("", GRADIENTS))
                for state in optimizer.state[parameter].values():
                    ledger.claim(state, Part("", OPTIMISER))
        ledger.enter_stage("forward")
        total = torch.stack(list(method.loss(work.batch(pack(rows))).terms.values())).sum()
        ledger.enter_stage("backward")
        total.backward()
        ledger.enter_stage("update")
        for group in parameters.values():
            optim.clip_gradients(group, settings.max_grad_norm)
    return ledger.peaks


@pytest.mark.parametrize(("command", "form"), FORMS, ids=str)
def test_a_plan_holds_what_the_step_holds(command, form, model):
    settings = run_of(command, model, **form)
    found = planned(settings)
    real = measured(settings, full_rows(settings, settings.micro_batch_tokens))
    for kinds in ((WEIGHTS,), (GRADIENTS,), (OPTIMISER,)):
        assert peaks(found.stages, kinds)["update"] == peaks(real, kinds)["update"]
    mine = peaks(found.stages)
    for stage, size in peaks(real).items():
        assert mine[stage] == pytest.approx(size, rel=0.02), stage
    acts = peaks(found.stages, (ACTIVATIONS, "weights, cast"))["backward"]
    assert acts == pytest.approx(peaks(real, (ACTIVATIONS,))["backward"], rel=0.03)


def parameters_of(layers, width, inner, vocabulary, key_width, untied=False):
    """Of a Llama, by its description."""
    attention, mlp = 2 * width * width + 2 * width * key_width, 3 * width * inner
    rows = vocabulary * width * (2 if untied else 1)
    return rows + layers * (attention + mlp + 2 * width) + width


def size_of(plan, kind, model="policy"):
    return plan.parts.get(Part(model, kind), 0)


def test_bytes_by_hand(model):
    """float32: 4 bytes a weight and a gradient, 8 of moments; 4 a tensor for its count of steps."""
    found = planned(run_of("sft", model))
    count = parameters_of(LAYERS, WIDTH, INNER, VOCABULARY, WIDTH // 2)
    tensors = 1 + LAYERS * 9 + 1
    assert size_of(found, GRADIENTS) == 4 * count
    assert size_of(found, OPTIMISER) == 8 * count + 4 * tensors
    turns = 2 * 4 * (WIDTH // 4 // 2)  # rotary frequencies, kept twice
    assert size_of(found, WEIGHTS) == 4 * count + turns


def test_a_reference_that_moves_is_kept_in_float32(model):
    """4 bytes of each trained weight, of the whole policy or of its adapters."""
    for form in ({"dtype": "bfloat16"}, LORA):
        settings = run_of("ppo", model, **form)
        still, moves = planned(settings), planned(replace(settings, ema_reference=0.1))
        trained = sum(
            p.numel() for p in load_policy(model, CPU, **model_options(settings)).trainable()
        )
        assert moves.peak - still.peak == 4 * trained


def test_the_keys_and_values_of_every_slot(model):
    """96 tokens of a prompt, and a sixteenth, rounded up to 32: 128, which hold 32 more."""
    settings = run_of("ppo", model, max_concurrent=64, samples_per_prompt=16)
    held = planned(settings).stages["sampling"]
    assert held[Part("policy", CACHE)] == 64 * 128 * LAYERS * 2 * (WIDTH // 2) * 4
    linear = parameters_of(LAYERS, WIDTH, INNER, VOCABULARY, WIDTH // 2)
    linear -= WIDTH * (2 * LAYERS + 1)
    assert held.get(Part("policy", TO_GENERATE), 0) in (4 * linear, 0)  # 0 without oneDNN


def test_sampling_on_a_gpu_holds_little_beside_its_slots(model):
    """42 prompts of 96 tokens, computed at once: their keys and values in bfloat16, and what draws
    of 64 answers' logits, of which no more than four float32 copies stand at a time.
    """
    settings = run_of("ppo", model, max_concurrent=64, dtype="bfloat16", samples_per_prompt=1,
                      batch_size=64, lora_rank=4)  # fmt: skip
    held = planned(settings, CUDA).stages["sampling"]
    prompts = 42 * 96 * LAYERS * 2 * (WIDTH // 2) * 2
    assert prompts < held[Part("policy", ACTIVATIONS)] < prompts + 4 * 64 * VOCABULARY * 4


def test_four_bits_by_hand(model):
    """Half a byte a weight, a byte for 64 of them, 4 for 256 such; tables of 16 and 256 numbers."""
    pytest.importorskip("bitsandbytes")
    settings = run_of("sft", model, lora_rank=4, weights="nf4")
    linears = [WIDTH * WIDTH] * 2 + [WIDTH * WIDTH // 2] * 2 + [WIDTH * INNER] * 3
    scales = [-(-n // 64) for n in linears]
    packed = sum(n // 2 for n in linears) + sum(s + 4 * -(-s // 256) for s in scales)
    packed += len(linears) * (4 + 4 * 16 + 4 * 256)
    inputs = [WIDTH] * 6 + [INNER]
    outputs = [WIDTH, WIDTH, WIDTH // 2, WIDTH // 2, INNER, INNER, WIDTH]
    added = 4 * 4 * (sum(inputs) + sum(outputs))
    whole = 4 * (VOCABULARY * WIDTH + WIDTH + LAYERS * 2 * WIDTH) + 2 * 4 * (WIDTH // 4 // 2)
    assert size_of(planned(settings), WEIGHTS) == whole + LAYERS * (packed + added)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_weights_are_read_and_no_gpu_is_needed(command, tmp_path):
    """A folder of a configuration alone, of 8,030,261,248 weights, on a GPU that is not here."""
    llama(32, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
          num_key_value_heads=8, tie_word_embeddings=False).save_pretrained(tmp_path)  # fmt: skip
    before = torch.get_rng_state()
    changes = {"dtype": "bfloat16", "device": "cuda", "max_length": 1024}
    found = planned(run_of(command, str(tmp_path), **changes), CUDA)
    name = "reward model" if command == "reward" else "policy"
    count = 8_030_261_248
    if command == "reward":
        count += 4096 - 128256 * 4096
    assert size_of(found, GRADIENTS, name) in (4 * count, 0)
    assert size_of(found, OPTIMISER, name) == pytest.approx(8 * count, rel=1e-6)
    assert torch.equal(before, torch.get_rng_state())


def test_the_longest_micro_batch_fits_and_the_next_does_not(model):
    settings = run_of("sft", model, batch_size=4)
    work, roles = work_of(settings), roles_of(settings, CPU)

    def peak(rows):
        chosen = replace(settings, micro_batch_tokens=128 * rows)
        return full_plan(work, chosen, roles, CPU).peak

    between = (peak(2) + peak(3)) / 2
    assert longest_micro_batch(work, settings, roles, CPU, between) == 2 * 128
    assert longest_micro_batch(work, settings, roles, CPU, 10 * peak(4)) == 4 * 128
    assert longest_micro_batch(work, settings, roles, CPU, peak(1) / 2) == 0
    for most in (0, 1, 4, 8, 9):
        assert largest(most.__ge__, 9) == most


def test_a_pair_too_long_for_the_micro_batch_is_planned_in_pieces(model):
    settings = run_of("dpo", model)
    short = replace(settings, micro_batch_tokens=128)
    assert planned(short).peak < planned(replace(settings, micro_batch_tokens=255)).peak


def test_ppo_learns_of_some_answers_to_a_prompt_at_a_time(model):
    """96 tokens of a prompt with four answers of 32 each: with all of them, and with one."""
    settings = run_of("ppo", model, samples_per_prompt=4, batch_size=1, max_concurrent=1)
    plans = [planned(replace(settings, micro_batch_tokens=most)) for most in (255, 128)]
    assert [plan.tokens for plan in plans] == [96 + 4 * 32, 96 + 32]
    whole, short = (peaks(plan.stages) for plan in plans)
    assert short["forward"] < whole["forward"] and short["scoring"] < whole["scoring"]


def test_dpos_reference_computes_as_many_tokens_at_once_as_the_run(model):
    """A pair of 255 tokens in micro-batches of 128: one answer after the other."""
    settings = run_of("dpo", model, ref_model=model, batch_size=1, micro_batch_tokens=128)
    policy, reference = (load_policy(model, CPU, trained=first) for first in (True, False))
    with Ledger() as ledger, torch.no_grad():
        for tensor in (*weights_of(policy.module), *weights_of(reference.module)):
            ledger.claim(tensor, Part("", WEIGHTS))
        ledger.enter_stage("reference")
        sequence_log_probs(reference, full_rows(settings, 128), 128)
    mine = planned(settings).stages["reference"]
    assert peaks({"": mine})[""] == pytest.approx(peaks(ledger.peaks)["reference"], rel=0.01)


def test_what_a_signal_raises_while_memory_goes_is_heard():
    """It comes in whatever Python computes as a tensor goes, and there it must not be lost."""

    class Asked(Ledger):
        def _free(self):
            if self._gone:
                raise Terminated

    with Asked() as ledger:
        tensor = torch.zeros(3)
        del tensor
        with pytest.raises(Terminated):
            ledger.enter_stage("forward")


@pytest.mark.parametrize("form", [{}, LORA | {"weights": "nf4"}], ids=str)
def test_two_layers_and_three_tell_what_nine_hold(form, tmp_path):
    """Where a stage is fullest changes with the depth: at the head, or after the last layer."""
    if "weights" in form:
        pytest.importorskip("bitsandbytes")
    llama(9, vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_attention_heads=24,
          num_key_value_heads=8).save_pretrained(tmp_path)  # fmt: skip
    changes = {"dtype": "bfloat16", "max_length": 1024, "micro_batch_tokens": 2048}
    settings = run_of("ppo", str(tmp_path), **changes | form, max_new_tokens=512)
    roles, work = roles_of(settings, CUDA), work_of(settings)
    short = full_plan(work, settings, roles, CUDA)
    long = full_plan(work, settings, [role._replace(regular=False) for role in roles], CUDA)
    assert peaks(short.stages) == pytest.approx(peaks(long.stages), rel=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_tells_its_plan_before_it_starts(command, world, tmp_path, capsys):
    train(command, world, tmp_path / "run", max_steps=1)
    [told] = [line for line in capsys.readouterr().err.splitlines() if "planned memory" in line]
    assert "MiB at most" in told and "(weights " in told
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 0 < record["planned_gib"] < 0.1


def test_auto_becomes_a_number_that_is_recorded_and_kept(world, tmp_path, capsys):
    words = settings("ppo", world, tmp_path / "run", max_steps=1, save_every=1)
    words |= {"micro_batch_tokens": "auto", "max_concurrent": "auto"}
    assert main(["ppo", *flags(words)]) == 0
    assert "auto: --max-concurrent 64, --micro-batch-tokens 8192" in capsys.readouterr().err
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    assert record["auto"] == {"max_concurrent": 64, "micro_batch_tokens": 8192}
    record |= {"status": "running", "auto": {"max_concurrent": 2, "micro_batch_tokens": 64}}
    path.write_text(json.dumps(record))
    train("ppo", world, tmp_path / "run", max_steps=1, save_every=1, max_concurrent=0,
          micro_batch_tokens=0)  # fmt: skip
    assert "auto: --max-concurrent 2, --micro-batch-tokens 64" in capsys.readouterr().err


def test_check_plans_a_run(model, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    text = f"model: {model}\nmicro_batch_tokens: auto\nmax_length: 128\nbatch_size: 4\n"
    path.write_text(f"command: sft\n{text}")
    assert main(["check", "--config", str(path), "--memory", "0.5GB"]) == 0
    told = capsys.readouterr().out
    assert "GiB of each rank" in told and "optimiser" in told
    assert "fits 460.8 MiB" in told and "longest micro-batch that fits: 512 tokens" in told
    check(CheckConfig(config=path, memory="0.001"))
    assert "does not fit: a micro-batch of one row needs" in capsys.readouterr().out
    path.write_text(f"model: {model}\n")
    with pytest.raises(UserError, match="--command sft, reward, dpo or ppo"):
        check(CheckConfig(config=path))
    check(CheckConfig(config=path, command="reward"))
    assert "reward model" in capsys.readouterr().out
    with pytest.raises(UserError, match="either --model"):
        check(CheckConfig())


def test_check_plans_each_stage_of_a_pipeline(model, tmp_path, monkeypatch, capsys):
    """A stage that begins from another's output, which is not there yet, is planned as its base."""
    monkeypatch.chdir(tmp_path)
    common = "data: rows, max_length: 128, batch_size: 4"
    Path("loop.yaml").write_text(f"""stages:
- {{name: first, command: sft, settings: {{model: {model}, {common}}}}}
- {{name: judge, command: reward, settings: {{model: "${{first}}", {common}}}}}
- {{name: last, command: ppo,
    settings: {{model: "${{first}}", reward_model: "${{judge}}", {common}}}}}
""")
    assert main(["check", "--config", "loop.yaml", "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith(("first", "judge", "last"))] == [
        "first (sft)", "judge (reward)", "last (ppo)"]  # fmt: skip
    assert out.count("fits 921.6 MiB") == 3
    assert f"runs/loop/judge is not there yet: planned as {model}" in out


def test_a_run_directorys_settings_know_their_command(world, tmp_path, capsys):
    train("dpo", world, tmp_path / "run", max_steps=1)
    check(CheckConfig(config=tmp_path / "run" / "config.yaml"))
    assert "policy" in capsys.readouterr().out


def test_another_model_than_a_stack_of_equal_layers_is_planned_whole(tmp_path):
    """GPT-2 has no lean form; each of its layers is rehearsed alike."""
    from tests.tiny import tiny_model

    tiny_model("gpt2", layers=5).save_pretrained(tmp_path)
    settings = run_of("sft", str(tmp_path), max_length=64, micro_batch_tokens=128)
    roles = roles_of(settings, CPU)
    rows = full_rows(settings, 128)
    short = plan(work_of(settings), settings, roles, CPU, rows)
    whole = [role._replace(regular=False) for role in roles]
    long = plan(work_of(settings), settings, whole, CPU, rows)
    assert short.peak == long.peak
