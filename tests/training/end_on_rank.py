"""One rank of several, on which the second comes to an end that the first must tell of.

`torchrun -m tests.training.end_on_rank WORLD OUTPUT`; how it ends stands in ENDS.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch

from prefloop import distributed
from prefloop.cli import main
from prefloop.commands import COMMANDS, Command
from prefloop.config import SFTConfig
from prefloop.models.load import load_policy
from prefloop.training import loop, rows
from prefloop.training.sft import SFT
from prefloop.training.start import divide, start
from tests.training.small import CPU, flags, settings

PATIENCE = timedelta(seconds=20)


class Ends:
    """A method whose losses on the second rank, from the third on, end as ENDS says."""

    def __init__(self, method):
        self._method, self._calls = method, 0

    def __getattr__(self, name):
        return getattr(self._method, name)

    def loss(self, batch):
        out = self._method.loss(batch)
        self._calls += 1
        if self._calls < 3:
            return out
        if os.environ["ENDS"] == "terminated":  # all are, and the first is gone before the others
            os.kill(os.getpid(), signal.SIGTERM)
            if distributed.rank() == 0:
                os._exit(143)
        if distributed.rank() != 1:
            return out
        if "gradient" in os.environ["ENDS"]:  # the root of 0 beside a sound loss: its slope is inf
            rooted = {name: v + (v - v.detach()).sqrt() for name, v in out.terms.items()}
            return out._replace(terms=rooted)
        if os.environ["ENDS"] == "nan":
            return out._replace(terms={name: torch.nan * v for name, v in out.terms.items()})
        if os.environ["ENDS"] == "memory":
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        if os.environ["ENDS"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["ENDS"] == "hangs":
            signal.pause()  # until the launcher's SIGTERM
        return out


def ending(config):
    run, device = start(config, "sft")
    with run:
        policy = load_policy(config.model, device)
        if os.environ["ENDS"] == "gradient-of-slices":
            divide(config, [policy])
        method = SFT(config, policy, *rows.read_examples(config, "demonstration", policy, run))
        loop.train(Ends(method), config, run)
    return run


def work(world: Path, output: Path) -> int:
    distributed.start(CPU, PATIENCE)
    words = ["sft", *flags(settings("sft", world, output, batch_size=2))]
    return main(words, {**COMMANDS, "sft": Command(SFTConfig, ending)})


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Path(sys.argv[2])))
