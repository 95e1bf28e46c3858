"""Every setting of every command, as frozen dataclasses. Imports no torch.

The name of a field is the name of its flag (`micro_batch_tokens` is `--micro-batch-tokens`) and of
its key in a YAML file. The text under a field is its help. Precedence: defaults < YAML < flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Truncation = Literal["error", "drop", "left", "right"]
RewardLoss = Literal["bradley-terry", "plackett-luce", "rao-kupper", "davidson"]
DPOLoss = Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "plackett-luce"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What all four training commands share."""

    model: str
    """Model to start from: a Hugging Face folder or hub id."""
    data: str
    """Training rows: .jsonl, .jsonl.gz, .csv, .parquet, a `datasets` folder, or a hub id."""
    output: Path
    """Run directory (see docs/run-directory.md)."""
    eval_data: str | None = None
    """Held-out rows, in the same forms as --data."""
    eval_fraction: float = 0.0
    """Share of the prompts of --data held out for evaluation when --eval-data is not given."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint in --output; `never`: --output must hold no run;
    or the path of a checkpoint (RUN/checkpoints/step-N) to go on from, with what --epochs, --lr
    and the like now say."""
    seed: int = 0
    """Seed of the row order, of sampling and of new heads."""
    epochs: float = 1.0
    """Passes over the rows."""
    max_steps: int = 0
    """Stop after this many optimiser steps; 0 means `epochs` decides."""
    batch_size: int = 64
    """Rows (prompts or pairs) of one optimiser step, over all ranks."""
    micro_batch_tokens: int = 8192
    """Most tokens in one forward pass; a step is split to fit. Does not change results."""
    lr: float = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after warm-up: constant, or falling to 0 at the last step."""
    warmup: float = 0.1
    """Share of the steps (below 1) or number of steps (1 and above) over which lr rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 means autocast with float32 master weights."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    lora_rank: int = 0
    """Rank of the LoRA adapters on all linear layers; 0 trains all weights."""
    lora_alpha: float = 0.0
    """Scale of the LoRA update (times 1/rank); 0 means 2 x rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, same results."""
    max_length: int = 1024
    """Most tokens of a prompt with its answer."""
    truncation: Truncation = "error"
    """What to do with longer rows: stop, drop (counted), cut the prompt's start (left), or the
    answer's end (right)."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = 0
    """Steps between checkpoints; with 0 they are saved by time alone, and removed once `model`
    stands. Whatever ends a run, its last whole step is saved."""
    save_minutes: float = 10.0
    """Save also when the newest checkpoint is this old; 0 never does."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    track: Tracker = "none"
    """Also send metrics to this tracker."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on (prompt, completion) or `messages` rows."""

    train_on: Literal["answer", "all"] = "answer"
    """Tokens in the loss: the answer's (in chats: every assistant turn's), or all."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Reward model from rankings or pairs."""

    loss: RewardLoss = "bradley-terry"
    """Loss over a prompt's ranking; the last two also use ties."""
    normalize: Literal["prompt", "pair"] = "prompt"
    """Mean over a prompt's pairs and then over prompts, or over all pairs."""
    center_coefficient: float = 0.0
    """c of the term c * mean(score^2) that keeps scores around 0 (0.01 is usual)."""
    tie_parameter: float = 1.5
    """rao-kupper: threshold theta > 1; davidson: nu > 0."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Direct preference optimisation and its kin."""

    loss: DPOLoss = "sigmoid"
    """Loss; `kto` takes unpaired rows (pairs are split into two), `plackett-luce` rankings."""
    beta: float = 0.1
    """Strength of the implicit KL penalty."""
    label_smoothing: float = 0.0
    """epsilon: share of labels believed flipped (sigmoid: conservative DPO; robust)."""
    ref_model: str | None = None
    """Reference policy; by default the starting weights, as they are in memory."""
    sft_coefficient: float = 0.0
    """alpha of the term alpha * NLL(chosen)."""
    ipo_average: bool = True
    """IPO: log-probs averaged per token, as TRL does, or summed, as in the paper."""
    simpo_gamma: float = 0.5
    """SimPO: target margin gamma."""
    orpo_lambda: float = 0.1
    """ORPO: weight of the odds-ratio term."""
    desirable_weight: float = 1.0
    """KTO: lambda_D."""
    undesirable_weight: float = 1.0
    """KTO: lambda_U."""
    lr: float = 1e-6
    """Peak learning rate (1e-5 is usual with LoRA)."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainingConfig):
    """PPO on prompts, against a reward model or a Python function."""

    reward_model: str | None = None
    """Sequence-classification folder or hub id with one label."""
    reward_function: str | None = None
    """`module:function(prompts, completions) -> list[float]`, instead of a reward model."""
    value_model: str | None = None
    """Critic's start: a folder; by default the reward model (or the policy, with a function)."""
    ref_model: str | None = None
    """Reference policy of the KL penalty; by default the starting weights."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae trains a critic; rloo and grpo use the other samples of the same prompt as baseline."""
    kl_coef: float = 0.05
    """beta of the per-token reward -beta * (log pi_old - log pi_ref)."""
    kl_target: float = 0.0
    """Adapt beta to hold this KL per answer (nats); 0 keeps beta fixed."""
    kl_horizon: float = 10000.0
    """With --kl-target: episodes (answers) over which beta moves by at most 20 %; no single
    iteration moves it further."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation."""
    cliprange: float = 0.2
    """Clip range of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip range of the value."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_lr: float = 0.0
    """Peak learning rate of the critic; 0 means `lr`."""
    ppo_epochs: int = 4
    """Passes over each iteration's samples."""
    num_minibatches: int = 1
    """Optimiser steps per pass."""
    samples_per_prompt: int = 1
    """Answers sampled per prompt (at least 2 for rloo and grpo)."""
    max_new_tokens: int = 64
    """Most tokens of a sampled answer."""
    temperature: float = 1.0
    """Sampling temperature."""
    missing_eos_penalty: float | None = None
    """Score given to answers that did not stop by themselves, whatever else is done to scores."""
    normalize_scores: bool = False
    """Scale scores by the running mean and deviation of all scores so far."""
    reward_clip: float = 0.0
    """Scores are clipped to this absolute value; 0 leaves them."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance (their mean is kept)."""
    target_kl: float = 0.0
    """Leave an iteration's remaining passes when approx-KL exceeds this; 0 never does."""
    sft_data: str | None = None
    """Rows of the PPO-ptx term."""
    ptx_coef: float = 0.0
    """Weight of the PPO-ptx term (SFT loss on --sft-data)."""
    max_concurrent: int = 64
    """Answers generated at once."""
    lr: float = 3e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to 0 at the last step."""
    warmup: float = 0.0
    """Share of the steps (below 1) or number of steps (1 and above) over which lr rises from 0."""
    adam_eps: float = 1e-5
    """AdamW's epsilon."""
