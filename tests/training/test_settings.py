"""No setting is accepted and ignored: changed alone, in every mode, it is told or has an effect.

Effect: other metrics, samples, weights or files than without it. Told: another outcome than a
finished run. `ALONE` lists what may be given where it changes nothing, with the reason.
"""

import hashlib
import json
from dataclasses import MISSING, fields
from typing import get_args

import pytest

from prefloop.config import DPOLoss, RewardLoss
from prefloop.errors import UserError
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from tests.training.small import (
    CONFIGS,
    REWARDS,
    lines,
    policy,
    train,
    weights,
    write_rows,
)

BATCH = {"batch_size": 3, "epochs": 1.0}
MODES = {
    "sft": [{}],
    "reward": [{"loss": loss} for loss in get_args(RewardLoss)],
    "dpo": [
        {"loss": loss} | ({"label_smoothing": 0.1} if loss == "robust" else {})  # else sigmoid
        for loss in get_args(DPOLoss)
    ],
    "ppo": [
        {"advantage": name, "samples_per_prompt": 2, "ppo_epochs": 3, "max_new_tokens": 12}
        for name in ("gae", "rloo", "grpo", "dr-grpo")
    ],
}
CHANGES = {  # every setting but output: another value, {world} standing for the world's folder
    "model": "{world}/reference",
    "data": "{world}/other.jsonl",
    "eval_data": "{world}/held_out.jsonl",
    "eval_fraction": 0.3,
    "resume": "{world}/absent",
    "seed": 5,
    "epochs": 2.0,
    "max_steps": 1,
    "batch_size": 4,
    "lr": 1e-2,
    "lr_schedule": "cosine",
    "lr_floor": 0.5,
    "optimizer": "adamw8bit",
    "warmup": 0.5,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_eps": 1e-2,
    "max_grad_norm": 1e-3,
    "dtype": "bfloat16",
    "share_base": "never",
    "shard": "full",
    "mesh": "2x1",
    "weights": "nf4",
    "device": "cuda:63",
    "lora_rank": 2,
    "lora_alpha": 64.0,
    "lora_targets": ("q_proj",),
    "lora_dropout": 0.5,
    "modules_to_save": ("embed_tokens",),
    "max_length": 24,
    "truncation": "drop",
    "log_every": 4,
    "eval_every": 1,
    "save_every": 1,
    "keep_checkpoints": 1,
    "track": "tensorboard",
    "train_on": "all",
    "loss": None,  # each other mode
    "advantage": None,
    "normalize": "pair",
    "center_coefficient": 0.1,
    "tie_parameter": 3.0,
    "beta": 0.7,
    "label_smoothing": 0.2,
    "ref_model": "{world}/reference",
    "sft_coefficient": 0.5,
    "ipo_average": False,
    "simpo_gamma": 2.0,
    "orpo_lambda": 2.0,
    "desirable_weight": 3.0,
    "undesirable_weight": 3.0,
    "reward_model": "{world}/other_rm",
    "reward_function": (f"{REWARDS}:by_length",),
    "reward_weights": (2.0,),
    "value_model": "{world}/model",
    "kl_coef": 0.5,
    "kl_target": 1e-3,
    "kl_horizon": 20.0,
    "gamma": 0.5,
    "gae_lambda": 0.2,
    "cliprange": 1e-4,
    "clip_high": 1e-4,
    "cliprange_value": 1e-4,
    "vf_coef": 2.0,
    "value_lr": 1e-2,
    "critic_warmup": 1,
    "bootstrap_cut": True,
    "ema_reference": 0.5,
    "ppo_epochs": 1,
    "num_minibatches": 3,
    "samples_per_prompt": 3,
    "max_new_tokens": 3,
    "temperature": 0.5,
    "missing_eos_penalty": -9.0,
    "normalize_scores": True,
    "reward_clip": 1e-3,
    "whiten_rewards": True,
    "target_kl": 1e-9,
    "sft_data": "{world}/sft.jsonl",
    "ptx_coef": 0.5,
    "monitor": f"{REWARDS}:constant",
    "monitor_data": "{world}/held_out.jsonl",
    "monitor_steps": 1,
    "keep_best": True,
}
MONITORED = {"monitor": f"{REWARDS}:constant", "monitor_data": "{world}/prompts.jsonl"}
WITH = {  # read only with these, which have no default that shows it
    "lr_floor": {"lr_schedule": "linear"},
    "lora_alpha": {"lora_rank": 2},
    "share_base": {"lora_rank": 2},
    "lora_targets": {"lora_rank": 2},
    "lora_dropout": {"lora_rank": 2},
    "modules_to_save": {"lora_rank": 2},
    "truncation": {"max_length": 24},
    "max_length": {"truncation": "drop"},
    "eval_every": {"eval_fraction": 0.3},
    "keep_checkpoints": {"save_every": 1},
    "reward_function": {"reward_model": None},
    "reward_weights": {"reward_model": None, "reward_function": (f"{REWARDS}:by_length",)},
    "kl_horizon": {"kl_target": 1e-3},
    "sft_data": {"ptx_coef": 0.5},
    "ptx_coef": {"sft_data": "{world}/sft.jsonl"},
    "monitor": {"monitor_data": "{world}/prompts.jsonl"},
    "monitor_data": MONITORED,
    **dict.fromkeys(("monitor_steps", "keep_best", "max_new_tokens", "temperature"), MONITORED),
}
ALONE = {  # may be given where it changes nothing
    "truncation": "the rows say whether any is too long",
    "keep_checkpoints": "an interruption and --save-every leave more than one",
}
ELSEWHERE = {  # changes no number: the test that finds its effect
    "label_margins": "training/test_rows.py::test_margins_of_what_labellers_said_reach_the_loss",
    "stop_on_hacking": "training/test_monitor.py::test_a_run_ends_when_it_is_gamed",
    "policy_norm": "training/test_ppo.py::test_dr_grpo_by_hand",  # grpo: no answer ends
    "judge": "training/test_llm_reward.py::test_scores_are_the_judges_and_their_cost_is_logged",
    "judge_prompt": "evaluation/test_llm_judges.py::test_a_prompt_of_ones_own_has_its_own_scale",
    "judge_args": "evaluation/test_llm_judges.py::test_replies_are_asked_for_once",
    "judge_concurrency": "evaluation/test_llm_judges.py::test_so_many_requests_at_once",
    "judge_timeout": "evaluation/test_llm_judges.py::test_faults_that_pass",
    "judge_cache": "evaluation/test_llm_judges.py::test_replies_are_asked_for_once",
    "reward_ensemble": "training/test_one_base.py::test_several_scores_are_one",
    "micro_batch_tokens": "data/test_batches.py::test_micro_batches_keep_order_and_budget",
    "gradient_checkpointing": "training/test_loop.py::test_checkpointing_keeps_fewer_activations",
    "save_minutes": "training/test_keeper.py::test_runs_save_by_time_too",
    "bad_rows": "outside/test_several_bad_rows.py::test_training_drops_counts_and_lists_bad_rows",
    "chat": "outside/test_strings_for_a_chat_model.py::test_sft_takes_turns",
    "template_args": "training/test_template_args.py::test_training_takes_and_records_them",
    "rollout_engine": "rollouts/test_commands.py::test_ppo_learns_from_servers",
    "rollout_folder": "rollouts/test_commands.py::test_ppo_learns_from_servers",
    "rollout_ahead": "rollouts/test_ahead.py::test_a_monitor_waits_for_what_is_being_sampled",
    "rollout_timeout": "rollouts/test_remote.py::test_a_server_that_stays_silent_is_left_out",
    "rollout_patience": "rollouts/test_remote.py::test_nobody_there_ends_the_command",
    "importance_cap": "rollouts/test_commands.py::test_importance_weights_scale_the_gradient",
    "max_concurrent": "training/test_settings.py::test_max_concurrent_bounds_what_is_decoded",
}
TOLD = {
    "device",
    "resume",
    "weights",
    "shard",
    "mesh",
}  # whose other value here is nothing but told
SHARED = {f.name for f in fields(CONFIGS["sft"])} - {"train_on"}


@pytest.fixture(scope="module")
def more_world(world):
    """The world with other rows of each kind and another reward model."""
    from prefloop.models.export import export_model
    from prefloop.models.load import load_scorer
    from tests.training.small import CPU

    export_model(load_scorer(str(world / "model"), CPU, seed=7), world / "other_rm")
    row = {
        "prompt": "oath",
        "completion": " took",
        "label": True,
        "chosen": " a",
        "rejected": " in",
    }
    write_rows(world / "other.jsonl", [row | {"prompt": f"oath {n}"} for n in range(9)])
    write_rows(world / "held_out.jsonl", [row, row | {"prompt": "boat"}])
    return world


def outcome(command, world, output, **changes):
    """What a run ends with: the error's line, or everything that it wrote but times and paths."""
    placed = {
        name: value.format(world=world) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    if placed.get("loss") == "kto" and "data" not in placed:
        placed["data"] = str(world / "pairs.jsonl")
    try:
        train(command, world, output, **placed)
    except UserError as error:
        return str(error).replace(str(output), "")
    digest = hashlib.sha256()
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (output / name).exists():
            digest.update(json.dumps(lines(output, name)).encode())
    for name, tensor in weights(output).items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest(), sorted({str(p.relative_to(output)) for p in output.glob("*/*")})


def test_every_setting_has_another_value_here():
    names = {field.name for config in CONFIGS.values() for field in fields(config)}
    assert names - {"output"} == CHANGES.keys() | ELSEWHERE.keys()
    for config in CONFIGS.values():
        for field in fields(config):
            if field.name in CHANGES and field.default is not MISSING:
                assert CHANGES[field.name] != field.default, field.name


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_changes_no_number_is_tested_elsewhere(name, request):
    path, test = ELSEWHERE[name].split("::")
    text = (request.config.rootpath / "tests" / path).read_text(encoding="utf-8")
    assert f"def {test}(" in text


def test_max_concurrent_bounds_what_is_decoded(world):
    """Fewer at once: more forward passes for the same answers."""
    model, passes = policy(world), []
    model.hf.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))

    def count(at_once):
        passes.clear()
        Engine(model, at_once).generate([[5, 6, 7]], 6, Sampling(max_new_tokens=4), 0)
        return len(passes)

    assert count(1) > count(3) > count(6) == count(64)


def other_modes(command, name, mode):
    """The values that a setting is changed to."""
    if name in ("loss", "advantage"):
        same = {mode[name]} | ({"robust"} if mode[name] == "sigmoid" else set())  # at 0 smoothing
        return [other[name] for other in MODES[command] if other[name] not in same]
    return [CHANGES[name]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", CONFIGS)
def test_no_setting_is_accepted_and_ignored(command, more_world, tmp_path):
    """What all modes share (the loop reads it) is tried in the first mode of each command."""
    found, ignored, number = set(), [], 0
    known = {}

    def ends(**changes):
        nonlocal number
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            number += 1
            known[key] = outcome(command, more_world, tmp_path / f"run-{number}", **changes)
        return known[key]

    for place, mode in enumerate(MODES[command]):
        base = BATCH | mode
        assert isinstance(ends(**base), tuple)
        for field in fields(CONFIGS[command]):
            name = field.name
            if name not in CHANGES or (place > 0 and name in SHARED):
                continue
            for value in other_modes(command, name, mode):
                if ends(**base | {name: value}) == ends(**base) and name not in ALONE:
                    ignored.append((mode, name))
                with_it = base | WITH.get(name, {})
                before, after = ends(**with_it), ends(**with_it | {name: value})
                if isinstance(after, tuple) and before != after:
                    found.add(name)
    assert ignored == []
    every = {field.name for field in fields(CONFIGS[command])} & CHANGES.keys()
    told = TOLD | ({"lora_dropout"} if command == "ppo" else set())
    assert every - found == told & every
