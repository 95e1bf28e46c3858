"""One rank of several: runs cases, and tells of the first error in a file of its own.

`python -m tests.training.on_rank WORLD OUTPUT JOB...` with torchrun's variables set. A job is the
name of a case, or JSON: settings of a run (`command` or `case`, `to`), `copy`: [from,
to, step], or what stands in tests/training/held.py, loading.py, rounded.py and eight.py.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from prefloop import distributed
from prefloop.errors import UserError
from tests.training.cases import run_case
from tests.training.eight import tell_eight
from tests.training.held import export, tell_held
from tests.training.loading import tell_loading
from tests.training.rounded import tell_rounded
from tests.training.small import only_checkpoint, train


def work(world: Path, output: Path, job: str) -> None:
    if not job.startswith("{"):
        return run_case(job, world, output / job)
    asked = json.loads(job)
    if "copy" in asked:
        source, target, step = asked["copy"]
        if distributed.rank() == 0:
            only_checkpoint(output / source, output / target, step)
        return distributed.barrier()
    if "held" in asked:
        return tell_held(world, output, asked.pop("held"), **asked)
    if "rounded" in asked:
        return tell_rounded(world, output, asked["rounded"])
    if "eight" in asked:
        return tell_eight(world, output, asked["eight"])
    if "loaded" in asked:
        return tell_loading(world, output, asked["loaded"], asked["model"])
    if "exported" in asked:
        return export(world, output, asked["exported"], asked["file_bytes"])
    to = asked.pop("to")
    if "case" in asked:
        return run_case(asked.pop("case"), world, output / to, **asked)
    try:
        train(asked.pop("command"), world, output / to, **asked)
    except UserError as error:
        (output / f"{to}-told-{distributed.rank()}").write_text(str(error))
    return None


def main() -> None:
    world, output, *jobs = sys.argv[1:]
    try:
        for job in jobs:
            work(Path(world), Path(output), job)
    except BaseException:
        (Path(output) / f"error-{os.environ['RANK']}").write_text(traceback.format_exc())
        raise


main()
