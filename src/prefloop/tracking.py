"""Metrics to TensorBoard, Weights & Biases, MLflow or Trackio, beside metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from prefloop.errors import UserError

PROJECT = "prefloop"


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""

    def close(self) -> None:
        """Send what is left."""


def open_tracker(name: str, directory: Path, settings: dict[str, object]) -> Tracker | None:
    """The tracker of that name; None for `none`; UserError where its package is missing."""
    if name == "none":
        return None
    try:
        package = import_module(name)
    except ImportError as error:
        raise UserError(f"--track {name}: not installed; run `pip install {name}`") from error
    if name == "tensorboard":
        return TensorBoard(directory)
    if name == "mlflow":
        return MLflow(package, directory.name, settings)
    # wandb and trackio speak alike.
    return WandB(package.init(project=PROJECT, name=directory.name, config=settings))


class TensorBoard:
    """An event file in the run directory, through TensorBoard's own writer (which needs no torch).

    A resumed run writes a further file; a step logged twice shows its newer value.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        )

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run, or a Trackio one."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """An MLflow run, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, mlflow: Any, name: str, settings: dict[str, object]) -> None:
        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=name)
        mlflow.log_params(settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()
