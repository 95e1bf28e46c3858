"""Reward functions as a user might write them, right and wrong."""

import os
import random as stdlib_random

import numpy as np
import torch


def by_length(prompts, completions):
    return [len(completion) / 10 for completion in completions]


def random(prompts, completions):
    """Of the generators that a user's code may draw from."""
    drawn = [stdlib_random.random() + np.random.random() for _ in completions]
    return [value + float(torch.rand(())) for value in drawn]


def drawing(prompts, completions):
    """Another that draws: a monitor must not be the reward."""
    return random(prompts, completions)


calls = 0


def fails_on_the_second_rank(prompts, completions):
    """The third time, and there alone."""
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        raise TimeoutError("no answer")
    return by_length(prompts, completions)


def constant(prompts, completions):
    return [1.0] * len(completions)


def raises(prompts, completions):
    raise RuntimeError("out of\nink")


def one_too_few(prompts, completions):
    return [0.0] * (len(completions) - 1)


def not_a_number(prompts, completions):
    return [float("nan")] * len(completions)


falls = {"monitor": 0, "reward": 0}


def falling(prompts, completions):
    """Each time lower, and by another length for each answer."""
    falls["monitor"] += 1
    return [-falls["monitor"] * (1 + n / 10) for n in range(len(completions))]


def sinking(prompts, completions):
    falls["reward"] += 1
    return [float(-falls["reward"])] * len(completions)


def rising(prompts, completions):
    return [-score for score in sinking(prompts, completions)]


def near_wanted(prompts, completions, wanted):
    return [-abs(len(said) - length) for said, length in zip(completions, wanted, strict=True)]
