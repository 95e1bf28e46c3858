"""A world small enough to know everything in it.

Four prompts, 8 tokens, answers of 5 tokens (or of up to 5, the stop token being one of the 8):
every answer can be listed, so of any policy the exact J = E[r] - beta KL(pi || pi_ref) is known,
and so is the best one, pi* = pi_ref exp(r / beta) / Z with J* = beta E_x[log Z(x)].

Under pi_ref the rewards of a prompt's answers have mean 0: so J(pi_ref) = 0, and J / J* says how
much of what can be gained was gained. The enumeration uses plain Transformers, and of the
code under test only the weights it trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from prefloop.data.tokenize import Example
from prefloop.runs import Run
from tests.tiny import tiny_model

LETTERS = "abcdefgh"
PROMPTS = ("ab", "cdg", "f", "bgea")
LENGTH = 5
STOP = 7  # "h", in the world whose answers may stop
SHARPNESS = 1.5  # of pi_ref, over a random model's
SPREAD = 1.5  # standard deviation of the rewards of pi_ref's answers to a prompt


@dataclass(frozen=True)
class World:
    """pi_ref and r over all L answers to each of the P prompts."""

    stopping: bool
    answers: Tensor  # [L, 5] token ids, zeros behind a stop token
    lengths: Tensor  # [L]
    log_ref: Tensor  # [P, L] log pi_ref(y|x)
    reward: Tensor  # [P, L] r(x, y)

    @cached_property
    def texts(self) -> list[str]:
        """The answers as letters; the stop token is not printed."""
        letters = ("".join(LETTERS[token] for token in ids) for ids in self.tokens)
        return [text.removesuffix(LETTERS[STOP]) if self.stopping else text for text in letters]

    @cached_property
    def tokens(self) -> list[tuple[int, ...]]:
        """The answers as token ids."""
        rows = zip(self.answers.tolist(), self.lengths.tolist(), strict=True)
        return [tuple(ids[:n]) for ids, n in rows]

    def log_probs(self, model: PreTrainedModel) -> Tensor:
        """log pi(y|x) [P, L] in float64, by plain forwards over every prefix of four tokens."""
        prefixes = torch.tensor(list(itertools.product(range(8), repeat=LENGTH - 1)))
        row = (self.answers[:, :-1] * torch.tensor([512, 64, 8, 1])).sum(1)
        alive = torch.arange(LENGTH) < self.lengths[:, None]
        found = []
        for prompt in PROMPTS:
            head = torch.tensor([LETTERS.index(letter) for letter in prompt])
            rows = torch.cat([head.expand(len(prefixes), -1), prefixes], dim=1)
            with torch.no_grad():
                scores = model(input_ids=rows).logits[:, len(head) - 1 :]
            table = scores.double().log_softmax(-1)  # [4096, 5, 8]
            steps = table[row].gather(2, self.answers[:, :, None]).squeeze(2)
            found.append((steps * alive).sum(1))
        return torch.stack(found)

    def optimum(self, beta: float) -> tuple[float, float]:
        """J* and KL* = KL(pi* || pi_ref), means over prompts."""
        tilted = self.log_ref + self.reward / beta
        log_z = tilted.logsumexp(1, keepdim=True)
        return float(beta * log_z.mean()), float(kl(tilted - log_z, self.log_ref))

    def objective(self, log_pi: Tensor, beta: float) -> float:
        """J(pi) = E[r] - beta KL, the mean over prompts."""
        gained = (log_pi.exp() * self.reward).sum(1).mean()
        return float(gained - beta * kl(log_pi, self.log_ref))

    def draw(self, count: int, seed: int) -> Tensor:
        """[P, count] numbers of answers drawn from pi_ref."""
        generator = torch.Generator().manual_seed(seed)
        return self.log_ref.exp().multinomial(count, replacement=True, generator=generator)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, the mean over prompts of [P, L]."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


@cache
def world(stopping: bool = False) -> World:
    """The one world of each kind."""
    stop = STOP if stopping else -1
    leaves = [
        (*body, *((stop,) if size < LENGTH else ()))
        for size in ([0, 1, 2, 3, LENGTH] if stopping else [LENGTH])
        for body in itertools.product(range(8), repeat=size)
        if stop not in body[: LENGTH - 1]
    ]
    lengths = torch.tensor([len(leaf) for leaf in leaves])
    answers = torch.tensor([[*leaf, *[0] * (LENGTH - len(leaf))] for leaf in leaves])
    empty = torch.empty(0)
    log_ref = World(stopping, answers, lengths, empty, empty).log_probs(reference_model())
    reward = _raw_reward(answers, lengths)
    reward -= (log_ref.exp() * reward).sum(1, keepdim=True)
    reward *= SPREAD / (log_ref.exp() * reward.square()).sum(1, keepdim=True).sqrt()
    return World(stopping, answers, lengths, log_ref, reward)


def _raw_reward(answers: Tensor, lengths: Tensor) -> Tensor:
    """[P, L]: what each letter earns after its neighbour, with this prompt, and at its place."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((8, 8), (LENGTH, 8), (len(PROMPTS), 8))
    pair, place, own = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    alive = torch.arange(LENGTH) < lengths[:, None]
    shared = (pair[answers[:, :-1], answers[:, 1:]] * alive[:, 1:]).sum(1)
    shared += 0.3 * (place[torch.arange(LENGTH), answers] * alive).sum(1)
    return torch.stack([shared + (letters[answers] * alive).sum(1) for letters in own])


def reference_model() -> PreTrainedModel:
    """A random Llama, sharpened so that its answers are far from uniform."""
    model = tiny_model(
        vocab_size=8, seed=1, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPNESS)
    return model


def tokenizer(stopping: bool) -> PreTrainedTokenizerFast:
    """One token a letter; with `stopping`, "h" is EOS."""
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if stopping:
        core.add_special_tokens([AddedToken(LETTERS[STOP], normalized=False)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, eos_token=LETTERS[STOP] if stopping else None
    )


def save_reference(folder: Path, stopping: bool = False) -> str:
    """pi_ref as a Hugging Face folder."""
    reference_model().save_pretrained(folder)
    tokenizer(stopping).save_pretrained(folder)
    return str(folder)


def examples(here: World, numbers: Tensor, tiers: bool = False) -> list[Example]:
    """Prompts with the answers of these numbers [P, K]; with `tiers`, ranked best first."""
    tokens = here.tokens
    found = []
    for prompt, row in zip(PROMPTS, numbers.tolist(), strict=True):
        answers = tuple(tokens[number] for number in row)
        found.append(
            Example(
                tuple(LETTERS.index(letter) for letter in prompt),
                answers,
                tuple((True,) * len(answer) for answer in answers),
                tiers=tuple((i,) for i in range(len(row))) if tiers else (),
            )
        )
    return found


def ppo_settings(
    model: str, folder: Path, stopping: bool, beta: float, prompts: int
) -> dict[str, Any]:
    """What every PPO run in this world shares: `prompts` rows that go round the four."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": PROMPTS[i % 4]}) + "\n" for i in range(prompts)))
    return {
        "model": model,
        "data": str(data),
        "output": folder / "run",
        "reward_function": f"tests.oracle.world:reward{'_stopping' * stopping}",
        "kl_coef": beta,
        "max_new_tokens": LENGTH,
        "max_length": 16,
        "max_concurrent": 512,
        "device": "cpu",
    }


def at_step(run: Run, step: int) -> PreTrainedModel:
    """The policy as a checkpoint holds it."""
    model = load(run.model)
    state = torch.load(run.checkpoint(step) / "state.pt", weights_only=True)
    model.load_state_dict(state["models"]["policy"])
    return model


def load(folder: Path) -> PreTrainedModel:
    """A trained model, as plain Transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]


@cache
def _scores(stopping: bool) -> dict[tuple[str, str], float]:
    here = world(stopping)
    rows = zip(PROMPTS, here.reward.tolist(), strict=True)
    return {(p, y): r for p, row in rows for y, r in zip(here.texts, row, strict=True)}


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward function that PPO is given: answers of five letters."""
    return [_scores(False)[pair] for pair in zip(prompts, completions, strict=True)]


def reward_stopping(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The same where an answer may stop early."""
    return [_scores(True)[pair] for pair in zip(prompts, completions, strict=True)]
