"""Settings of the four training commands, as frozen dataclasses. Imports no torch.

The name of a field is the name of its flag (`micro_batch_tokens` is `--micro-batch-tokens`) and of
its key in a YAML file. The text under a field is its help. Precedence: defaults < YAML < flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from prefloop.config.monitoring import MonitorConfig
from prefloop.config.ranges import (
    ALL_LINEAR,
    ANY,
    FUNCTION,
    Above,
    AtLeast,
    Device,
    DType,
    Form,
    OnlyWith,
    Seed,
    TemplateArgs,
    Weights,
    Within,
    is_endpoint,
    no_room,
    target_problems,
)
from prefloop.config.ranks import RanksConfig
from prefloop.config.resolve import OrAuto, flag
from prefloop.config.rollouts import TrainedRolloutConfig

BadRows = Literal["error", "drop"]
Truncation = Literal["error", "drop", "left", "right"]
RewardLoss = Literal["bradley-terry", "plackett-luce", "rao-kupper", "davidson"]
DPOLoss = Literal[
    "sigmoid",
    "sigmoid-norm",
    "robust",
    "ipo",
    "hinge",
    "apo-zero",
    "simpo",
    "orpo",
    "kto",
    "plackett-luce",
]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]

PAIRS = ("bradley-terry", "rao-kupper", "davidson")
ALL_BUT_ORPO = OnlyWith("loss", *(loss for loss in get_args(DPOLoss) if loss != "orpo"))
WITH_REFERENCE = OnlyWith("loss", *(loss for loss in ALL_BUT_ORPO.values if loss != "simpo"))
WITH_NLL = OnlyWith("loss", *(loss for loss in ALL_BUT_ORPO.values if loss != "kto"))
SMOOTHED = OnlyWith("loss", "sigmoid", "robust")
CRITIC = OnlyWith("advantage", "gae")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RanksConfig):
    """What all four training commands share."""

    model: str
    """Model to start from: a Hugging Face folder or hub id."""
    data: str | tuple[str, ...]
    """Training rows: .jsonl, .jsonl.gz, .json, .csv, .parquet, a `datasets` folder or hub id
    (NAME#CONFIG:SPLIT), or DB#PROJECT; several, each with its share of an epoch, as NAME=0.7."""
    output: Path
    """Run directory (see docs/run-directory.md)."""
    bad_rows: BadRows = "error"
    """What to do with rows that cannot be used: stop at the first, or drop and count them; they are
    listed in the run's bad_rows.jsonl."""
    chat: bool = False
    """Take string rows for the user's and the assistant's messages."""
    eval_data: str | tuple[str, ...] | None = None
    """Held-out rows, in the same forms as --data; several sources, without weights."""
    eval_fraction: Annotated[float, Within(0, 1, with_high=False)] = 0.0
    """Share of the prompts of --data held out for evaluation when --eval-data is not given."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint in --output; `never`: --output must hold no run;
    or the path of a checkpoint (RUN/checkpoints/step-N) to go on from, with what --epochs, --lr
    and the like now say."""
    seed: Seed = 0
    """Seed of the row order, of sampling and of new heads."""
    epochs: Annotated[float, Above(0)] = 1.0
    """Passes over the rows."""
    max_steps: Annotated[int, AtLeast(0)] = 0
    """Stop after this many optimiser steps, whatever `epochs` says; 0 means `epochs` decides."""
    batch_size: Annotated[int, Above(0)] = 64
    """Rows (prompts or pairs) of one optimiser step, over all ranks."""
    micro_batch_tokens: Annotated[int, AtLeast(0), OrAuto] = 8192
    """Most tokens in one forward pass; a step is split to fit. Does not change results. `auto` (or
    0): as many as fit the GPU, 8192 on a CPU."""
    lr: Annotated[float, Above(0)] = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after warm-up: constant, or falling to --lr-floor at the last step."""
    warmup: Annotated[float, AtLeast(0)] = 0.1
    """Share of the steps (below 1) or number of steps (1 and above) over which lr rises from 0."""
    lr_floor: Annotated[
        float, Within(0, 1, with_high=False), OnlyWith("lr_schedule", "linear", "cosine")
    ] = 0.0
    """Share of the peak learning rate that linear and cosine end at."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's moments in 8 bits, through bitsandbytes: 2 bytes a weight, not 8."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: Annotated[float, Within(0, 1, with_high=False)] = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Annotated[float, Within(0, 1, with_high=False)] = 0.999
    """AdamW's decay of the second moment."""
    adam_eps: Annotated[float, Above(0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, AtLeast(0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    dtype: DType = "auto"
    """Type of the products; auto: bfloat16 where the device multiplies it natively."""
    weights: Weights = "auto"
    """How weights are kept; auto: trained ones in float32, frozen ones in the products' type.
    nf4 (4 bits) quantises what LoRA freezes, and models that are not trained."""
    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    template_args: TemplateArgs = "{}"
    """JSON mapping given to the chat template, such as '{"enable_thinking": false}'."""
    lora_rank: Annotated[int, AtLeast(0)] = 0
    """Rank of the LoRA adapters; 0 trains all weights."""
    lora_alpha: Annotated[float, AtLeast(0), OnlyWith("lora_rank")] = 0.0
    """Scale of the LoRA update (times 1/rank); 0 means 2 x rank."""
    lora_targets: Annotated[tuple[str, ...], OnlyWith("lora_rank")] = (ALL_LINEAR,)
    """Layers that get adapters: `all-linear` (but the head) and names such as q_proj or lm_head, or
    one regular expression of whole names."""
    lora_dropout: Annotated[float, Within(0, 1, with_high=False), OnlyWith("lora_rank")] = 0.0
    """Share of an adapter's inputs dropped in training, nowhere else; not in PPO. What is dropped
    depends on how a step is split: --micro-batch-tokens and the processes then change results."""
    modules_to_save: Annotated[tuple[str, ...], OnlyWith("lora_rank")] = ()
    """Layers trained whole beside the adapters and saved with them, such as embed_tokens lm_head;
    where these two are one weight, either names it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, same results."""
    max_length: Annotated[int, Above(0)] = 1024
    """Most tokens of a prompt with its answer."""
    truncation: Truncation = "error"
    """What to do with longer rows: stop, drop (counted), cut the prompt's start (left), or the
    answer's end (right)."""
    log_every: Annotated[int, Above(0)] = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[int, AtLeast(0)] = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: Annotated[int, AtLeast(0)] = 0
    """Steps between checkpoints; with 0 they are saved by time alone, and removed once `model`
    stands. Whatever ends a run, its last whole step is saved."""
    save_minutes: Annotated[float, AtLeast(0)] = 10.0
    """Save also when the newest checkpoint is this old; 0 never does."""
    keep_checkpoints: Annotated[int, Above(0)] = 2
    """Newest checkpoints kept."""
    track: Tracker = "none"
    """Also send metrics to this tracker."""

    def __post_init__(self) -> None:
        """One source is told alike, however it was given: in YAML, Python or flags."""
        for name in ("data", "eval_data", "sft_data"):
            given = getattr(self, name, None)
            if isinstance(given, tuple) and len(given) == 1:
                object.__setattr__(self, name, given[0])

    def problems(self) -> Iterator[str]:
        """See Settings."""
        if self.eval_data and self.eval_fraction:
            yield "--eval-data and --eval-fraction both give held-out rows; give one of them"
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            yield "--eval-every is read only with --eval-data or --eval-fraction; leave it out"
        yield from target_problems(self.lora_targets, self.modules_to_save)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(MonitorConfig, TrainingConfig):
    """Supervised fine-tuning on (prompt, completion) or `messages` rows."""

    train_on: Literal["answer", "all"] = "answer"
    """Tokens in the loss: the answer's (in chats: every assistant turn's), or all."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Reward model from rankings or pairs."""

    loss: RewardLoss = "bradley-terry"
    """Loss over a prompt's ranking; the last two also use ties."""
    normalize: Annotated[Literal["prompt", "pair"], OnlyWith("loss", *PAIRS)] = "prompt"
    """Mean over a prompt's pairs and then over prompts, or over all pairs."""
    center_coefficient: Annotated[float, AtLeast(0)] = 0.0
    """c of the term c * mean(score^2) that keeps scores around 0 (0.01 is usual)."""
    label_margins: Annotated[bool, OnlyWith("loss", "bradley-terry")] = False
    """Rows of a labelling store get margins by how strong and how sure the labellers were."""
    tie_parameter: Annotated[float, Above(0), OnlyWith("loss", "rao-kupper", "davidson")] = 1.5
    """rao-kupper: threshold theta > 1; davidson: nu > 0."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.loss == "rao-kupper" and self.tie_parameter <= 1:
            yield f"--tie-parameter is {self.tie_parameter}; rao-kupper needs one above 1"


@dataclass(frozen=True, kw_only=True)
class DPOConfig(MonitorConfig, TrainingConfig):
    """Direct preference optimisation and its kin."""

    loss: DPOLoss = "sigmoid"
    """Loss; `kto` takes unpaired rows (pairs are split into two), `plackett-luce` rankings."""
    beta: Annotated[float, Above(0), ALL_BUT_ORPO] = 0.1
    """Strength of the implicit KL penalty (2 to 5 where it is per token: sigmoid-norm, simpo)."""
    label_smoothing: Annotated[
        float, Within(0, 0.5, with_high=False), OnlyWith("loss", "sigmoid", "robust")
    ] = 0.0
    """epsilon: share of labels believed flipped (sigmoid: conservative DPO; robust)."""
    label_margins: Annotated[bool, OnlyWith("loss", "sigmoid")] = False
    """Rows of a labelling store get margins by how strong and how sure the labellers were."""
    ref_model: Annotated[str | None, WITH_REFERENCE] = None
    """Reference policy; by default the starting weights, as they are in memory."""
    sft_coefficient: Annotated[float, AtLeast(0), WITH_NLL] = 0.0
    """alpha of the term alpha * NLL(chosen)."""
    ipo_average: Annotated[bool, OnlyWith("loss", "ipo")] = True
    """IPO: log-probs averaged per token, as TRL does, or summed, as in the paper."""
    simpo_gamma: Annotated[float, AtLeast(0), OnlyWith("loss", "simpo")] = 0.5
    """SimPO: target margin gamma."""
    orpo_lambda: Annotated[float, AtLeast(0), OnlyWith("loss", "orpo")] = 0.1
    """ORPO: weight of the odds-ratio term."""
    desirable_weight: Annotated[float, AtLeast(0), OnlyWith("loss", "kto")] = 1.0
    """KTO: lambda_D."""
    undesirable_weight: Annotated[float, AtLeast(0), OnlyWith("loss", "kto")] = 1.0
    """KTO: lambda_U."""
    lr: Annotated[float, Above(0)] = 1e-6
    """Peak learning rate (1e-5 is usual with LoRA)."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainedRolloutConfig, MonitorConfig, TrainingConfig):
    """PPO on prompts, against a reward model, a Python function or an LLM judge."""

    reward_model: str | tuple[str, ...] | None = None
    """One or more sequence-classification folders or hub ids with one label."""
    share_base: Annotated[Literal["auto", "never"], OnlyWith("lora_rank")] = "auto"
    """auto: policy, critic and reward models are adapters on one base where theirs is the same."""
    reward_ensemble: Literal["mean", "lower-bound"] = "mean"
    """Score of several reward models: their mean, or that less their standard deviation."""
    reward_function: Annotated[tuple[str, ...], Form(FUNCTION, "give module:function")] = ()
    """One or more `module:function(prompts, completions) -> list[float]`, instead of a reward
    model; other arguments are given the rows' columns of those names."""
    reward_weights: Annotated[tuple[float, ...], OnlyWith("reward_function")] = ()
    """Weight of each function's score in the sum; 1 each by default."""
    judge: str | None = None
    """Instead of a reward model: an LLM whose scores by a rubric are the reward,
    openai:MODEL@URL."""
    value_model: Annotated[str | None, CRITIC] = None
    """Critic's start: a folder; by default the reward model (or the policy, with a function)."""
    ref_model: str | None = None
    """Reference policy of the KL penalty; by default the starting weights."""
    ema_reference: Annotated[float, Within(0, 1)] = 0.0
    """Share of its way to the policy that the penalty's reference moves after each iteration."""
    advantage: Literal["gae", "rloo", "grpo", "dr-grpo"] = "gae"
    """gae trains a critic; the rest compare a prompt's samples: each with the others' mean (rloo),
    with the mean of all (dr-grpo), and divided by their deviation (grpo)."""
    policy_norm: Literal["tokens", "constant"] = "tokens"
    """What a step's policy loss is divided by: its answers' tokens, or (Dr. GRPO) the number of
    its answers times --max-new-tokens, however long they are."""
    kl_coef: Annotated[float, AtLeast(0)] = 0.05
    """beta of the per-token reward -beta * (log pi_old - log pi_ref)."""
    kl_target: Annotated[float, AtLeast(0)] = 0.0
    """Adapt beta to hold this KL to the reference (nats an answer); 0 keeps beta fixed."""
    kl_horizon: Annotated[float, Above(0), OnlyWith("kl_target")] = 10000.0
    """Episodes (answers) over which beta moves by at most 20 %; no iteration moves it further."""
    gamma: Annotated[float, Within(0, 1), CRITIC] = 1.0
    """Discount."""
    gae_lambda: Annotated[float, Within(0, 1), CRITIC] = 0.95
    """lambda of generalised advantage estimation."""
    bootstrap_cut: Annotated[bool, CRITIC] = False
    """An answer cut at --max-new-tokens goes on in the critic's eyes: its value there, and not 0,
    stands for what would have followed."""
    cliprange: Annotated[float, Above(0)] = 0.2
    """Clip range of the probability ratio, below 1 and above."""
    clip_high: Annotated[float, AtLeast(0)] = 0.0
    """Clip range above 1 (clip-higher; DAPO takes 0.28); 0 means `cliprange`."""
    cliprange_value: Annotated[float, Above(0), CRITIC] = 0.2
    """Clip range of the value."""
    vf_coef: Annotated[float, AtLeast(0), CRITIC] = 0.1
    """Weight of the value loss."""
    value_lr: Annotated[float, AtLeast(0), CRITIC] = 0.0
    """Peak learning rate of the critic; 0 means `lr`."""
    critic_warmup: Annotated[int | None, AtLeast(0), CRITIC] = None
    """First iterations in which the critic learns alone: 4, or an eighth of a shorter run's."""
    ppo_epochs: Annotated[int, Above(0)] = 4
    """Passes over each iteration's samples."""
    num_minibatches: Annotated[int, Above(0)] = 1
    """Optimiser steps per pass."""
    samples_per_prompt: Annotated[int, Above(0)] = 1
    """Answers sampled per prompt (at least 2 for all but gae)."""
    max_new_tokens: Annotated[int, Above(0)] = 64
    """Most tokens of a sampled answer."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Sampling temperature."""
    missing_eos_penalty: Annotated[float | None, ANY] = None
    """Score given to answers that did not stop by themselves, whatever else is done to scores."""
    normalize_scores: bool = False
    """Scale scores by the running mean and deviation of all scores so far."""
    reward_clip: Annotated[float, AtLeast(0)] = 0.0
    """Scores are clipped to this absolute value; 0 leaves them."""
    whiten_rewards: Annotated[bool, CRITIC] = False
    """Scale per-token rewards to unit variance (their mean is kept)."""
    target_kl: Annotated[float, AtLeast(0)] = 0.0
    """Leave an iteration's other passes beyond this KL to its sampler (nats a token); 0: never."""
    sft_data: str | tuple[str, ...] | None = None
    """Demonstrations of the PPO-ptx term, in the same forms as --data, weights included."""
    ptx_coef: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the PPO-ptx term (SFT loss on --sft-data)."""
    max_concurrent: Annotated[int, AtLeast(0), OrAuto] = 64
    """Answers generated at once. `auto` (or 0): as many as fit the GPU, 64 on a CPU."""
    lr: Annotated[float, Above(0)] = 3e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to --lr-floor at the last step."""
    warmup: Annotated[float, AtLeast(0)] = 0.0
    """Share of the steps (below 1) or number of steps (1 and above) over which lr rises from 0."""
    adam_eps: Annotated[float, Above(0)] = 1e-5
    """AdamW's epsilon."""

    @property
    def reward_models(self) -> tuple[str, ...]:
        """All that are given."""
        given = self.reward_model or ()
        return (given,) if isinstance(given, str) else tuple(given)

    def __post_init__(self) -> None:
        """One function, or one reward model, may be given as a word."""
        super().__post_init__()
        if isinstance(self.reward_model, tuple) and len(self.reward_model) == 1:
            object.__setattr__(self, "reward_model", self.reward_model[0])
        if self.reward_function is None or isinstance(self.reward_function, str):
            one = (self.reward_function,) if self.reward_function else ()
            object.__setattr__(self, "reward_function", one)

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from no_room(self.max_new_tokens, self.max_length)
        if sum(map(bool, (self.reward_model, self.reward_function, self.judge))) != 1:
            yield "give one of --reward-model, --reward-function and --judge"
        elif self.judge and not is_endpoint(self.judge):
            yield (
                f"--judge {self.judge}: give openai:MODEL@URL; a function is --reward-function, a "
                "model --reward-model"
            )
        if len(set(self.reward_models)) < len(self.reward_models):
            yield "--reward-model names a model twice; name it once"
        if self.reward_ensemble != "mean" and len(self.reward_models) < 2:
            yield (
                f"--reward-ensemble {self.reward_ensemble} is of several models; give "
                "--reward-model more than one"
            )
        if len(set(self.reward_function)) < len(self.reward_function):
            yield "--reward-function names a function twice; name it once, with its weight"
        if self.reward_weights and len(self.reward_weights) != len(self.reward_function):
            yield (
                f"--reward-weights has {len(self.reward_weights)} numbers for "
                f"{len(self.reward_function)} of --reward-function; give one each"
            )
        if self.ema_reference and (self.ref_model or self.kl_target or not self.kl_coef):
            yield (
                "--ema-reference moves what a penalty of fixed weight is measured from: give "
                "--kl-coef above 0, and leave --ref-model and --kl-target out"
            )
        if self.advantage != "gae" and self.samples_per_prompt < 2:
            yield (
                f"--advantage {self.advantage} compares samples of one prompt; "
                "give --samples-per-prompt 2 or more"
            )
        if self.lora_dropout:
            yield (
                "--lora-dropout: PPO compares the policy with the one that sampled, and dropout "
                "would make them differ; leave it out"
            )
        if self.temperature == 0:
            yield "--temperature is 0; PPO must sample, give it above 0"
        # An iteration's first step sees the policy that sampled; the second is the first to move.
        steps = self.ppo_epochs * self.num_minibatches
        second = {"cliprange": (0.2, 2), "clip_high": (0.0, 2), "cliprange_value": (0.2, 2)}
        fewest = second | {"target_kl": (0.0, 3)}
        for name, (default, least) in fewest.items():
            if getattr(self, name) != default and steps < least:
                yield (
                    f"{flag(name)} is read only from step {least} of an iteration on, and "
                    f"--ppo-epochs x --num-minibatches is {steps}; raise them or leave it out"
                )
        if bool(self.ptx_coef) != bool(self.sft_data):
            yield "--ptx-coef and --sft-data belong together; give both or neither"
        if self.kl_target > 0 and self.kl_coef == 0:
            yield "--kl-target adapts --kl-coef, which is 0; give a --kl-coef above 0"
