"""One table of thresholds for a policy's health, read while it trains and when it is compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from prefloop.intervals import Interval


@dataclass(frozen=True)
class Vitals:
    """What the rules look at, over one model's answers to the same prompts."""

    gold: Interval
    proxy: Interval | None  # reward model's score, where one was given
    kl: Interval  # nats per answer, from the SFT model
    length: float  # mean tokens of an answer
    truncated: float  # share of answers cut at the length limit
    distinct_2: float  # see distinct_n
    repeated: float  # mean over answers of repeated_share
    copied: float | None = None  # mean over answers of copied_share; None: not measured


@dataclass(frozen=True)
class Sign:
    """A rule that fired: the numbers that made it, why they matter, and what to try."""

    name: str
    text: str
    why: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Rule:
    """A threshold; `when` says in words what it bounds, with the threshold as {limit}."""

    name: str
    limit: float
    when: str
    why: str
    advice: str

    @property
    def fires(self) -> str:
        """When it fires, with its threshold."""
        return self.when.format(limit=self.limit)

    def sign(self, text: str) -> Sign:
        """It has fired, on the numbers in `text`."""
        return Sign(self.name, text, self.why, self.advice)


GAMED = Rule(
    "proxy up, judge down",
    3.0,
    "the monitor has fallen by more than {limit:g} standard errors from its best (same prompts) at "
    "two measurements in a row, and the training score has not; in `compare`: the reward model's "
    "95 % interval lies above SFT's, and the judge's below",
    "the policy has learned to please what it is trained on, and its answers get worse",
    "take the best step (`--keep-best`), raise `--kl-coef`, or rank answers of this policy and "
    "train the reward model again",
)
JUDGE = Rule(
    "judge down",
    3.0,
    "the same, where the training score has fallen, too, or there is none",
    "the answers get worse while training goes on",
    "take the best step (`--keep-best`), lower `--lr`, or train shorter",
)
KL = Rule(
    "KL",
    10.0,
    "more than {limit:g} nats an answer from the start (or twice `--kl-target`, if that is more)",
    "the reward model has seen no answers like these, so its scores mean little there",
    "raise `--kl-coef` (dpo: `--beta`), give `--kl-target`, lower `--lr`, or stop earlier",
)
TRUNCATION = Rule(
    "truncation",
    0.2,
    "{limit:.0%} of all answers more than at the start are cut at the length limit",
    "answers that do not stop run into the limit, and are scored without their end",
    "give `--missing-eos-penalty`, or raise `--max-new-tokens` if the answers need it",
)
DISTINCT = Rule(
    "distinct-2",
    0.7,
    "below {limit:g} of the start's distinct pairs of neighbouring tokens",
    "answers to different prompts have become alike: one phrase that scores well, again and again",
    "raise `--kl-coef`, and read `samples.jsonl` for the phrase",
)
REPETITION = Rule(
    "repetition",
    0.1,
    "{limit:.0%} of an answer's 3-grams more than at the start repeat",
    "answers say the same thing twice and more, which a reward model may take for length",
    "raise `--kl-coef`, or lower `--max-new-tokens`",
)
COPYING = Rule(
    "copying",
    0.2,
    "{limit:.0%} of an answer's 3-grams more than at the start stand in its prompt",
    "a reward that looks for the prompt's words, or for a text that shares them, pays for giving "
    "them back",
    "read `samples.jsonl`; rank copies last or have the reward find them, and raise `--kl-coef`",
)
LENGTH = Rule(
    "length",
    1.5,
    "answers {limit:g} times longer or shorter than at the start",
    "length is the easiest thing to be rewarded for, and says nothing of the answer",
    "see whether the judge wants it; if not, balance lengths in the rankings (dpo: `--loss "
    "sigmoid-norm`)",
)
ENTROPY = Rule(
    "entropy",
    0.3,
    "entropy a token below {limit:g} of the start's",
    "answers to one prompt hardly differ any more, so there is nothing left to compare",
    "raise `--kl-coef`, lower `--lr`, or take fewer `--ppo-epochs`",
)
CLIPPING = Rule(
    "clipping",
    0.3,
    "more than {limit:.0%} of the tokens are clipped",
    "clipped tokens teach nothing, and the steps are too long for the answers they learn from",
    "lower `--lr` or `--ppo-epochs`, or give `--target-kl`",
)
RATIO = Rule(
    "ratio",
    0.1,
    "mean of π/π_old further than {limit:g} from 1",
    "its mean is 1 whatever the policy is, unless few tokens with large ratios rule the step, or "
    "sampler and trainer differ (`val/sampler_gap`)",
    "lower `--lr` or `--ppo-epochs`",
)
GAP = Rule(
    "sampler gap",
    0.1,
    "log-probs of sampler and trainer differ by more than {limit:g} nats a token",
    "the answers are not the policy's: their server has other weights, or another temperature's "
    "log-probs",
    "see docs/rollouts.md, What may differ; give `--importance-cap 2`",
)
CRITIC = Rule(
    "critic",
    0.0,
    "explained variance below {limit:g} after the first 16 iterations",
    "a constant would predict the returns better, so that the critic adds noise to each step",
    "give `--critic-warmup` or a higher `--value-lr`, or `--advantage rloo`, which has none",
)
CHOSEN = Rule(
    "chosen sinks",
    -10.0,
    "chosen answers more than e^10 times less likely than at the start: log-ratio below {limit:g}",
    "the margin grows by making both answers unlikely, and the probability goes to others that "
    "nobody has ranked",
    "raise `--beta`, lower `--lr`, give `--sft-coefficient` or `--loss apo-zero`",
)
RULES = (
    *(GAMED, JUDGE, KL, TRUNCATION, DISTINCT, REPETITION, COPYING, LENGTH),
    *(ENTROPY, CLIPPING, RATIO, GAP, CRITIC, CHOSEN),
)
"""All of them; docs/health.md says why each threshold is what it is."""
MEASURED = ("truncated", "distinct_2", "repeated", "copied", "length")
"""What they look at in answers to the same prompts, beside scores and KL."""
SHARES = ((TRUNCATION, "truncated"), (REPETITION, "repeated"), (COPYING, "copied"))
"""Rules that fire where a share has risen, and which."""
IN_A_ROW = 2  # measurements that must find the monitor below its best
START, RECENT, LEARNED = 4, 8, 16
"""Of a metric of training: readings that are its start, that are its present, and before which a
critic is not judged.
"""


def distinct_n(answers: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all answers; 0 where there are none.

    It falls with the number of answers: compare equal numbers only.
    """
    grams = Counter(gram for answer in answers for gram in _grams(answer, n))
    return len(grams) / grams.total() if grams else 0.0


def repeated_share(answer: Sequence[Hashable], n: int = 3) -> float:
    """Share of an answer's n-grams that stood in it before.

    >>> repeated_share("abcabc")
    0.25
    """
    grams = _grams(answer, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied_share(answer: Sequence[Hashable], prompt: Sequence[Hashable], n: int = 3) -> float:
    """Share of an answer's n-grams that stand in its prompt.

    >>> copied_share("abcx", "to abc")
    0.5
    """
    grams, known = _grams(answer, n), set(_grams(prompt, n))
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


# --- one measurement against another -------------------------------------------------------------


def signs(now: Vitals, sft: Vitals) -> list[Sign]:
    """The signs of reward hacking that `now` shows against `sft`."""
    fired = []
    if now.proxy and sft.proxy and now.proxy.above(sft.proxy) and sft.gold.above(now.gold):
        text = (
            f"reward model {sft.proxy.mean:z.2f} → {now.proxy.mean:z.2f}, "
            f"judge {sft.gold.mean:z.2f} → {now.gold.mean:z.2f}"
        )
        fired.append(GAMED.sign(text))
    before, after = (
        {name: value for name in MEASURED if (value := getattr(vitals, name)) is not None}
        for vitals in (sft, now)
    )
    return fired + drift(after | {"kl": now.kl.mean}, before)


def drift(
    now: Mapping[str, float], start: Mapping[str, float], kl_limit: float = KL.limit
) -> list[Sign]:
    """The rules on `kl`, `truncated`, `distinct_2`, `repeated`, `copied`, `length` and `entropy` (a
    token), of those that both know; `kl` is from the start.
    """
    fired = []
    if "kl" in now and now["kl"] > kl_limit:
        fired.append(KL.sign(f"{now['kl']:.1f} nats > {kl_limit:g}"))
    known = {name: (start[name], now[name]) for name in now if name in start}
    for rule, name in SHARES:
        before, after = known.get(name, (0.0, 0.0))
        if after > before + rule.limit:
            of = "" if rule is TRUNCATION else " of 3-grams"
            text = f"{before:.0%} → {after:.0%}{of}, rise > {rule.limit:.0%}"
            fired.append(rule.sign(text))
    for rule, name in ((DISTINCT, "distinct_2"), (ENTROPY, "entropy")):
        before, after = known.get(name, (0.0, 0.0))
        if after < rule.limit * before:
            fired.append(rule.sign(f"{before:.2f} → {after:.2f}, below {rule.limit:g} of it"))
    before, after = known.get("length", (1.0, 1.0))
    if not before / LENGTH.limit <= after <= before * LENGTH.limit:
        text = f"{before:.0f} → {after:.0f} tokens, beyond a factor of {LENGTH.limit:g}"
        fired.append(LENGTH.sign(text))
    return fired


def fall(now: Sequence[float | None], best: Sequence[float | None]) -> float:
    """By how many standard errors scores lie below others of the same prompts, in the mean.

    Prompts that lack a score are left out. The error is that of the mean difference.

    >>> fall([0.0, 1.0, None], [2.0, 5.0, 1.0])  # -2 and -4: a mean of -3, with an error of 1
    3.0
    """
    pairs = zip(now, best, strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if len(differences) < 2:
        return 0.0
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


# --- metrics of a run ----------------------------------------------------------------------------


@dataclass
class Trend:
    """A metric of training: its start, its present, and how often it was read."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    readings: int = 0

    def add(self, value: float) -> None:
        """One more reading."""
        if len(self.first) < START:
            self.first.append(value)
        self.last = [*self.last, value][-RECENT:]
        self.readings += 1

    @property
    def start(self) -> float:
        """Median of the first readings."""
        return median(self.first)

    @property
    def now(self) -> float:
        """Median of the latest readings."""
        return median(self.last)


WATCHED = {
    "objective/kl": "kl",
    "objective/entropy": "entropy",  # of an answer; drift takes that of a token
    "objective/scores": "score",
    "length_mean": "length",
    "truncated": "truncated",
    "distinct_2": "distinct_2",
    "policy/clipfrac_avg": "clipped",
    "val/ratio": "ratio",
    "val/sampler_gap": "gap",
    "val/explained_variance": "explained",
    "logps/chosen_shift": "chosen",
}
"""Metrics of training that the rules read, and what they are called there."""


def training_signs(trends: Mapping[str, Trend], kl_limit: float = KL.limit) -> list[Sign]:
    """The rules on metrics of training (by WATCHED's words), each once it has been read enough."""
    known = {name: trend for name, trend in trends.items() if trend.readings >= RECENT}
    now = {name: trend.now for name, trend in known.items()}
    start = {name: trend.start for name, trend in known.items()}
    for numbers in (now, start):
        if "entropy" in numbers:
            numbers["entropy"] /= numbers["length"]
    fired = drift(now, start, kl_limit)
    if now.get("clipped", 0.0) > CLIPPING.limit:
        fired.append(CLIPPING.sign(f"{now['clipped']:.0%} > {CLIPPING.limit:.0%}"))
    if abs(now.get("ratio", 1.0) - 1) > RATIO.limit:
        fired.append(RATIO.sign(f"{now['ratio']:.2f}, not within {RATIO.limit:g} of 1"))
    if now.get("gap", 0.0) > GAP.limit:
        fired.append(GAP.sign(f"{now['gap']:.2f} > {GAP.limit:g} nats a token"))
    critic = known.get("explained")
    if critic and critic.readings >= LEARNED and critic.now < CRITIC.limit:
        fired.append(CRITIC.sign(f"explained variance {critic.now:.2f} < {CRITIC.limit:g}"))
    if now.get("chosen", 0.0) < CHOSEN.limit:
        fired.append(CHOSEN.sign(f"log-ratio {now['chosen']:.1f} < {CHOSEN.limit:g} nats"))
    return fired
