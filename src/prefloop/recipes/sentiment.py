"""`prefloop demo`: the whole loop on a real model. Film-review openings are continued; better is
what people would rate higher. Read `demo` downward: it is the story of RLHF and of DPO.

Each stage is a command in a process of its own, with its settings in `stages/`: it leaves what the
command leaves, and gives its memory back. A stage that is done is skipped when the demo is given
again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.config import (
    CompareConfig,
    DemoConfig,
    DPOConfig,
    FetchModelConfig,
    PPOConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
)
from prefloop.config.resolve import as_dict
from prefloop.errors import UserError
from prefloop.files import check_folder, write_atomic
from prefloop.progress import in_words
from prefloop.recipes import sentiment_data
from prefloop.recipes.apart import run_apart
from prefloop.recipes.fetch import (
    fetch_movie_ratings,
    is_fetched,
    model_folder,
    require_packages,
)
from prefloop.resume import read_record

if TYPE_CHECKING:
    from prefloop.evaluation.comparison import Comparison

log = logging.getLogger("prefloop")
MODEL = "smollm2-135m-instruct"
KL_COEF = 0.1  # of the PPO run that has a penalty
ADAPTERS: dict[str, Any] = {
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_targets": (r".*\.layers\.(1[5-9]|2[0-9])\..*_proj",),
}
"""Reward model, policies and critic are adapters on the upper half of one base, the SFT model: a
batch of PPO goes through the lower half once for all of its roles."""
GOLD = "prefloop.recipes.sentiment_data:gold_reward"
MEASURED_ON = "one thread of an AMD EPYC that multiplies bfloat16 (docs/results.md)"
SECONDS = {
    "model and data": 60.0,
    "supervised fine-tuning": 119.0,
    "answers to rank": 60.0,
    "rankings": 6.0,
    "reward model": 96.0,  # these four by their share of SFT's, docs/results.md
    "PPO": 380.0,
    "PPO without KL penalty": 445.0,
    "DPO": 145.0,
    "comparison": 81.0,
}
QUICK_SECONDS = {
    "model and data": 60.0,
    "supervised fine-tuning": 17.0,
    "answers to rank": 12.0,
    "rankings": 6.0,
    "reward model": 15.0,
    "PPO": 22.0,
    "PPO without KL penalty": 21.0,
    "DPO": 16.0,
    "comparison": 25.0,
}
"""CPU seconds of each stage there: its wall seconds where nothing else runs."""
Run = Callable[[str, Any, Path], None]
"""Carries out a command with its settings, given also the YAML file to write them to."""


@dataclass(frozen=True)
class Scale:
    """The demo's numbers; `quick` only shows that everything runs."""

    sft_steps: int = 0  # 0: what the epochs take
    ranked_prompts: int = 800
    annotators: int = 19  # as many as rated a real sentence, on average
    reward_steps: int = 0
    dpo_steps: int = 0
    ppo_prompts: int = 32  # an optimiser step's
    ppo_iterations: int = 24
    compared_prompts: int = 250
    max_new_tokens: int = 24


FULL = Scale()
QUICK = Scale(
    sft_steps=4,
    ranked_prompts=12,
    reward_steps=2,
    dpo_steps=2,
    ppo_prompts=16,
    ppo_iterations=2,
    compared_prompts=12,
    max_new_tokens=16,
)


@dataclass(frozen=True)
class Plan:
    """The settings of every stage."""

    output: Path
    seed: int
    scale: Scale

    @property
    def data(self) -> Path:
        """Folder of the prepared rows."""
        return self.output / "data"

    def settings(self, name: str) -> Path:
        """The file with a stage's settings."""
        return self.output / "stages" / f"{name}.yaml"

    @property
    def policy(self) -> str:
        """The SFT model."""
        return str(self.output / "sft" / "model")

    @property
    def rankings(self) -> Path:
        """The annotators' rankings of the SFT model's answers."""
        return self.output / "rankings.jsonl"

    def sft(self, model: str) -> SFTConfig:
        """One pass over the sentences."""
        return SFTConfig(
            model=model,
            data=str(self.data / "sft.jsonl"),
            output=self.output / "sft",
            seed=self.seed,
            max_steps=self.scale.sft_steps,
            epochs=2,
            batch_size=32,
            lr=5e-5,
            max_length=128,
        )

    def sampling(self) -> SampleConfig:
        """Four answers to each prompt."""
        return SampleConfig(
            model=self.policy,
            data=str(self.data / "preference.jsonl"),
            output=self.output / "samples.jsonl",
            samples_per_prompt=4,
            max_prompts=self.scale.ranked_prompts,
            max_new_tokens=self.scale.max_new_tokens,
            max_concurrent=256,  # short answers: little memory, and each step costs less an answer
            seed=self.seed,
        )

    def reward(self) -> RewardConfig:
        """One pass over the rankings (a second overfits); a tenth of the prompts is held out."""
        return RewardConfig(
            model=self.policy,
            data=str(self.rankings),
            output=self.output / "reward",
            seed=self.seed,
            max_steps=self.scale.reward_steps,
            eval_fraction=0.1,
            batch_size=8,
            lr=5e-4,
            **ADAPTERS,
            center_coefficient=0.01,
            max_length=128,
        )

    def ppo(self, name: str, kl_coef: float) -> PPOConfig:
        """The two PPO runs differ in the KL penalty only; a critic learns beside the policy.

        lambda is lower than PPO's default, for answers are short (docs/benchmarks.md).
        """
        passes, minibatches = 2, 2
        return PPOConfig(
            model=self.policy,
            data=str(self.data / "ppo.jsonl"),
            output=self.output / name,
            reward_model=str(self.output / "reward"),
            seed=self.seed,
            kl_coef=kl_coef,
            max_steps=self.scale.ppo_iterations * passes * minibatches,
            ppo_epochs=passes,
            num_minibatches=minibatches,
            batch_size=self.scale.ppo_prompts,
            gae_lambda=0.9,
            max_new_tokens=self.scale.max_new_tokens,
            lr=1e-3,
            **ADAPTERS,
            max_length=128,
        )

    def dpo(self) -> DPOConfig:
        """One pass over all pairs of the same rankings."""
        return DPOConfig(
            model=self.policy,
            data=str(self.rankings),
            output=self.output / "dpo",
            seed=self.seed,
            max_steps=self.scale.dpo_steps,
            batch_size=8,
            beta=0.1,
            lr=5e-4,
            **ADAPTERS,
            max_length=128,
        )

    def comparison(self) -> CompareConfig:
        """On prompts that no stage has seen, judged by the gold reward."""
        runs = {"PPO": "ppo", "PPO without KL": "ppo-no-kl", "DPO": "dpo"}
        return CompareConfig(
            sft=str(self.output / "sft"),
            models=tuple(f"{name}={self.output / folder}" for name, folder in runs.items()),
            data=str(self.data / "evaluation.jsonl"),
            judge=GOLD,
            output=self.output / "compare",
            reward_model=str(self.output / "reward"),
            best_of=4,
            max_prompts=self.scale.compared_prompts,
            max_new_tokens=self.scale.max_new_tokens,
            max_concurrent=256,  # short answers: little memory, and each step costs less an answer
            seed=self.seed,
        )


def demo(config: DemoConfig, run: Run = run_apart) -> Comparison:
    """Run all stages under `config.output` and return the comparison; `run` carries one out."""
    require_packages("gguf", "sklearn")
    check_folder(config.output)
    plan = Plan(config.output, config.seed, QUICK if config.quick else FULL)
    _same_demo(plan)
    outlook = Outlook(plan)
    outlook.tell()
    # 1. A pre-trained model, and sentences that people rated (both real).
    outlook.tell("model and data")
    if not is_fetched(MODEL):
        run("fetch-model", FetchModelConfig(name=MODEL), plan.settings("model"))
    if not (plan.data / "evaluation.jsonl").exists():
        sentiment_data.write_splits(plan.data)
    # 2. Supervised fine-tuning: the model learns to write sentences of film reviews, good and bad.
    outlook.tell("supervised fine-tuning")
    run("sft", plan.sft(str(model_folder(MODEL))), plan.settings("sft"))
    # 3. Several answers to each prompt from the SFT model.
    outlook.tell("answers to rank")
    if not plan.sampling().output.exists():
        run("sample", plan.sampling(), plan.settings("sample"))
    # 4. Simulated annotators rank them, with the noise of real raters.
    outlook.tell("rankings")
    if not plan.rankings.exists():
        noise = sentiment_data.measure_noise(fetch_movie_ratings())
        sentiment_data.rank_samples(
            plan.sampling().output, plan.rankings, plan.scale.annotators, plan.seed, noise
        )
    # 5. A reward model learns to rank as they do.
    outlook.tell("reward model")
    run("reward", plan.reward(), plan.settings("reward"))
    # 6. PPO against the reward model, held near the SFT model by a KL penalty.
    outlook.tell("PPO")
    run("ppo", plan.ppo("ppo", kl_coef=KL_COEF), plan.settings("ppo"))
    # 7. The same without the penalty: reward hacking, on purpose.
    outlook.tell("PPO without KL penalty")
    run("ppo", plan.ppo("ppo-no-kl", kl_coef=0.0), plan.settings("ppo-no-kl"))
    # 8. DPO learns from the same rankings without reward model or sampling.
    outlook.tell("DPO")
    run("dpo", plan.dpo(), plan.settings("dpo"))
    # 9. All of them, and best-of-4, on held-out prompts.
    outlook.tell("comparison")
    from prefloop.evaluation.compare import compare  # the only stage that needs torch in here

    agreement = _panel(plan.rankings)["panel_agreement"]
    known = replace(plan.comparison(), agreement=agreement if agreement >= 0.5 else None)
    return compare(known, _notes(config.quick, plan.rankings))


class Outlook:
    """Tells what comes next, and how long it takes.

    Until supervised fine-tuning has been measured on this machine, that is what it took on another.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.number = plan, 0
        self.seconds = QUICK_SECONDS if plan.scale == QUICK else SECONDS

    def tell(self, stage: str = "") -> None:
        """Of the stage that begins; without one, of the whole."""
        factor = self._factor()
        if not stage:
            whole = in_words(sum(self.seconds.values()) * (factor or 1.0))
            log.info("the demo takes about %s%s", whole, "" if factor else f" on {MEASURED_ON}")
            return
        self.number += 1
        seconds = self.seconds[stage] * (factor or 1.0)
        where = "" if factor else " there"
        log.info(
            "%d/%d %s: about %s%s", self.number, len(self.seconds), stage, in_words(seconds), where
        )

    def _factor(self) -> float | None:
        """How many times as long this machine takes, by its own supervised fine-tuning."""
        record = read_record(self.plan.output / "sft")
        if record is None or record["status"] != "finished":
            return None
        return float(record["wall_seconds"]) / self.seconds["supervised fine-tuning"]


def _same_demo(plan: Plan) -> None:
    """Files of a demo with other numbers must not be taken for this one's."""
    path = plan.output / "demo.json"
    stages = (plan.sft(MODEL), plan.sampling(), plan.reward(), plan.dpo(), plan.comparison())
    settings = [asdict(plan.scale), *map(as_dict, (*stages, plan.ppo("ppo", KL_COEF)))]
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(f"{plan.output} holds a demo with other settings; give another --output")


def _panel(rankings: Path) -> dict[str, Any]:
    """What was measured of the annotators while they ranked."""
    meta: dict[str, Any] = json.loads(rankings.with_suffix(".json").read_text(encoding="utf-8"))
    return meta


def _notes(quick: bool, rankings: Path) -> tuple[str, ...]:
    """What the reader must know before the numbers."""
    gold = sentiment_data.gold()
    meta = _panel(rankings)
    smoke = ("Smoke run (--quick): it shows that every stage works; its numbers mean nothing.",)
    return (
        *(smoke if quick else ()),
        "Model: SmolLM2-135M-Instruct, dequantised 4-bit weights.",
        "Judge: gold reward, a regression on human ratings (-4 to 4) of film-review sentences; on "
        f"{gold.held_out_sentences:,} held-out sentences its correlation with the human means is "
        f"{gold.held_out_r:.2f} and it orders {gold.held_out_pair_accuracy:.0%} of pairs alike.",
        f"Annotators: simulated. {meta['annotators']} of them see the gold score of an answer with "
        f"a real rater's noise (deviation {meta['rater_deviation']:.2f} points); a second panel "
        f"orders {meta['panel_agreement']:.0%} of the pairs as the first.",
    )
