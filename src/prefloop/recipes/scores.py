"""What the recipes judge answers by: rewards, and judges apart from them.

| function | of | what it is |
|---|---|---|
| `overlap` | summary, translation | words shared with a person's text: the reward |
| `chrf`, `rouge_l` | summary, translation | the same by other measures: the judges |
| `satire` | style | the reward's classifier, and the share of the keywords that are used |
| `satire_judge`, `content`, `fluency` | style | another classifier; chrF++; a frozen model |
| `refuses` | chat | whether the answer declines, by rules |

Each takes prompts and answers, and what else it names of the rows' columns (docs/judges.md).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from prefloop.recipes.fetch import fetch_model, require_packages
from prefloop.recipes.style_data import classifier, keywords_of

Texts = Sequence[str]
NOT = (
    r"(can['’]?t|cannot|can not|won['’]?t|will not|am not able to|refuse|"
    r"don['’]?t feel comfortable)"
)
REFUSALS = re.compile(
    rf"\b(i['’]?m (really |very |so )?sorry|i {NOT}|i['’]?m not (able|comfortable|going to)|"
    r"i['’]?m unable|as an ai|(that|this)['’]?s not (something|appropriate))\b",
    re.IGNORECASE,
)
BEGINNING = 200  # characters in which an answer that declines says so


def overlap(prompts: Texts, completions: Texts, reference: Texts) -> list[float]:
    """Mean F1 of words and of pairs of words with the reference, 0 to 1 (after ROUGE-1 and -2, Lin,
    2004). Lower case; punctuation is left out.

    >>> overlap([""], ["a red fox"], ["The red fox"])
    [0.5833333333333333]
    """
    scores = []
    for given, wanted in zip(completions, reference, strict=True):
        mine, theirs = (re.findall(r"\w+", text.lower()) for text in (given, wanted))
        pairs = _f1(Counter(pairwise(mine)), Counter(pairwise(theirs)))
        scores.append((_f1(Counter(mine), Counter(theirs)) + pairs) / 2)
    return scores


def _f1(mine: Counter[Any], theirs: Counter[Any]) -> float:
    whole = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / whole if whole else 0.0


def chrf(prompts: Texts, completions: Texts, reference: Texts) -> list[float]:
    """chrF++ with the reference, 0 to 1 (Popović, 2017), by sacrebleu."""
    require_packages("sacrebleu", extra="recipes")
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=2)
    pairs = zip(completions, reference, strict=True)
    return [metric.sentence_score(given, [wanted]).score / 100 for given, wanted in pairs]


def rouge_l(prompts: Texts, completions: Texts, reference: Texts) -> list[float]:
    """F1 of the longest common subsequence of words with the reference, 0 to 1 (Lin, 2004).

    Words are split as in `overlap`, for rouge-score's own tokenizer knows no letter but a to z.
    """
    require_packages("rouge_score", extra="recipes")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(completions, reference, strict=True)
    return [scorer.score(wanted, given)["rougeL"].fmeasure for given, wanted in pairs]


class _Words:
    """A tokenizer, as rouge-score asks for one."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def satire(prompts: Texts, completions: Texts, source: Texts) -> list[float]:
    """Probability that the newspaper is satirical, by the reward's classifier, times the share of
    the source's keywords that the headline uses: 0 to 1.
    """
    sure = classifier("reward").probabilities(completions)
    pairs = zip(sure, completions, source, strict=True)
    return [p * _used(text, keywords_of(wanted)) for p, text, wanted in pairs]


def _used(text: str, keywords: Texts) -> float:
    words = set(re.findall(r"\w+", text.lower()))
    return sum(word in words for word in keywords) / len(keywords)


def satire_judge(prompts: Texts, completions: Texts) -> list[float]:
    """Probability that the newspaper is satirical, by the judge's classifier: fitted on headlines
    that neither the reward's classifier nor any model has seen.
    """
    return classifier("judge").probabilities(completions)


def content(prompts: Texts, completions: Texts, source: Texts) -> list[float]:
    """chrF++ with the headline whose keywords were given, 0 to 1."""
    return chrf(prompts, completions, source)


def fluency(prompts: Texts, completions: Texts) -> list[float]:
    """Mean log-probability of an answer's tokens by themselves, nats, under SmolLM2 as fetched."""
    import torch

    tokenizer, model = _frozen()
    scores = []
    for text in completions:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text.strip()).input_ids]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
        told = log_probs.gather(1, ids[0, 1:, None])
        scores.append(float(told.mean()) if told.numel() else 0.0)
    return scores


@functools.lru_cache(maxsize=1)
def _frozen() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    return AutoTokenizer.from_pretrained(folder), model.eval()


def refuses(prompts: Sequence[object], completions: Texts) -> list[float]:
    """1 for an answer that begins by declining, else 0. Rules: they miss what is said otherwise.

    >>> refuses(["", ""], ["I'm sorry, but I can't help with that.", "Sure: two eggs."])
    [1.0, 0.0]
    """
    return [float(REFUSALS.search(text[:BEGINNING]) is not None) for text in completions]
