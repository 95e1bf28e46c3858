"""The parts by name, the ones that matter most first."""

from __future__ import annotations

from functools import partial

from benchmarks.cuda.correct import correctness
from benchmarks.cuda.decode import decoding
from benchmarks.cuda.fits import fitting
from benchmarks.cuda.scale import Part
from benchmarks.cuda.train import training

PARTS: dict[str, Part] = {
    "correctness": correctness,
    "ppo-8b": partial(fitting, "ppo-8b", "ppo", "8B"),
    "dpo-8b": partial(fitting, "dpo-8b", "dpo", "8B"),
    "reward-8b": partial(fitting, "reward-8b", "reward", "8B"),
    "sft-1b-8bit": partial(fitting, "sft-1b-8bit", "sft", "1B"),
    "train-135m": partial(training, "135M"),
    "train-1b": partial(training, "1B"),
    "decode-135m": partial(decoding, "135M"),
    "decode-1b": partial(decoding, "1B"),
    "decode-8b": partial(decoding, "8B"),
    "decode-8b-nf4": partial(decoding, "8B", nf4=True),
    "train-8b": partial(training, "8B"),
}
