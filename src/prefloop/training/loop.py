"""THE loop. A method says which batches make a step and what their loss sums are; `optimizer_step`
makes a step of them; the loop does the rest: logs, evaluates, saves, resumes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.models.memory import give_back_holes
from prefloop.progress import Progress
from prefloop.runs import Run, newest_checkpoint
from prefloop.training import checkpoint, optim
from prefloop.training.interrupt import Interrupt
from prefloop.training.keeper import Keeper, NotFinite, Owed
from prefloop.training.method import Method, Step
from prefloop.training.step import Outcome, optimizer_step

ON_BAR = {
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "objective/scores": "score",
    "objective/kl": "KL",
}
"""Metrics beside the loss, and the bar's words for them."""
TRIM_EVERY = 16  # steps; each takes about a hundredth of their time


def train(method: Method[Any], config: TrainingConfig, run: Run) -> None:
    """Trains `method` to its last step and exports it; goes on from the run's checkpoint if any."""
    # 1. What is trained, and where it stands.
    device = next(iter(method.trained.values())).device
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    keeper = Keeper(method, optimizer, run, config)
    steps_done, tokens, owed = keeper.resume()
    total = method.total_steps
    progress = Progress("step", total, steps_done, shown=distributed.rank() == 0)
    with Interrupt() as interrupt, progress, keeper:
        if owed is not None:  # the step was done, but not what follows it
            _report(method, config, run, steps_done, owed)
            keeper.note(steps_done, tokens)
        elif not steps_done:
            _evaluate_before(method, run)
        latest: dict[str, float] = {}
        began = time.perf_counter()
        steps = islice(method.steps(steps_done), total - steps_done)
        for number, item in enumerate(steps, start=steps_done + 1):
            # 2. The step.
            factor = optim.lr_factor(
                number - 1, total, config.warmup, config.lr_schedule, config.lr_floor
            )
            optim.set_lr(optimizer, factor)
            try:
                outcome = optimizer_step(
                    method, item.batches, parameters, optimizer, config, keeper.forget, number
                )
            except NotFinite as error:
                raise _located(error, number, run) from None
            size = int(distributed.sum_mapping({"tokens": float(item.tokens)}, device)["tokens"])
            tokens += size
            owed = Owed(_line(config, outcome, item, factor, size / (time.perf_counter() - began)),
                        item.samples, bool(item.metrics))  # fmt: skip
            keeper.note(number, tokens, owed)
            # 3. Log, evaluate, save.
            _report(method, config, run, number, owed)
            keeper.note(number, tokens)
            latest |= owed.line
            progress.advance(note=_bar_note(latest, "loss" in owed.line))
            stop, terminated, old = distributed.any_of(
                (interrupt.asked, interrupt.terminated, keeper.is_old()), device
            )
            regular = bool(config.save_every) and number % config.save_every == 0
            if regular or old or stop or number == total:
                keeper.save()
            if stop:
                raise interrupt.error(terminated)
            if device.type == "cpu" and number % TRIM_EVERY == 0:
                give_back_holes()
            began = time.perf_counter()
        # 4. The result; checkpoints that were not asked for have then served their time.
        if distributed.rank() == 0:
            method.export(run.directory)
            if not config.save_every:
                checkpoint.remove_all(run.checkpoints)
        distributed.barrier()
    run.finish("finished", steps=total, tokens=tokens)


def _evaluate_before(method: Method[Any], run: Run) -> None:
    """What the held-out rows give before anything is learned; draws from no generator."""
    state = checkpoint.rng_state()
    if held_out := method.evaluate():
        run.note(held_out_before=held_out)
    checkpoint.set_rng_state(state)


def _located(error: NotFinite, number: int, run: Run) -> NotFinite:
    kept = newest_checkpoint(run.directory) or "the start"
    return NotFinite(
        f"step {number}: {error}; nothing was saved over {kept}; lower --lr, or look for a broken "
        "row"
    )


def _line(
    config: TrainingConfig, outcome: Outcome, item: Step[Any], factor: float, rate: float
) -> dict[str, float]:
    """A step's line of metrics.jsonl; without loss and norms where nothing was learnt."""
    line = outcome.losses | {"lr": config.lr * factor} | outcome.norms
    return line | {"tokens_per_second": rate} | outcome.metrics | dict(item.metrics)


def _bar_note(latest: Mapping[str, float], learnt: bool) -> str:
    """What the bar says: of each metric its latest value; PPO's are of the iteration's start."""
    parts = [f"loss {latest['loss']:.4f}" if learnt else "left out"]
    parts += [f"{word} {latest[name]:.3f}" for name, word in ON_BAR.items() if name in latest]
    return " · ".join([*parts, f"{latest['tokens_per_second']:,.0f} tokens/s"])


def _report(method: Method[Any], config: TrainingConfig, run: Run, number: int, owed: Owed) -> None:
    """Evaluates and logs what step `number` gave, as the settings ask."""
    line, last = dict(owed.line), number == method.total_steps
    if (config.eval_every and number % config.eval_every == 0) or last:
        line |= {f"eval/{k}": v for k, v in method.evaluate().items()}
    if number % config.log_every == 0 or last or owed.log:
        run.log_metrics(number, line)
    run.log_samples(number, owed.samples)
