"""A run's health: rules that fired, the monitor's measurements, and the best step by them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefloop import distributed
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.errors import UserError
from prefloop.models.sharding import on_first
from prefloop.rewards.health import (
    GAMED,
    IN_A_ROW,
    JUDGE,
    KL,
    MEASURED,
    WATCHED,
    Sign,
    Trend,
    drift,
    fall,
    training_signs,
)
from prefloop.runs import Run
from prefloop.terminal import shown
from prefloop.training import checkpoint
from prefloop.training.monitor import Monitor

READ = ("kl", *MEASURED)
"""Of a measurement: what the rules look at beside the score."""


@dataclass
class Seen:
    """All that a resumed run must know again, as plain values."""

    trends: dict[str, Trend] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # of READ, at the first measurement
    best_step: int | None = None
    best_score: float = -math.inf
    best_scores: list[float | None] = field(default_factory=list)  # one a prompt
    best_reward: float | None = None  # the training score then
    below: int = 0  # measurements in a row that found the monitor below its best
    health: list[dict[str, Any]] = field(default_factory=list)  # see docs/run-directory.md
    missed: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""  # why the run ends, where it may


class Watch:
    """Looks at each step's metrics and, where there is a monitor, measures the policy."""

    def __init__(self, config: TrainingConfig, run: Run, monitor: Monitor | None) -> None:
        self.run, self.monitor, self.seen = run, monitor, Seen()
        ppo = config if isinstance(config, PPOConfig) else None
        target = ppo.kl_target if ppo else 0.0
        self.has_critic = ppo is not None and ppo.advantage == "gae"
        self.kl_limit = max(KL.limit, 2 * target)

    @property
    def stopped(self) -> bool:
        """Whether the run ends here, as --stop-on-hacking asks."""
        return bool(self.monitor and self.monitor.config.stop_on_hacking and self.seen.stopped)

    @property
    def keeps_best(self) -> bool:
        """Whether the best step's weights are kept."""
        return bool(self.monitor and self.monitor.config.keep_best)

    def begin(self) -> None:
        """Measures the policy that the run begins with; UserError where it gets no score."""
        if not self.monitor:
            return
        line = self._measured(0)
        if self.seen.missed:
            raise UserError(f"--monitor: {self.seen.missed[0]['why']}")
        self.run.log_metrics(0, line)

    def after(self, step: int, line: Mapping[str, float], last: bool) -> dict[str, float]:
        """Looks at what a step gave, and measures when it is time; returns what is to be logged."""
        for name, word in WATCHED.items():
            if math.isfinite(line.get(name, math.nan)):
                self.seen.trends.setdefault(word, Trend()).add(line[name])
        self._tell(step, training_signs(self.seen.trends, self.kl_limit))
        if self.monitor and (last or step % self.monitor.config.monitor_steps == 0):
            return self._measured(step)
        return {}

    # --- the monitor ------------------------------------------------------------------------------

    def _measured(self, step: int) -> dict[str, float]:
        assert self.monitor is not None
        found = self.monitor.measure()
        now = {name: found.metrics[name] for name in READ}
        self.seen.start = self.seen.start or now
        signs = drift(now, self.seen.start, self.kl_limit)
        if found.missed:
            self.seen.missed.append({"step": step, "why": found.missed})
            self.run.note(monitor_missed=self.seen.missed)
            _say(f"step {step}: the monitor has no score, so this step cannot be the best: "
                 f"{found.missed}")  # fmt: skip
        else:
            signs += self._beside_best(step, found.metrics["score"], found.scores)
        self._tell(step, signs)
        return {f"monitor/{name}": value for name, value in found.metrics.items()}

    def _beside_best(self, step: int, score: float, scores: list[float | None]) -> list[Sign]:
        """Takes the step for the best if it is, and else says whether the monitor has fallen."""
        seen, trend = self.seen, self.seen.trends.get("score")
        if score > seen.best_score:
            if self.monitor and self.keeps_best:
                trained = self.monitor.policy.named_trainable()
                state = on_first(checkpoint.trainable_state(trained))
                if distributed.rank() == 0:
                    checkpoint.save_best(self.run.checkpoints, step, state, seen.best_step)
            seen.best_step, seen.best_score, seen.best_scores = step, score, scores
            seen.best_reward, seen.below = trend.now if trend else None, 0
            self.run.note(best_step=step)
            return []
        errors = fall(scores, seen.best_scores)
        seen.below = seen.below + 1 if errors > JUDGE.limit else 0
        if seen.below < IN_A_ROW:
            return []
        text = (
            f"monitor {seen.best_score:.2f} (step {seen.best_step}) → {score:.2f}, {errors:.1f} "
            f"standard errors below, {seen.below} times in a row"
        )
        if trend is None:
            seen.stopped = text
            return [JUDGE.sign(text)]
        before = trend.first[0] if seen.best_reward is None else seen.best_reward
        text += f"; training score {before:.2f} → {trend.now:.2f}"
        if trend.now < before:
            return [JUDGE.sign(text)]
        seen.stopped = text
        return [GAMED.sign(text)]

    def put_best_back(self, step: int) -> None:
        """Gives the policy the weights of the best step, if they are kept; `step` is the last."""
        if self.monitor and self.has_critic:
            self.run.note(value_model_step=step)
        best = self.seen.best_step
        if self.monitor and self.keeps_best and best is not None and best != step:
            state = checkpoint.load_best(self.run.checkpoints, best)
            checkpoint.load_trainable_state(self.monitor.policy.named_trainable(), state)
            step = best
        if self.monitor:
            self.run.note(model_step=step)

    # --- what is told and kept --------------------------------------------------------------------

    def _tell(self, step: int, signs: Sequence[Sign]) -> None:
        """Each rule once in a run."""
        for sign in signs:
            if any(known["name"] == sign.name for known in self.seen.health):
                continue
            fact = {"name": sign.name, "step": step, "text": sign.text}
            self.seen.health.append(fact | {"why": sign.why, "try": sign.advice})
            self.run.note(health=self.seen.health)
            _say(f"step {step}: {sign.name}: {sign.text}; {sign.why}; try: {sign.advice}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return asdict(self.seen)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Puts it back, into the run's record too; None: of a run that was not watched yet."""
        kept = dict(state or {})
        trends = {name: Trend(**trend) for name, trend in kept.pop("trends", {}).items()}
        self.seen = Seen(trends, **kept)
        facts: dict[str, object] = {"health": self.seen.health}
        facts |= {"monitor_missed": self.seen.missed, "best_step": self.seen.best_step}
        # the record may be of later steps, which are dropped
        if known := {k: v for k, v in facts.items() if v or k in self.run.record}:
            self.run.note(**known)


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(shown(text), file=sys.stderr)
