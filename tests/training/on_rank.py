"""One rank of several: runs cases, and tells of the first error in a file of its own.

`python -m tests.training.on_rank WORLD OUTPUT CASE...` with torchrun's variables set.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from tests.training.cases import run_case
from tests.training.small import train


def main() -> None:
    world, output, *names = sys.argv[1:]
    rank = os.environ["RANK"]
    try:
        for name in names:
            if name.startswith("{"):
                asked = json.loads(name)
                train(asked.pop("command"), Path(world), Path(output) / asked.pop("to"), **asked)
            else:
                run_case(name, Path(world), Path(output) / name)
    except BaseException:
        (Path(output) / f"error-{rank}").write_text(traceback.format_exc())
        raise


main()
