"""The recipes of uses as they are shipped, in a quick form: small sets, a tiny model, few steps."""

import json
from pathlib import Path

import pytest
import yaml
from benchmarks import uses, uses_page

from prefloop import recipes
from prefloop.commands import COMMANDS
from prefloop.config import RunConfig
from prefloop.config.resolve import read_yaml
from prefloop.recipes import sentiment_data, style_data
from prefloop.recipes.pipeline import read_stages, run
from prefloop.recipes.sentiment import FULL, Plan
from tests.recipes.small_sets import write_sets
from tests.tiny import tiny_model, tiny_tokenizer

FOLDER = Path(recipes.__file__).parent
ON_CPU = {"device": "cpu", "dtype": "float32", "max_length": 1024}
TRAINED = ON_CPU | {"max_steps": 2, "batch_size": 4}
QUICK = {
    "sft": TRAINED,
    "sample": ON_CPU | {"max_new_tokens": 6, "max_prompts": 12},
    "rank": {"judge": "tests.recipes.small_sets:letters"},  # a random model shares no word
    "reward": TRAINED,
    "dpo": TRAINED,
    "ppo": TRAINED | {"max_new_tokens": 6},
    "compare": ON_CPU | {"max_new_tokens": 6, "max_prompts": 3},
    "evaluate reward-model": ON_CPU,
    "evaluate judge": ON_CPU,
}
USUAL = ["SFT", "best-of-4", "PPO", "DPO"]
STRENGTHS = ("0.03", "0.1", "0.3", "1")
WAYS = (
    dict.fromkeys(("chat", "style", "summary", "translation"), USUAL)
    | {
        "mqm": [],  # compares reward models alone
        "sentiment": [
            *USUAL[:2],
            *(f"{way} {beta}" for way in ("PPO", "DPO") for beta in STRENGTHS),
            *("DPO rankings", "DPO again"),
        ],
    }
)
FLUENCY = (
    "prefloop.recipes.scores:fluency"  # needs a model that is fetched; here its place is taken
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quick(use: str, model: Path, folder: Path) -> RunConfig:
    """The shipped pipeline with another model, few steps and few prompts."""
    content = read_yaml(FOLDER / f"{use}.yaml")
    items = [item for item in content["stages"] if item.get("name") != "model"]
    for stage in [stage for item in items for stage in item.get("stages", [item])]:
        settings = stage["settings"]
        if settings.get("model") == "${model}":
            settings["model"] = str(model)
        if settings.get("judge") == FLUENCY:
            settings["judge"] = "prefloop.recipes.scores:content"
        if "lora_targets" in settings:
            settings["lora_targets"] = [r".*\.layers\.1\..*_proj"]  # the upper half of two layers
        settings |= QUICK.get(stage["command"], {})
    path = folder / f"{use}.yaml"
    path.write_text(yaml.safe_dump({"stages": items}))
    return RunConfig(pipeline=path, output=folder / "out", seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("use", uses_page.USES)
def test_a_use_runs_from_data_to_page(
    use: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in (
        ("sacrebleu", "rouge_score") if use in ("style", "summary", "translation") else ()
    ):
        pytest.importorskip(package, reason="comes with the extra `recipes`")
    write_sets(tmp_path / "sets")
    monkeypatch.setenv("PREFLOOP_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    style_data.classifier.cache_clear()
    sentiment_data.gold.cache_clear()
    config = quick(use, model, tmp_path)
    run(config, COMMANDS)
    if use != "mqm":
        compared = json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())
        assert [way["name"] for way in compared["ways"]] == WAYS[use]
        assert (tmp_path / "out" / "compare" / "report.html").exists()
        assert compared["prompts"] == 3
    for stage in read_stages(config.pipeline, tmp_path / "out", COMMANDS, 3):
        if stage.command.startswith("evaluate"):
            assert json.loads(stage.config.output.read_text())
    record = uses.record_of(tmp_path / "out", use, 3)
    assert record["cpu_seconds"] > 0 and len(record["examples"]) == (3 if WAYS[use] else 0)
    page = uses_page.numbers([record])
    assert all(f"({name}, " in page for name in record["comparisons"])
    assert all(f"\n| {name} | " in page for name in (*WAYS[use], *record["quality"]))
    capsys.readouterr()
    run(config, COMMANDS)
    done = capsys.readouterr().out
    assert done.count("nothing changed, skipped") == done.count("[") == len(done.splitlines())


def test_sentiment_has_the_settings_of_the_demo(tmp_path: Path) -> None:
    stages = read_stages(FOLDER / "sentiment.yaml", tmp_path, COMMANDS, 0)
    found = {stage.name: vars(stage.config) for stage in stages}
    plan = Plan(tmp_path, 0, FULL)
    demo = {"sft": plan.sft("model"), "reward": plan.reward(), "dpo-0.1": plan.dpo()}
    for name, settings in (demo | {"ppo-0.1": plan.ppo("ppo", 0.1)}).items():
        differ = {key for key, value in vars(settings).items() if found[name][key] != value}
        assert differ <= {"model", "data", "output", "reward_model"}, name


def test_a_seed_goes_to_every_stage_that_gives_none(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    stages = [
        {"name": "a", "command": "sft", "settings": {"model": "m", "data": "d.jsonl"}},
        {"name": "b", "command": "sft", "settings": {"model": "m", "data": "d.jsonl", "seed": 1}},
        {"name": "c", "command": "rank", "settings": {"data": "d.jsonl", "judge": "m:f"}},
    ]
    path.write_text(yaml.safe_dump({"stages": stages}))
    a, b, _ = read_stages(path, tmp_path, COMMANDS, 5)
    assert (a.config.seed, b.config.seed) == (5, 1)
    assert read_stages(path, tmp_path, COMMANDS)[0].config.seed == 0
