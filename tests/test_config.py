"""Settings: defaults < YAML < flags; what is wrong is told in one line."""

import importlib
from pathlib import Path

import pytest
import yaml

from prefloop import (
    ChatConfig,
    CheckConfig,
    CompareConfig,
    DPOConfig,
    GenerateConfig,
    PPOConfig,
    RewardConfig,
    RewardQualityConfig,
    SampleConfig,
    SFTConfig,
    WinrateConfig,
)
from prefloop.config.checks import validate
from prefloop.config.labelling import LabelExportConfig, LabelScoreConfig
from prefloop.config.ranges import Above, AtLeast, Within
from prefloop.config.resolve import as_dict, build, resolve
from prefloop.errors import UserError

SFT = ["--model", "m", "--data", "d.jsonl", "--output", "out"]
BASE = {"model": "m", "data": "d.jsonl", "output": Path("out")}
GROUPS = BASE | {"reward_model": "r", "advantage": "rloo", "samples_per_prompt": 2}
COMPARE = {"sft": "s", "models": ("a=b",), "data": "d", "judge": "a:b", "output": Path("o")}


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_flags_go_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "model: from-yaml\ndata: d\noutput: o\nlr: 2e-4\nbatch_size: 8\n")
    config = resolve(SFTConfig, path, ["--batch-size", "16", "--gradient-checkpointing"])
    assert (config.model, config.lr, config.batch_size) == ("from-yaml", 2e-4, 16)
    assert config.gradient_checkpointing
    assert config.epochs == 1.0
    assert config.output == Path("o")


def test_a_yaml_bool_can_be_turned_off_by_a_flag(tmp_path):
    path = write(tmp_path, "gradient_checkpointing: true\n")
    assert resolve(SFTConfig, path, SFT).gradient_checkpointing
    assert not resolve(
        SFTConfig, path, [*SFT, "--no-gradient-checkpointing"]
    ).gradient_checkpointing


def test_empty_yaml_and_null_for_an_optional_setting(tmp_path):
    assert resolve(SFTConfig, write(tmp_path, ""), SFT) == resolve(SFTConfig, None, SFT)
    assert resolve(SFTConfig, write(tmp_path, "eval_data: null"), SFT).eval_data is None


def test_lists_of_words():
    config = resolve(GenerateConfig, None, ["--model", "m", "--prompt", "one", "two"])
    assert config.prompt == ("one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 8", "unknown key `batchsize`; did you mean batch_size?"),
        ("batch_size: eight", "`batch_size` is 'eight'; give a whole number"),
        ("batch_size: 8.5", "`batch_size` is 8.5; give a whole number"),
        ("batch_size: true", "`batch_size` is True; give a whole number"),
        ("lr: [1]", "`lr` is [1]; give a number"),
        ("model: 5", "`model` is 5; give text"),
        ("gradient_checkpointing: 1", "`gradient_checkpointing` is 1; give true or false"),
        ("dtype: float16", "`dtype` is 'float16'; choose from auto, float32, bfloat16"),
        ("- 1", "holds a list; write `key: value` lines"),
        ("lr: 1\nmodel: [", ":2: "),
        ("dtype: [float32]", "choose from auto, float32, bfloat16"),
    ],
)
def test_yaml_faults_name_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        resolve(SFTConfig, path, SFT)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_yaml_that_is_absent_or_not_utf8(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        resolve(SFTConfig, tmp_path / "absent.yaml", SFT)
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 10"):
        resolve(SFTConfig, path, SFT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lrr", "1"], "unknown flag --lrr; did you mean --lr?"),
        (
            ["--micro-batch-token=4"],
            "unknown flag --micro-batch-token; did you mean --micro-batch-to",
        ),
        (["--xyzzy", "4"], "unknown flag --xyzzy; see --help"),
        (["--lr", "much"], "--lr is 'much'; give a number"),
        (["--lr=much"], "--lr is 'much'; give a number"),
        (["--seed", "1.5", "--chat"], "--seed is '1.5'; give a whole number"),
        (["--micro-batch-tokens", "many"], "is 'many'; give a whole number or auto"),
        (["--dtype", "float16"], "--dtype is 'float16'; give auto or float32 or bfloat16"),
        (["--lr"], "--lr has no value; give a number"),
        (["--lr", "--chat"], "--lr has no value; give a number"),
        (["surplus"], "surplus"),
    ],
)
def test_flag_faults_are_one_line(flags, message, capsys):
    with pytest.raises(UserError) as caught:
        resolve(SFTConfig, None, [*SFT, *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^--data is missing; give it$"):
        resolve(SFTConfig, None, ["--model", "m", "--output=o"])
    with pytest.raises(UserError, match=r"^--model, --data and --output are missing; give them$"):
        resolve(SFTConfig, None, [])
    with pytest.raises(
        UserError, match="--data and --output are missing; give them, or `data` and `output` in"
    ):
        resolve(SFTConfig, write(tmp_path, "model: m"), [])
    with pytest.raises(UserError, match="stage 1: `data` and `output` are missing"):
        build(SFTConfig, {"model": "m"}, "stage 1")
    with pytest.raises(UserError, match="stage 1: `output` is missing"):
        build(SFTConfig, {"model": "m", "data": "d"}, "stage 1")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SFTConfig(**BASE, lr=-1.0), "--lr is -1.0; it must be above 0"),
        (SFTConfig(**BASE, lr=float("nan")), "--lr is nan; give a finite number"),
        (SFTConfig(**BASE, warmup=-0.1), "--warmup is -0.1; it must be 0 or more"),
        (SFTConfig(**BASE, eval_fraction=1.0), "--eval-fraction is 1.0; it must be in [0, 1)"),
        (SFTConfig(**BASE, device="gpu"), "--device is 'gpu'"),
        (SFTConfig(**BASE, lr="high"), "`lr` is 'high'; give a number"),
        (SFTConfig(**BASE, eval_fraction=0.1, eval_data="e"), "give one of them"),
        (SFTConfig(**BASE, lora_alpha=4.0), "--lora-alpha is read only with --lora-rank"),
        (SFTConfig(**{**BASE, "model": " "}), "--model is empty"),
        (DPOConfig(**BASE, loss="dpo"), "`loss` is 'dpo'; choose from sigmoid, "),
        (DPOConfig(**BASE, label_smoothing=0.5), "it must be in [0, 0.5)"),
        (
            DPOConfig(**BASE, loss="ipo", label_smoothing=0.1),
            "--label-smoothing is read only with --loss sigmoid or robust, and --loss is ipo",
        ),
        (DPOConfig(**BASE, simpo_gamma=1.0), "--simpo-gamma is read only with --loss simpo"),
        (
            DPOConfig(**BASE, loss="orpo", ref_model="r"),
            "--ref-model is read only with",
        ),
        (RewardConfig(**BASE, tie_parameter=2.0), "read only with --loss rao-kupper or davidson"),
        (RewardConfig(**BASE, loss="rao-kupper", tie_parameter=0.5), "needs one above 1"),
        (PPOConfig(**BASE), "give one of --reward-model, --reward-function and --judge"),
        (PPOConfig(**BASE, reward_model="r", reward_function="a:b"), "give one of"),
        (PPOConfig(**BASE, judge="a:b"), "--judge a:b: give openai:MODEL@URL; a function is"),
        (PPOConfig(**BASE, reward_model="r", judge_timeout=1.0), "--judge-timeout is read by an"),
        (PPOConfig(**BASE, reward_function="a.b"), "give module:function"),
        (PPOConfig(**BASE, reward_model="r", advantage="rloo"), "--samples-per-prompt 2 or more"),
        (PPOConfig(**BASE, reward_model="r", temperature=0.0), "PPO must sample"),
        (PPOConfig(**BASE, reward_model="r", ptx_coef=0.1), "belong together"),
        (PPOConfig(**BASE, reward_model="r", kl_target=6.0, kl_coef=0.0), "--kl-coef above 0"),
        (PPOConfig(**BASE, reward_model="r", max_new_tokens=1024), "leaves no room for a prompt"),
        (PPOConfig(**GROUPS, gamma=0.9), "--gamma is read only with --advantage gae, and"),
        (PPOConfig(**GROUPS, whiten_rewards=True), "--whiten-rewards is read only with --adv"),
        (PPOConfig(**GROUPS, gae_lambda=0.9), "--gae-lambda is read only with --advantage gae"),
        (PPOConfig(**GROUPS, kl_horizon=9.0), "--kl-horizon is read only with --kl-target, which"),
        (PPOConfig(**GROUPS, ppo_epochs=2, target_kl=0.1), "--target-kl is read only from step 3"),
        (PPOConfig(**GROUPS, ppo_epochs=1, cliprange=0.1), "--cliprange is read only from step 2"),
        (PPOConfig(**GROUPS, eval_every=3), "--eval-every is read only with --eval-data or"),
        (PPOConfig(**BASE, reward_model="r", reward_weights=(1.0,)), "only with --reward-function"),
        (PPOConfig(**BASE, reward_function=("a:b", "a:b")), "names a function twice"),
        (PPOConfig(**BASE, reward_function=("a:b",), reward_weights=(1.0, 2.0)), "2 numbers for 1"),
        (RewardConfig(**BASE, loss="plackett-luce", normalize="pair"), "and --loss is plackett-l"),
        (DPOConfig(**BASE, loss="orpo", beta=0.5), "--beta is read only with --loss sigmoid or"),
        (GenerateConfig(model="m", prompt=("a",), temperature=0.0, top_k=3), "with --temperature"),
        (CheckConfig(model="m", max_length=9), "--max-length is read only with --data"),
        (CompareConfig(**COMPARE, best_of=3), "--best-of is read only with --reward-model"),
        (
            WinrateConfig(answers=Path("a"), baseline=Path("b"), judge="a:b", dtype="bfloat16"),
            "--dtype is read by models, and no --judge is one; leave it out",
        ),
        (
            WinrateConfig(answers=Path("a"), baseline=Path("b"), judge="openai:m@http://h", seed=1),
            "--seed: a pairwise judge gives no scores",
        ),
        (LabelExportConfig(store="s", output=Path("o"), seed=3), "only with --eval-fraction"),
        (
            LabelExportConfig(store="s", output=Path("o"), form="audit", consensus="majority"),
            "--consensus is read only with --form rankings or",
        ),
        (GenerateConfig(model="m"), "give either --prompt or --data"),
        (
            GenerateConfig(model="m", prompt=("a",), top_p=0.0),
            "--top-p is 0.0; it must be in (0, 1]",
        ),
    ],
)
def test_validate_names_the_setting_and_the_remedy(config, message):
    with pytest.raises(UserError) as caught:
        validate(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((), "--models is empty"),
        (("dpo",), "'dpo'; give name=path"),
        (("=path",), "'=path'; give name=path"),
        (("a=x", "b=x", "a=x"), "'a=x' twice"),
        (("SFT=x",), "uses the name 'SFT'"),
        (("best-of-4=x",), "uses the name 'best-of-4'"),
    ],
)
def test_compared_models_have_names(models, message):
    config = CompareConfig(sft="s", models=models, data="d", judge="a:b", output=Path("o"))
    with pytest.raises(UserError) as caught:
        validate(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        (Above(0), (1e-9, 5.0), (0.0, -1.0)),
        (AtLeast(0), (0.0, 5.0), (-1e-9,)),
        (Within(0, 1), (0.0, 0.5, 1.0), (-1e-9, 1.5)),
        (Within(0, 1, with_low=False), (1e-9, 1.0), (0.0, 1.5)),
        (Within(0, 1, with_high=False), (0.0, 0.9), (1.0, -1.0)),
    ],
)
def test_the_ends_of_each_kind_of_range(within, inside, outside):
    assert all(map(within.holds, inside))
    assert not any(map(within.holds, (*outside, float("nan"))))


CHECKED = {
    "training.sft:run": SFTConfig(**BASE, lr=-1.0),
    "training.reward:run": RewardConfig(**BASE, lr=-1.0),
    "training.preference:run": DPOConfig(**BASE, lr=-1.0),
    "training.ppo:run": PPOConfig(**BASE, reward_model="r", lr=-1.0),
    "generation.commands:sample": SampleConfig(model="m", data="d", output=Path("o"), top_p=-1.0),
    "generation.commands:generate": GenerateConfig(model="m", prompt=("a",), top_p=-1.0),
    "console.chat:chat": ChatConfig(model="m", top_p=-1.0),
    "evaluation.compare:compare": CompareConfig(
        sft="s", models=("a=b",), data="d", judge="a:b", output=Path("o"), temperature=-1.0
    ),
    "evaluation.winrate:run": WinrateConfig(
        answers=Path("a"), baseline=Path("b"), judge="a:b", max_length=-1
    ),
    "evaluation.calibration:run": RewardQualityConfig(reward_model="r", data="d", agreement=-1.0),
    "evaluation.label_scores:run": LabelScoreConfig(
        store="absent.db", reward_model=("a:b", "a:c"), max_length=-1
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_python_callers_are_checked_too(name, tmp_path, monkeypatch):
    """Whoever calls what is behind a command is told the same, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    module, function = name.split(":")
    with pytest.raises(UserError, match=r"^--[a-z-]+ is -1(\.0)?; it must be "):
        getattr(importlib.import_module(f"prefloop.{module}"), function)(CHECKED[name])
    assert list(tmp_path.iterdir()) == []


def test_good_settings_pass():
    validate(SFTConfig(**BASE, device="cuda:1", lora_rank=8, lora_alpha=16.0))
    validate(DPOConfig(**BASE, loss="robust", label_smoothing=0.1))
    validate(PPOConfig(**BASE, reward_function="my.rewards:length", advantage="rloo",
                       samples_per_prompt=4))  # fmt: skip


def test_config_yaml_gives_the_same_settings_back(tmp_path):
    config = PPOConfig(**BASE, reward_model="r", missing_eos_penalty=-1.0, lr=1e-7)
    path = write(tmp_path, yaml.safe_dump(as_dict(config)))
    assert resolve(PPOConfig, path, []) == config
    assert build(PPOConfig, as_dict(config), "here") == config


def test_a_yaml_key_that_stands_twice_is_an_error(tmp_path):
    path = write(tmp_path, "model: m\nlr: 1e-3\nlr: 1e-4\n")
    with pytest.raises(UserError, match=r":3: `lr` stands twice"):
        resolve(SFTConfig, path, [])


def test_numbers_beyond_all_measure(tmp_path):
    path = write(tmp_path, f"model: m\ndata: d\noutput: o\nlr: {'9' * 400}\n")
    with pytest.raises(UserError, match="lr"):
        validate(resolve(SFTConfig, path, []))
    with pytest.raises(UserError, match=r"--seed is \d+; it must be 0 or more and below 2\^63"):
        validate(SFTConfig(model="m", data="d", output=Path("o"), seed=10**20))
