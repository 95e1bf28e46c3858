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
from prefloop.models.memory import Holes
from prefloop.peers import patiently
from prefloop.progress import Progress
from prefloop.provenance import written_files
from prefloop.runs import Run, newest_checkpoint
from prefloop.training import checkpoint, optim
from prefloop.training.interrupt import Interrupt
from prefloop.training.keeper import Keeper, NotFinite, Owed
from prefloop.training.method import Method, Step
from prefloop.training.monitor import Monitor
from prefloop.training.step import Outcome, optimizer_step
from prefloop.training.watch import Watch

ON_BAR = {
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "objective/scores": "score",
    "objective/kl": "KL",
    "monitor/score": "monitor",
}
"""Metrics beside the loss, and the bar's words for them."""


def train(
    method: Method[Any], config: TrainingConfig, run: Run, monitor: Monitor | None = None
) -> None:
    """Trains `method` to its last step and exports it; goes on from the run's checkpoint if any."""
    # 1. What is trained, and where it stands.
    device = next(iter(method.trained.values())).device
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    watch = Watch(config, run, monitor)
    keeper = Keeper(method, optimizer, run, config, watch)
    done, tokens, owed = keeper.resume()
    run.note(total_steps=(total := method.total_steps))
    progress = Progress("step", total, done, shown=distributed.rank() == 0)
    holes = Holes()
    with Interrupt() as interrupt, progress, keeper:
        if owed is not None:  # the step was done, but not what follows it
            _report(method, config, run, done, owed, watch)
            keeper.note(done, tokens)
        elif not done:
            _evaluate_before(method, run)
            watch.begin()
        latest: dict[str, float] = {}
        began = time.perf_counter()
        for item in islice(method.steps(done), 0 if watch.stopped else total - done):
            done += 1
            # 2. The step.
            factor = optim.lr_factor(
                done - 1, total, config.warmup, config.lr_schedule, config.lr_floor
            )
            optim.set_lr(optimizer, factor)
            try:
                outcome = optimizer_step(
                    method, item.batches, parameters, optimizer, config, keeper.forget, done
                )
            except NotFinite as error:
                raise _located(error, done, run) from None
            size = int(distributed.sum_mapping({"tokens": float(item.tokens)}, device)["tokens"])
            tokens += size
            owed = Owed(_line(config, outcome, item, factor, size / (time.perf_counter() - began)),
                        item.samples, bool(item.metrics))  # fmt: skip
            keeper.note(done, tokens, owed)
            # 3. Log, evaluate, save.
            measured = _report(method, config, run, done, owed, watch)
            keeper.note(done, tokens)
            latest |= {**owed.line, **measured}
            progress.advance(note=_bar_note(latest, "loss" in owed.line))
            stop, terminated, due = distributed.any_of(
                (interrupt.asked, interrupt.terminated, keeper.is_due(done)), device
            )
            if due or stop or watch.stopped or done == total:
                keeper.save()
            if stop:
                raise interrupt.error(terminated)
            if watch.stopped:
                break
            holes.give_back()
            began = time.perf_counter()
        # 4. The result.
        _finish(method, config, run, done, tokens, watch)
        interrupt.heed()


def _finish(
    method: Method[Any], config: TrainingConfig, run: Run, step: int, tokens: int, watch: Watch
) -> None:
    """Checkpoints that were not asked for have served their time once the record says so."""
    divided = any(model.sharded is not None for model in method.trained.values())
    with patiently():
        if divided or distributed.rank() == 0:
            watch.put_best_back(step)
            method.export(run.directory)
        if distributed.rank() == 0:
            folders = (run.directory / name for name in ("model", "value_model"))
            run.note(weights=written_files(folders))
        distributed.barrier()
    run.finish("finished", steps=step, tokens=tokens)
    if distributed.rank() == 0 and not config.save_every:
        checkpoint.remove_all(run.checkpoints)


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


def _report(
    method: Method[Any], config: TrainingConfig, run: Run, number: int, owed: Owed, watch: Watch
) -> dict[str, float]:
    """Evaluates and logs what step `number` gave, as the settings ask; returns the monitor's."""
    measured = watch.after(number, owed.line, last=number == method.total_steps)
    line, last = dict(owed.line) | measured, watch.stopped or number == method.total_steps
    if (config.eval_every and number % config.eval_every == 0) or last:
        line |= {f"eval/{k}": v for k, v in method.evaluate().items()}
    if number % config.log_every == 0 or last or owed.log or measured:
        run.log_metrics(number, line)
    run.log_samples(number, owed.samples)
    return measured
