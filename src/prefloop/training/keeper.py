"""What of a run is sound, and when it is saved: whatever ends it, its last whole step is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from prefloop import distributed
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.errors import UserError, first_line, out_of_memory
from prefloop.peers import patiently
from prefloop.runs import Run
from prefloop.terminal import shown
from prefloop.training import checkpoint, slices
from prefloop.training.interrupt import uninterrupted
from prefloop.training.method import Method
from prefloop.training.watch import Watch


class NotFinite(UserError):
    """A loss or gradient that is no number: what led there is not worth keeping."""


@dataclass(frozen=True)
class Owed:
    """What a step that is done has still to be followed by: its evaluation, its lines."""

    line: Mapping[str, float]
    samples: list[dict[str, Any]]
    log: bool  # whatever --log-every says


@dataclass(frozen=True)
class Sound:
    """The run after a whole step, but for weights and optimiser, which stay as they are until the
    next step changes them.
    """

    step: int
    tokens: int
    method: Mapping[str, Any]
    watch: Mapping[str, Any]
    rng: Mapping[str, Any]
    owed: Owed | None


class Keeper:
    """Knows how the run stood after its last whole step, and saves that; a context manager that
    saves what an exception would lose.
    """

    def __init__(
        self,
        method: Method[Any],
        optimizer: torch.optim.Optimizer,
        run: Run,
        config: TrainingConfig,
        watch: Watch,
    ) -> None:
        self.method, self.optimizer, self.run, self.config = method, optimizer, run, config
        self.watch = watch
        self.sound: Sound | None = None  # None while weights change
        self.saved = 0  # the step of the newest checkpoint
        self.saved_at = time.monotonic()

    def resume(self) -> tuple[int, int, Owed | None]:
        """Puts the run's checkpoint back; returns steps and tokens done, and what is owed."""
        _ = self.method.fingerprint  # tells a damaged file; of slices no rank can tell it alone
        path = self.run.resume_from
        if path is None:
            self.watch.load_state_dict(None)
            self._go_on(None, 0, logged=-1)
            return 0, 0, None
        state = checkpoint.load(path)
        self._check(state)
        try:
            for name, model in self.method.trained.items():
                checkpoint.load_trainable_state(model.named_trainable(), state["models"][name])
            checkpoint.load_optimizer_state(self.optimizer, state["optimizer"])
            self.method.load_state_dict(state["method"])
            self.watch.load_state_dict(state.get("watch"))
            checkpoint.set_rng_state(state["rng"])
            step, tokens = int(state["step"]), int(state["tokens"])
            owed = None if state["owed"] is None else Owed(**state["owed"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: not a checkpoint of this run ({first_line(error)}); name another"
            ) from error
        self._go_on(path, step, logged=step if owed is None else step - 1)
        self.note(step, tokens, owed)
        self.saved = step
        if path.resolve().parent != self.run.checkpoints.resolve():
            self.save()  # a run goes on from its own
        return step, tokens, owed

    def _go_on(self, path: Path | None, step: int, logged: int) -> None:
        self.run.go_on(step, logged)
        if distributed.rank() == 0:
            checkpoint.take_best(path, self.run.checkpoints)

    def _check(self, state: Mapping[str, Any]) -> None:
        """UserError where the checkpoint is not of this run as it is now."""
        if state.get("format") != checkpoint.FORMAT:
            raise UserError(
                f"{self.run.resume_from}: made by an earlier prefloop; go on with that one, or "
                "give another --output"
            )
        if state.get("fingerprint") != self.method.fingerprint:
            raise UserError(
                f"{self.run.directory}: the rows, or weights that stay fixed (reference, reward "
                "model, the base of LoRA), are not those that the run began with; put them back, "
                "or give another --output"
            )
        if state["step"] > self.method.total_steps:
            raise UserError(
                f"{self.run.resume_from}: of step {state['step']}, beyond the "
                f"{self.method.total_steps} steps of this run; raise --max-steps or --epochs, or "
                "name an earlier checkpoint"
            )

    def forget(self) -> None:
        """Weights and optimiser are about to change: there is nothing sound until `note`."""
        self.sound = None

    def note(self, step: int, tokens: int, owed: Owed | None = None) -> None:
        """The run as it stands is sound, after `step` whole steps."""
        state, watch = self.method.state_dict(), self.watch.state_dict()
        self.sound = Sound(step, tokens, state, watch, checkpoint.rng_state(), owed)

    def is_due(self, step: int) -> bool:
        """Whether --save-every names the step, or the first rank's newest checkpoint is older than
        --save-minutes.
        """
        every, age = self.config.save_every, (time.monotonic() - self.saved_at) / 60
        old = distributed.rank() == 0 and 0 < self.config.save_minutes <= age
        return old or (every > 0 and step % every == 0)

    def save(self) -> None:
        """Writes the checkpoint, once for all ranks, each its slices of what is divided; signals
        wait until it stands, but not for what is still under way.
        """
        with patiently():
            method = self._settled()
        with uninterrupted(), patiently():
            state, divided = self._state(method)
            written = self.run.checkpoints / f".{slices.FOLDER}.tmp" if divided else None
            if written is not None:
                slices.write(written, divided)
            if distributed.rank() == 0:
                self._write(state, written)
            distributed.barrier()

    def _settled(self, wait: bool = True, alone: bool = False) -> dict[str, Any]:
        """The method's state with nothing of it under way; `alone`: without the other ranks."""
        assert self.sound is not None
        state = dict(self.sound.method)
        for name in [name for name, part in state.items() if callable(part)]:
            if alone and distributed.world() > 1:
                raise UserError("ranks have answers under way, so that no rank saves alone")
            state[name] = state[name](wait)
        return state

    def _state(self, method: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is written by the first rank, and by all."""
        assert self.sound is not None
        sound, divided = self.sound, dict[str, Tensor]()
        state = {
            "format": checkpoint.FORMAT,
            "step": sound.step,
            "models": {
                name: checkpoint.trainable_state(model.named_trainable())
                for name, model in self.method.trained.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "method": method,
            "watch": sound.watch,
            "fingerprint": self.method.fingerprint,
            "rng": sound.rng,
            "tokens": sound.tokens,
            "owed": None if sound.owed is None else asdict(sound.owed),
        }
        return slices.take_out(state, divided), divided

    def _write(self, state: dict[str, Any], written: Path | None = None) -> None:
        assert self.sound is not None
        sound = self.sound
        folder, keep = self.run.checkpoints, self.config.keep_checkpoints
        checkpoint.save(folder, sound.step, state, keep, sound.watch["best_step"], written)
        self.saved, self.saved_at = sound.step, time.monotonic()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Keeps the last whole step; memory that ran out becomes the user's to mend.

        The first rank saves alone: the others may be anywhere, or gone.
        """
        if error is None:
            return
        if not isinstance(error, NotFinite) and distributed.rank() == 0:
            self._rescue(wait=not isinstance(error, KeyboardInterrupt))
        if out_of_memory(error):
            samples = ", --max-concurrent" if isinstance(self.config, PPOConfig) else ""
            raise UserError(
                f"out of memory ({first_line(error)}); lower --micro-batch-tokens{samples} or give "
                "--gradient-checkpointing: a run goes on with these changed"
            ) from error

    def _rescue(self, wait: bool) -> None:
        if self.sound is None or self.sound.step <= self.saved:
            return
        try:
            state, divided = self._state(self._settled(wait, alone=True))
            if divided:  # of which the other ranks hold the rest
                raise UserError("its models are divided, so that no rank saves alone")
        except UserError as failure:
            on = f"it goes on from step {self.saved}"
            print(shown(f"{self.run.directory}: {failure}; {on}"), file=sys.stderr)
            return
        try:
            with uninterrupted():
                self._write(state)
        except UserError as failure:  # no room: the error that came first is told
            print(shown(f"prefloop: {failure}"), file=sys.stderr)
            return
        print(
            f"{self.run.directory}: saved after step {self.saved}; the same command goes on there",
            file=sys.stderr,
        )
